"""`mowe info`: the parts of a model and what it would run on."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from mowe.cli._inputs import default_device, naming, read_config
from mowe.cli._screen import Screen, model_heading
from mowe.cli._versions import package_version
from mowe.modeling_mowe import MoweForConditionalGeneration
from mowe_kernels.backend import implementation

_VERSIONS = ("mowe-kernels", "torch", "transformers", "triton")


@dataclass(frozen=True)
class Part:
    """One part of a model. parameters: how many; bytes follow from 4 (fp32) or 2 (bf16) for each."""

    name: str
    type: str
    detail: str
    parameters: int
    bytes_fp32: int
    bytes_bf16: int


def run(folder: Path | None, screen: Screen) -> None:
    model = _skeleton(folder)
    parts = list(_parts(model))
    device = default_device()
    versions = {"python": platform.python_version()} | {name: package_version(name) for name in _VERSIONS}
    data = {
        "model": folder and str(folder),
        "trained": None if folder else False,
        "context": model.config.context,
        "parts": [asdict(part) for part in parts],
        "parameters": sum(part.parameters for part in parts),
        "device": device.type,
        "backend": _backend(),
        "versions": versions,
    }
    runs_on = ", ".join(f"{name} {number}" for name, number in versions.items())
    screen.result(
        data,
        model_heading(folder),
        Text(),
        _table(parts),
        Text(),
        Text(f"runs on {data['device']} with the {data['backend']} backend; {runs_on}", style="dim"),
    )


def _skeleton(folder: Path | None) -> MoweForConditionalGeneration:
    """The modules of a model; those of a folder without their weights."""
    if folder is None:
        from mowe.nano import nano_model

        return nano_model()[0]
    config = read_config(folder)
    with naming(folder), torch.device("meta"):
        return MoweForConditionalGeneration(config)


def _parts(model: MoweForConditionalGeneration) -> Iterator[Part]:
    config, mixture = model.config, model.model.mixture
    yield _part("base encoder", model.audio_tower, config.audio_config.model_type, _size(config.audio_config))
    for index, encoder in enumerate(config.pool_config.encoder_configs()):
        family, members = next(
            pair for pair in zip(mixture.pool.families, mixture.pool.members, strict=True) if index in pair[1]
        )
        yield _part(f"encoder {index}", family, encoder.model_type, _size(encoder), share=len(members))
    slots = f"{config.num_independent_slots} + {config.num_dependent_slots} slots"
    yield _part("routers", mixture.router, "linear", slots)
    stride = f"{config.projector_stride} frames a token"
    yield _part("projector", mixture.multi_modal_projector, config.projector_type, stride)
    yield _part("language model", model.language_model, config.text_config.model_type, _size(config.text_config))


def _part(name: str, module: torch.nn.Module, kind: str, detail: str, share: int = 1) -> Part:
    """share: how many stacked encoders the module holds, of which this is one."""
    parameters = sum(parameter.numel() for parameter in module.parameters()) // share
    return Part(name, kind, detail, parameters, 4 * parameters, 2 * parameters)


def _size(config: object) -> str:
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    return f"{layers} layers of {width}" if layers and width else ""


def _table(parts: list[Part]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
        show_footer=True,
        footer_style="bold",
    )
    total = _part_sum(parts)
    table.add_column("part", "all")
    table.add_column("type")
    table.add_column("size")
    for heading, sum_ in zip(("parameters", "fp32", "bf16"), total, strict=True):
        table.add_column(heading, sum_, justify="right", no_wrap=True)
    for part in parts:
        table.add_row(part.name, part.type, part.detail, *_part_sum([part]))
    return table


def _part_sum(parts: list[Part]) -> tuple[str, str, str]:
    count = sum(part.parameters for part in parts)
    return f"{count:,}", _memory(4 * count), _memory(2 * count)


def _memory(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _backend() -> str:
    return implementation("route_topk").__name__.split(".")[1]
