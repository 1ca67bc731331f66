"""Classes made while the program runs, under the name of the one they extend."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def made_again_by(make: Callable[[type], type], base: type) -> dict[str, Any]:
    """What goes into the body of a class that `make` made of `base`: it passes for `base` where it is named, and
    pickle, which would find `base` by that name, makes it again.
    """

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # By names: dill, which `datasets` hashes with, looks into functions, and into what they remember.
        _, (_, *args), *state = base.__reduce_ex__(self, protocol)
        return _new, (make.__module__, make.__name__, base, *args), *state

    return {"__module__": base.__module__, "__reduce_ex__": __reduce_ex__}


def _new(module: str, make: str, base: type, *args: Any) -> Any:
    made = getattr(import_module(module), make)(base)
    return made.__new__(made, *args)
