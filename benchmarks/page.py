"""docs/benchmarks.md and the README's performance section, made from the committed results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.catalogue import ALL
from benchmarks.rivals import MEANINGS
from benchmarks.shares import added
from benchmarks.suites import SUITES
from benchmarks.tables import OPS, clips, conditions, duration, machine, markdown, meaning, speedup, table

_PICTURES = {
    "overview.png": "Seconds for one batch, the usual way and packed",
    "speedup.png": "Speed-up by workload and provider",
    "sweeps.png": "Time against encoders, slots, clips, seconds and padding",
    "floor.png": "Share of the floor by op",
    "memory.png": "Peak memory by workload and provider",
}
GPU_PICTURES = {
    "speedup": "Speed-up on a GPU by workload and provider",
    "floor": "Share of the floor by op on a GPU",
}
# What the README shows: (workload, mode, baseline, the library's provider). The page has everything.
Overview = Mapping[tuple[str, str, str, str], str]
OVERVIEW: Overview = {
    ("tiny8/speech/8", "features", "per_clip", "packed"): "features of a pool",
    ("tiny8/short/8", "features", "per_clip", "packed"): "features of a pool",
    ("tiny8/full/8", "features", "padded_loop", "packed"): "features of a pool",
    ("tiny8/speech/4", "features", "nf4_loop", "packed_nf4"): "features of a pool in 4 bits",
    ("tiny8/speech/4", "whole", "naive", "mixture"): "waveforms to LLM embeddings",
    ("tiny8/speech/2", "frozen step", "padded_mixture_step", "mixture_step"): "a training step, base encoder frozen",
}
GPU_OVERVIEW: Overview = {
    ("tiny8/speech/64", "features", "per_clip", "packed"): "features of a pool",
    ("tiny8/speech/64", "features", "padded_loop", "packed"): "features of a pool",
    ("tiny8/speech/64", "features", "nf4_loop", "packed_nf4"): "features of a pool in 4 bits",
    ("tiny8/speech/16", "whole", "naive", "mixture"): "waveforms to LLM embeddings",
    ("tiny8/speech/16", "step", "padded_loop_step", "packed_step"): "a training step of the pool",
    ("tiny8/speech/16", "frozen step", "padded_mixture_step", "mixture_step"): "a training step, base encoder frozen",
}
_SECTIONS = {
    "features": "Features of the chosen encoders",
    "whole": "From waveforms to the language model",
    "step": "Training the pool",
    "frozen step": "Training the mixture beside a frozen base encoder",
}


def page(
    cpu: dict[str, Any],
    sweeps: dict[str, Any],
    profiled: dict[str, Any],
    gpus: Mapping[str, dict[str, Any]],
    pictures: str,
) -> str:
    """The whole page. gpus: what was measured on GPUs, by name. pictures: folder of the pictures, as linked to."""
    lines = ["# Benchmarks", "", "Made by `python -m benchmarks page` from the committed results.", ""]
    lines += ["## On a CPU", "", conditions(cpu), "", _workload_names(), ""]
    lines += _picture(pictures, "speedup.png")
    lines += _tables(cpu["results"])
    lines += _picture(pictures, "floor.png")
    lines += ["### Memory", "", *_picture(pictures, "memory.png")]
    lines += ["### Scaling", "", f"Measured by `{sweeps['command']}`.", "", *_picture(pictures, "sweeps.png")]
    lines += [*_where_time_goes(profiled), *_beside_the_base(profiled)]
    lines += ["### Not run here", "", *(f"- {_words(name)}: {reason}." for name, reason in cpu["missing"].items()), ""]
    for name, gpu in gpus.items():
        lines += [f"## On {gpu['device']}", "", conditions(gpu), "", *_host(gpu)]
        drawn = {shown: _gpu_picture(pictures, name, shown) for shown in gpu_pictures(gpu)}
        lines += [*drawn.get("speedup", []), *_tables(gpu["results"]), *drawn.get("floor", [])]
        lines += _not_measured(gpu["results"])
    if not gpus:
        lines += ["## On a CUDA GPU", "", *_not_measured([]), "Single ops: not measured yet.", ""]
    return "\n".join(lines).rstrip() + "\n"


def readme(cpu: dict[str, Any], profiled: dict[str, Any], gpus: Mapping[str, dict[str, Any]], pictures: str) -> str:
    """The README's section."""
    slots, whole = added(profiled["parts"], "routers", "pool"), _whole(profiled)
    return "\n".join(
        (
            f"{machine(cpu)}; pools of eight Whisper-tiny, two chosen for each clip. `{cpu['command']}` measures it.",
            "",
            _summary(cpu, OVERVIEW),
            "",
            *(line for gpu in gpus.values() for line in _on_gpu(gpu)),
            *_picture(pictures, "overview.png"),
            f"Two Whisper-tiny slots add {slots['seconds']:.1%} to the time of a Whisper-large base encoder, with the "
            f"projector {whole['seconds']:.1%} (`{profiled['command']}`). Every provider, where the time goes, single "
            "ops, memory and scaling: [docs/benchmarks.md](docs/benchmarks.md).",
        )
    )


