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
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mowe.cli._inputs import default_device, skeleton
from mowe.cli._quality import as_text
from mowe.cli._screen import Screen, model_heading
from mowe.cli._versions import package_version
from mowe.families.stacked import StackedLinear
from mowe.modeling_mowe import MoweForConditionalGeneration
from mowe_kernels.backend import implementation

_BITSANDBYTES = 64 + 160  # what it keeps beside a matrix: the code table, and settings as a text of about that length
_VERSIONS = ("mowe-kernels", "torch", "transformers", "triton")


@dataclass(frozen=True)
class Part:
    """One part of a model. parameters: how many; bytes follow from 4 (fp32) or 2 (bf16) for each.

    bytes_4bit: with its linear layers in NF4, scales quantised, and the rest in bf16.
    """

    name: str
    type: str
    detail: str
    parameters: int
    bytes_fp32: int
    bytes_bf16: int
    bytes_4bit: int


def run(folder: Path | None, screen: Screen) -> None:
    model = skeleton(folder)
    parts = list(_parts(model))
    device = default_device()
    versions = {"python": platform.python_version()} | {name: package_version(name) for name in _VERSIONS}
    data = {
        "model": folder and str(folder),
        "trained": None if folder else True,
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
    saved = sum(2 * count - size for count, size in _quantized(module)) // share
    return Part(name, kind, detail, parameters, 4 * parameters, 2 * parameters, 2 * parameters - saved)


def _quantized(module: torch.nn.Module) -> Iterator[tuple[int, int]]:
    """Values and bytes of every matrix that 4 bits would hold: of encoders and language models, not of its head."""
    language_model = module if isinstance(module, PreTrainedModel) else None
    head = language_model.get_output_embeddings() if language_model else None
    for layer in module.modules():
        if isinstance(layer, StackedLinear):
            count = layer.weight[0].numel()
            yield from [(count, _nf4_bytes(count))] * layer.weight.shape[0]
        elif language_model and isinstance(layer, torch.nn.Linear | Conv1D) and layer is not head:
            count = layer.weight.numel()
            yield count, _nf4_bytes(count) + _BITSANDBYTES


def _nf4_bytes(count: int) -> int:
    """Half a byte a value, a byte a block of 64; for those bytes a float every 256, an offset and a table."""
    blocks = -(-count // 64)
    return (count + 1) // 2 + blocks + 4 * -(-blocks // 256) + 4 + 1024


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
    for heading, sum_ in zip(("parameters", "fp32", "bf16", "4-bit/bf16"), total, strict=True):
        table.add_column(heading, sum_, justify="right", no_wrap=True)
    for part in parts:
        table.add_row(part.name, part.type, part.detail, *_part_sum([part]))
    return table


def _part_sum(parts: list[Part]) -> tuple[str, str, str, str]:
    count = sum(part.parameters for part in parts)
    return f"{count:,}", as_text(4 * count), as_text(2 * count), as_text(sum(part.bytes_4bit for part in parts))


def _backend() -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return implementation("grouped_linear", [torch.empty(0, device=device)]).__name__.split(".")[1]
