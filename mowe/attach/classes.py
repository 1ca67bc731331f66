"""Classes made while the program runs, under the name of the one they extend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def made_again_by(make: Callable[[type], type], base: type) -> dict[str, Any]:
    """What goes into the body of a class that `make` made of `base`: it passes for `base` where it is named, and
    pickle, which would find `base` by that name, makes it again.
    """

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        _, (_, *args), *state = base.__reduce_ex__(self, protocol)
        return _new, (make, base, *args), *state

    return {"__module__": base.__module__, "__reduce_ex__": __reduce_ex__}


def _new(make: Callable[[type], type], base: type, *args: Any) -> Any:
    made = make(base)
    return made.__new__(made, *args)