def overview(report: dict[str, Any], wanted: Overview) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(what, the baseline's result, the library's) of what a newcomer wants to know, as far as it was measured."""
    found = {(r["subject"], r["mode"], r["baseline"], r["provider"]): r for r in report["results"]}
    return [
        (title, found[subject, mode, baseline, baseline], found[subject, mode, baseline, own])
        for (subject, mode, baseline, own), title in wanted.items()
        if (subject, mode, baseline, own) in found
    ]


def gpu_pictures(gpu: dict[str, Any]) -> list[str]:
    """Of GPU_PICTURES those that a run, which may have been stopped, has something to show in."""
    ops = {r["mode"] in OPS for r in gpu["results"]}
    return [name for name, of_ops in (("speedup", False), ("floor", True)) if of_ops in ops]


def _on_gpu(gpu: dict[str, Any]) -> list[str]:
    if not overview(gpu, GPU_OVERVIEW):
        return []
    return [f"{machine(gpu)}; the same pools. `{gpu['command']}`:", "", _summary(gpu, GPU_OVERVIEW), ""]


def _summary(report: dict[str, Any], wanted: Overview) -> str:
    rows = [
        (
            f"{title}: {clips(own['about'])}",
            meaning(theirs),
            *(duration(result["seconds"]["median"]) for result in (theirs, own)),
            speedup(own, "**{:.1f}x**"),
        )
        for title, theirs, own in overview(report, wanted)
    ]
    return table(("what", "the usual way", "its time", "packed", "speed-up"), rows)


def _host(gpu: dict[str, Any]) -> list[str]:
    seconds = gpu.get("seconds_a_layer")
    if not seconds:
        return []
    return [f"A layer of Whisper-tiny, in a batch of a size not seen before, takes the host {duration(seconds)}.", ""]


def _not_measured(results: Sequence[dict[str, Any]]) -> list[str]:
    """What the GPU suite compares and is not among the results."""
    found = {(r["subject"], r["mode"], r["baseline"], r["provider"]) for r in results}
    lines = []
    for c in SUITES["gpu"]:
        absent = [name for name in c.providers if (c.workload, c.mode, c.providers[0], name) not in found]
        if absent:
            lines.append(f"- {c.workload}, {_SECTIONS[c.mode].lower()}: {'; '.join(map(_words, absent))}")
    return ["### Not measured yet", "", *lines, ""] if lines else []


def _words(provider: str) -> str:
    """What a reader is told a provider is, of whole passes or of single ops."""
    return ALL[provider].meaning if provider in ALL else MEANINGS[provider]


def _tables(results: Sequence[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for mode, title in _SECTIONS.items():
        lines += _section(title, [r for r in results if r["mode"] == mode])
    return [*lines, *_section("Single ops", [r for r in results if r["mode"] in OPS])]


def _section(title: str, results: Sequence[dict[str, Any]]) -> list[str]:
    return [f"### {title}", "", markdown(results), ""] if results else []


def _where_time_goes(profiled: dict[str, Any]) -> list[str]:
    rows = [(kind, f"{share:.1%}") for kind, share in profiled["shares"].items()]
    return [
        "### Where the time goes",
        "",
        f"The packed pool on {profiled['workload']}, by `{profiled['command']}`:",
        "",
        table(("kind of work", "share"), rows),
        "",
    ]


def _beside_the_base(profiled: dict[str, Any]) -> list[str]:
    parts = profiled["parts"]
    base = parts["base encoder"]
    shares = {name: added(parts, name) for name in parts} | {"all but the base": _whole(profiled)}
    rows = [
        (
            name,
            f"{share['seconds'] * base['seconds'] * 1e3:.1f}",
            f"{share['flops'] * base['flops'] / 1e9:.1f}",
            f"{share['seconds']:.1%}",
            f"{share['flops']:.1%}",
        )
        for name, share in shares.items()
    ]
    whole = shares["all but the base"]
    return [
        "### What a mixture costs beside its base encoder",
        "",
        f"{profiled['beside']}: two Whisper-tiny beside Whisper-large, from waveforms to embeddings, by the same "
        "command. Shares are of the base encoder's.",
        "",
        table(("part", "ms", "GFLOP", "share of time", "share of FLOPs"), rows),
        "",
        f"The mixture's share of the time is {whole['seconds'] / whole['flops']:.2f} times its share of the FLOPs.",
        "",
    ]


def _whole(profiled: dict[str, Any]) -> dict[str, float]:
    return added(profiled["parts"], *(name for name in profiled["parts"] if name != "base encoder"))


def _workload_names() -> str:
    return (
        "A workload is pool / lengths / clips: `tiny8` is 8 encoders of Whisper-tiny's size, `base16` 16 of "
        "Whisper-base's, `paper` 2 Whisper-tiny and 2 HuBERT-base. Lengths: `full` 30 s each, `speech` log-normal "
        "around 8 s, `short` 1 to 5 s, `spread` 2 to 20 s. Providers that pad compute 30 s windows of every clip, the "
        "packed pool the clips' own frames, but where every clip is 30 s."
    )


def _gpu_picture(folder: str, gpu: str, name: str) -> list[str]:
    return [f"![{GPU_PICTURES[name]}]({Path(folder, f'{gpu}-{name}.png').as_posix()})", ""]


def _picture(folder: str, name: str) -> list[str]:
    return [f"![{_PICTURES[name]}]({Path(folder, name).as_posix()})", ""]
