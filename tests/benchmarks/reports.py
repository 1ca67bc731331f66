"""A results file as the tools of the benchmarks read it, without a measurement."""

from __future__ import annotations

from typing import Any


def spread(median: float, width: float = 0.05) -> dict[str, float]:
    return {"median": median, "p20": median * (1 - width), "p80": median * (1 + width)}


BASELINES = {
    "features": "per_clip", "whole": "naive", "step": "padded_loop_step", "frozen step": "padded_mixture_step",
    "forward": "loop", "backward": "loop",
}  # fmt: skip


def result(provider: str, speedup: float, *, subject: str = "tiny8/speech/8", mode: str = "features", **more: Any):
    about = None if mode in ("forward", "backward") else {"encoders": 8, "slots": 2, "seconds": [2.0, 9.5]}
    return {
        "subject": subject, "provider": provider, "baseline": BASELINES[mode], "mode": mode, "dtype": "float32",
        "rounds": 3, "seconds": spread(1 / speedup), "speedup": spread(speedup), "floor": 0.05,
        "memory": {"before": 2**29, "peak": 2**30} if mode == "features" else None, "about": about, "sweep": None,
        **more,
    }  # fmt: skip


def report(*results: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "schema": 3, "command": "python -m benchmarks run", "device": "a CPU", "threads": 2,
        "versions": {"torch": "2.13.0"}, "roofs": {"flops": 2e11, "bandwidth": 2e10},
        "missing": {"padded_loop_compiled": "torch.compile needs a C++ compiler"},
        "results": list(results), **more,
    }  # fmt: skip
