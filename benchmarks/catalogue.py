"""Every provider by its name."""

from __future__ import annotations

from benchmarks.grouped import GROUPED
from benchmarks.nf4 import NF4
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.training import STEPS
from benchmarks.whole import WHOLE

ALL: dict[str, Provider] = PROVIDERS | GROUPED | NF4 | WHOLE | STEPS
