"""Two results files side by side: what became slower beyond the noise of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """The speed-up of one provider against its baseline, before and after; ratios within one run, so that a machine
    that was busy in one of the two does not matter. verdict: "slower", "faster" or "same".
    """

    subject: str
    provider: str
    mode: str
    old: dict[str, float]
    new: dict[str, float]

    @property
    def verdict(self) -> str:
        if self.new["p80"] < self.old["p20"]:
            return "slower"
        return "faster" if self.new["p20"] > self.old["p80"] else "same"


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    """What both files measured, baselines left out.

    Raises ValueError where the files are of different devices or threads, or have nothing in common.
    """
    for name in ("device", "threads"):
        if old[name] != new[name]:
            raise ValueError(f"results of different {name}s cannot be compared: {old[name]!r} and {new[name]!r}")
    before = {_key(result): result for result in old["results"]}
    common = [result for result in new["results"] if _key(result) in before]
    if not common:
        raise ValueError("the two results files have no measurement in common")
    for result in common:
        if result["provider"] != result["baseline"]:
            earlier = before[_key(result)]["speedup"]
            yield Change(result["subject"], result["provider"], result["mode"], earlier, result["speedup"])


def _key(result: dict[str, Any]) -> tuple[str, ...]:
    return tuple(result[name] for name in ("subject", "provider", "baseline", "mode", "dtype"))
