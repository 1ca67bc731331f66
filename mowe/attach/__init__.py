"""A mixture of weak encoders for any AudioLLM of transformers."""

import sys
from inspect import signature
from types import ModuleType

from mowe.attach.adapter import attach_from, load_attached, save_adapter
from mowe.attach.layouts import LAYOUTS, AudioLayout, skip_modules
from mowe.attach.model import attach, detach
from mowe.attach.processor import wrap_processor

__all__ = [
    "LAYOUTS",
    "AudioLayout",
    "attach",
    "attach_from",
    "detach",
    "load_attached",
    "save_adapter",
    "skip_modules",
    "wrap_processor",
]


class _AttachModule(ModuleType):
    """`mowe.attach` is this package and the function of that name: the package can be called."""

    __call__ = staticmethod(attach)
    __signature__ = signature(attach)


__doc__ = attach.__doc__  # what help(mowe.attach) shows
sys.modules[__name__].__class__ = _AttachModule
