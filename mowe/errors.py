"""What `mowe` raises on bad input: one line that says what was wrong and what was expected, always a `ValueError`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class MoweError(ValueError):
    """Base of every error raised by `mowe`."""


class AudioError(MoweError):
    """An audio file or an array of samples that cannot be used."""


class ConfigError(MoweError):
    """A setting that is unknown, out of range or at odds with another one."""


class CheckpointError(MoweError):
    """A checkpoint whose files, keys or shapes are not what the model needs."""


class DataError(MoweError):
    """A manifest of clips, or lines of one, that cannot be used."""


class Terminated(KeyboardInterrupt):
    """SIGTERM has ended this, as Ctrl-C would have."""


@contextmanager
def naming(subject: str | Callable[[], str]) -> Iterator[None]:
    """Errors of `mowe` raised inside begin with what they are about, or with what a function then says."""
    try:
        yield
    except MoweError as error:
        raise type(error)(f"{subject if isinstance(subject, str) else subject()}: {error}") from None
