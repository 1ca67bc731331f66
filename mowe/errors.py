"""What `mowe` raises on bad input: one line that says what was wrong and what was expected, always a `ValueError`."""


class MoweError(ValueError):
    """Base of every error raised by `mowe`."""


class AudioError(MoweError):
    """An audio file or an array of samples that cannot be used."""


class ConfigError(MoweError):
    """A setting that is unknown, out of range or at odds with another one."""


class CheckpointError(MoweError):
    """A checkpoint whose files, keys or shapes are not what the model needs."""
