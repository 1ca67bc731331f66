"""A pool of weak encoders of any mix of families, run together in one packed pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from mowe.audio import AudioBatch
from mowe.checkpoint import load_pretrained_encoder, normalizes
from mowe.configuration_mowe import MowePoolConfig
from mowe.errors import ConfigError, naming
from mowe.families import ClipFeatures, Context, EncoderFamily, KeepsFixed, family_class, find_encoder
from mowe.families.nf4 import Nf4StackedLinear
from mowe_kernels import PackLayout, PackPlan
from mowe_kernels.backend import implementation


@dataclass(frozen=True)
class PoolOutput:
    """Features of every (clip, slot) of a batch.

    rows: per family, packed frames [R, D]. plan: where each pair's frames lie. plan_on_host: makes the same plan on the
    CPU, where the choices were made there; None where it cannot.
    """

    rows: tuple[Tensor, ...]
    plan: PackPlan
    plan_on_host: Callable[[], PackPlan | None] | None = None

    def pair(self, clip: int, slot: int) -> Tensor:
        """[T, D]: what the slot's encoder gives for the clip alone, a view of the rows: where they have a gradient, not
        to be changed in place. The first call waits for the device, unless the choices came from the host.

        Raises IndexError for a clip or a slot outside the batch, ConfigError for an unused slot.
        """
        batch, slots = self.plan.position.shape
        if not (0 <= clip < batch and 0 <= slot < slots):
            raise IndexError(f"no clip {clip}, slot {slot} in a batch of {batch} clips with {slots} slots")
        found = self._pairs[clip][slot]
        if found is None:
            raise ConfigError(f"slot {slot} of clip {clip} is unused")
        return found

    def pairs(self) -> list[list[Tensor | None]]:
        """[clip][slot] -> [T, D], None for an unused slot. The first call waits where that of `pair` does."""
        return [list(slots) for slots in self._pairs]

    @cached_property
    def _pairs(self) -> list[list[Tensor | None]]:
        plan = (self.plan_on_host and self.plan_on_host()) or self.plan
        slots = plan.position.shape[1]
        tables = [plan.position.flatten(), *map(plan.row_offsets, range(len(self.rows)))]
        places, *bounds = (part.tolist() for part in torch.cat(tables).cpu().split(list(map(len, tables))))
        by_place: list[Tensor | None] = [None] * len(places)
        for rows, first in zip(self.rows, bounds, strict=True):
            lengths = [b - a for a, b in pairwise(first)]
            # Split at once: the gradients of single slices would each be as large as all rows.
            pieces = rows.split([*lengths, rows.shape[0] - first[-1]])
            for place, length in enumerate(lengths):
                if length:
                    by_place[place] = pieces[place]
        found = [by_place[place] for place in places]
        return [found[at : at + slots] for at in range(0, len(found), slots)]


# So that torch sees the tensors in it: DistributedDataParallel with a static graph would not wait for their gradients,
# and torch.export would not know what it is.
for _kind in (PoolOutput, PackPlan, PackLayout):
    torch.export.register_dataclass(_kind)


class Layouts:
    """The fixed part of every plan of some families, on the devices that asked for it.

    families: the number of each encoder's family. levels: how many each family has. Copies and pickles begin without
    any layout: they may go where those devices are not.
    """

    def __init__(self, families: Sequence[int], levels: Sequence[int]):
        self.families, self.levels = families, levels
        self._kept: dict[torch.device, PackLayout] = {}

    def on(self, device: torch.device) -> PackLayout:
        """The one on a device, made when first asked for."""
        if torch.compiler.is_compiling():  # a compiled graph would be made anew once the layout is kept
            return PackLayout.build(self.families, self.levels, device)
        if device not in self._kept:
            self._kept[device] = PackLayout.build(self.families, self.levels, device)
        return self._kept[device]

    def __reduce__(self) -> tuple[Any, ...]:
        return Layouts, (self.families, self.levels)


class EncoderPool(KeepsFixed, nn.Module):
    """E weak encoders, numbered as given; encoders of one architecture and size are stacked and run together.

    families: one module each, and one unit for `fully_shard` (FSDP2 waits where processes choose apart, if layers of
    theirs are units). members: per family, the numbers of its encoders in the order in which they lie along the
    first axis of its parameters. `requires_grad` is of a family; of some of its encoders, hooks that put zeros into the
    others' gradients (`Tensor.register_hook`) make the rest learn alone, under an optimiser without weight decay.

    Raises ConfigError for an empty pool and for encoders that no family can run.
    """

    def __init__(self, config: MowePoolConfig):
        super().__init__()
        if not config.encoders:
            raise ConfigError("a pool needs at least one encoder, got none")
        self.config = config
        members: dict[tuple[Any, ...], list[int]] = {}
        configs = config.encoder_configs()
        normalize = [encoder["do_normalize"] for encoder in config.encoders]
        for index, encoder in enumerate(configs):
            with naming(f"encoder {index}"):
                signature = family_class(encoder.model_type).signature(encoder, normalize[index])
            members.setdefault((encoder.model_type, *signature), []).append(index)
        families = nn.ModuleList(
            family_class(key[0])([configs[i] for i in indices], normalize[indices[0]])
            for key, indices in members.items()
        )
        self.families = cast(Sequence[EncoderFamily], families)
        self.members = tuple(map(tuple, members.values()))
        family_of = {index: f for f, indices in enumerate(self.members) for index in indices}
        of_each = [family_of[index] for index in range(len(configs))]
        self._layouts = Layouts(of_each, [family.num_levels for family in self.families])

    @classmethod
    def from_encoders(
        cls,
        encoders: Sequence[nn.Module],
        feature_extractors: Sequence[Any] | None = None,
        context: Context = "window",
    ) -> EncoderPool:
        """A pool with the weights of transformers modules, each of which is or holds one supported encoder.

        The weights are copied, `requires_grad` is not: the pool of frozen modules learns until it is frozen itself.

        feature_extractors: what prepares each encoder's input (only `do_normalize` of a wave encoder matters). Without
        them a wave encoder gets the waveform as it is. context: used where `encode` and the mixture are not told.
        The pool takes the device and the dtype of the first encoder.
        Raises ConfigError for encoders that no family can run, CheckpointError for parameters that do not fit.
        """
        if not hasattr(encoders, "__len__"):
            raise ConfigError(f"expected a list of encoders, got {type(encoders).__name__}")
        extractors = list(feature_extractors) if feature_extractors is not None else [None] * len(encoders)
        if len(extractors) != len(encoders):
            raise ConfigError(f"{len(encoders)} encoders but {len(extractors)} feature extractors")
        found, entries = [], []
        for index, (module, extractor) in enumerate(zip(encoders, extractors, strict=True)):
            with naming(f"encoder {index}"):
                encoder = find_encoder(module)
                entries.append({"config": encoder.config, "do_normalize": normalizes(encoder, extractor)})
            found.append(encoder)
        pool = cls(MowePoolConfig(encoders=entries, context=context))
        for index, encoder in enumerate(found):
            family, place = pool._place(index)
            with naming(f"encoder {index}"):
                family.load_encoder(place, encoder)
        first = next(found[0].parameters())
        return pool.to(first.device, first.dtype).eval()

    @classmethod
    def from_pretrained(cls, sources: Sequence[str | PathLike[str]], context: Context = "window") -> EncoderPool:
        """A pool from checkpoint folders or hub ids; each one's preprocessor_config.json decides the normalisation.

        Raises CheckpointError for a checkpoint that cannot be read or lacks parameters, ConfigError for encoders that
        no family can run.
        """
        if isinstance(sources, str | PathLike):
            raise ConfigError(f"expected a list of checkpoints, got {str(sources)!r}")
        loaded = [load_pretrained_encoder(source) for source in sources]
        return cls.from_encoders([e for e, _ in loaded], [x for _, x in loaded], context)

    @property
    def num_encoders(self) -> int:
        """How many encoders there are to choose from."""
        return len(self.config.encoders or ())

    @property
    def quantized(self) -> bool:
        """Whether its layers are in 4 bits."""
        return any(isinstance(module, Nf4StackedLinear) for module in self.modules())

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each family's features."""
        return tuple(family.hidden_size for family in self.families)

    def layout(self, device: torch.device) -> PackLayout:
        """The fixed part of every plan of this pool."""
        return self._layouts.on(device)

    def lengths(self, features: ClipFeatures) -> list[list[int]]:
        """[L][B]: frames of each clip at each level of each family."""
        return [level for family in self.families for level in family.lengths(features)]

    def prepare(self, features: ClipFeatures) -> None:
        """Have a GPU make what the families read, before there is a plan."""
        for family in self.families:
            family.prepare(features)

    def forward(self, features: ClipFeatures, plan: PackPlan) -> PoolOutput:
        """Run every pair of the plan."""
        return PoolOutput(tuple(family(features, plan.family(i)) for i, family in enumerate(self.families)), plan)

    def encode(
        self, waveforms: Sequence[Tensor], indices: Tensor | Sequence[Sequence[int]], context: Context | None = None
    ) -> PoolOutput:
        """Features of chosen encoders for each clip.

        waveforms: B 1-D float tensors at 16 kHz, trusted to be finite. indices: integer [B, k], encoder of each slot,
        -1 for none.
        context: "valid" or "window", the pool's own by default.
        Raises AudioError for waveforms that cannot be encoded, ConfigError for indices that do not fit; the values of
        those on a GPU are not looked at.
        """
        device = next(self.parameters()).device
        features = ClipFeatures(AudioBatch.from_waveforms(waveforms, device), context or self.config.context)
        chosen, lengths = self._check_indices(indices, len(waveforms)), self.lengths(features)
        self.prepare(features)
        on_device = chosen.to(device, non_blocking=device.type == "cuda")
        out = self(features, PackPlan.build(on_device, lengths, self.layout(device)))
        if chosen.device.type != "cpu" or device.type == "cpu":
            return out
        # A copy: the caller may put the next batch's choices into the same memory.
        return replace(out, plan_on_host=partial(_plan, chosen.clone(), lengths, self.layout(chosen.device)))

    def to_transformers(self, index: int) -> PreTrainedModel:
        """Encoder `index` given back as a transformers module, for input as `feature_extractor(index)` prepares it."""
        family, place = self._place(index)
        return family.to_transformers(place)

    def feature_extractor(self, index: int) -> WhisperFeatureExtractor | Wav2Vec2FeatureExtractor:
        """What prepares the input of encoder `index` in transformers: `from_encoders` takes both of them again."""
        self._place(index)
        entry = (self.config.encoders or [])[index]
        if "num_mel_bins" in entry["config"]:
            return WhisperFeatureExtractor(feature_size=entry["config"]["num_mel_bins"])
        return Wav2Vec2FeatureExtractor(do_normalize=bool(entry.get("do_normalize", False)))

    def _place(self, index: int) -> tuple[EncoderFamily, int]:
        """Family of an encoder and its place there."""
        for family, indices in zip(self.families, self.members, strict=True):
            if index in indices:
                return family, indices.index(index)
        raise ConfigError(f"no encoder {index} in a pool of {self.num_encoders}")

    def _check_indices(self, indices: Tensor | Sequence[Sequence[int]], batch: int) -> Tensor:
        try:
            indices = torch.as_tensor(indices)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"indices must be integers [clips, slots]: {error}") from None
        integer = not (indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool)
        if not integer or indices.dim() != 2 or indices.shape[0] != batch or not indices.shape[1]:
            raise ConfigError(
                f"indices must be integers [{batch} clips, slots], got {indices.dtype} {list(indices.shape)}"
            )
        if indices.device.type == "cpu":
            low, high = int(indices.min()), int(indices.max())
            if low < -1 or high >= self.num_encoders:
                raise ConfigError(f"indices must lie in -1..{self.num_encoders - 1}, got {low}..{high}")
        return indices


def _plan(indices: Tensor, lengths: list[list[int]], layout: PackLayout) -> PackPlan | None:
    """The plan on the CPU; None where kernels are asked for that cannot run there."""
    by_kernel = implementation("pack_plan", (indices,)).__name__.startswith("mowe_kernels.triton")
    return None if by_kernel else PackPlan.build(indices, lengths, layout)
