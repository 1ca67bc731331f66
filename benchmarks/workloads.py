"""What is measured: pools of encoders with random weights, clips of fixed lengths, a fixed routing."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import exp, log
from statistics import NormalDist

import torch
from torch import Tensor, nn
from transformers import HubertConfig, HubertModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mowe.audio import SAMPLING_RATE
from mowe.families import Context


def _whisper(width: int, layers: int, heads: int, num_mel_bins: int = 80) -> Callable[[], nn.Module]:
    config = WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        num_mel_bins=num_mel_bins,
    )
    return lambda: WhisperEncoder(config)


whisper_tiny = _whisper(384, 4, 6)
whisper_base = _whisper(512, 6, 8)
whisper_large = _whisper(1280, 32, 20, num_mel_bins=128)


def hubert_base() -> nn.Module:
    """HuBERT-base: 7 convolutions and 12 layers of width 768."""
    return HubertModel(HubertConfig())


# Pools are named by what is in them and how often ("tiny8"), or "paper": two Whisper-tiny and two HuBERT-base.
KINDS: dict[str, Callable[[], nn.Module]] = {"tiny": whisper_tiny, "base": whisper_base, "hubert": hubert_base}
PAPER = (whisper_tiny, whisper_tiny, hubert_base, hubert_base)
# The base encoder beside each pool, where the whole way to the language model is measured.
BASES = {"tiny2": whisper_large, "tiny4": whisper_tiny, "tiny8": whisper_base}


def full(count: int) -> tuple[float, ...]:
    """Every clip 30 s: nothing to save by not padding."""
    return (30.0,) * count


def speech(count: int) -> tuple[float, ...]:
    """Log-normal, mean 8 s, cut to 1..30 s."""
    spread = 0.6
    middle = log(8) - spread**2 / 2
    return tuple(min(max(exp(middle + spread * z), 1.0), 30.0) for z in map(NormalDist().inv_cdf, _quantiles(count)))


def short(count: int) -> tuple[float, ...]:
    """1 to 5 s, uniform."""
    return tuple(1 + 4 * q for q in _quantiles(count))


def spread(count: int) -> tuple[float, ...]:
    """2 to 20 s, each longer than the one before by the same factor."""
    return tuple(2 * 10 ** (i / (count - 1)) for i in range(count))


MIXES: dict[str, Callable[[int], tuple[float, ...]]] = {
    "full": full,
    "speech": speech,
    "short": short,
    "spread": spread,
}


_NAME = re.compile(
    rf"(?:paper|(?P<kind>[a-z]+)(?P<count>[1-9]\d*))/(?P<mix>{'|'.join(MIXES)}|\d+(?:\.\d+)?s)/(?P<clips>\d+)(?:/k(?P<slots>\d+))?"
)


@dataclass(frozen=True)
class Workload:
    """A batch of clips and the encoders each of them is routed to.

    pool: makers of its members. seconds: length of each clip. context: what the packed pool computes. device, dtype:
    where and in what the encoders compute; waveforms stay in float32.
    """

    name: str
    pool: tuple[Callable[[], nn.Module], ...]
    top_k: int
    seconds: tuple[float, ...]
    context: Context
    device: str = "cpu"
    dtype: str = "float32"

    @classmethod
    def named(cls, name: str, device: str = "cpu", dtype: str = "float32") -> Workload:
        """A workload by its name, "<pool>/<length mix>/<clips>" or "<pool>/<length mix>/<clips>/k<slots>".

        Two slots, where not said, one in a pool of one. A mix may also be one length for all clips, "8s". Clips of 30 s
        are windows of Whisper; all others are encoded on their own frames.

        Raises ValueError for a name that means nothing.
        """
        found = _NAME.fullmatch(name)
        if not found or (found["kind"] and found["kind"] not in KINDS):
            raise ValueError(
                f"unknown workload {name!r}; expected pool/mix/clips with a pool of {', '.join(KINDS)} and how many, "
                f"or paper, and a mix of {', '.join(MIXES)} or a length as 8s: tiny8/speech/8"
            )
        pool = PAPER if found["kind"] is None else (KINDS[found["kind"]],) * int(found["count"])
        top_k = int(found["slots"] or min(2, len(pool)))
        batch = int(found["clips"])
        if not 1 <= top_k <= len(pool) or not batch:
            raise ValueError(f"{name}: expected a clip or more and 1 to {len(pool)} slots")
        mix = found["mix"]
        seconds = MIXES[mix](batch) if mix in MIXES else (float(mix[:-1]),) * batch
        context: Context = "window" if min(seconds) == 30 else "valid"
        return cls(name, pool, top_k, seconds, context, device, dtype)

    @property
    def make_base(self) -> Callable[[], nn.Module]:
        """Maker of the base encoder beside the pool. Raises ValueError where the pool has none."""
        make = BASES.get(self.name.partition("/")[0])
        if make is None:
            raise ValueError(f"{self.name}: no base encoder; there is one beside {', '.join(BASES)}")
        return make

    def base(self) -> nn.Module:
        """The base encoder beside the pool. Raises ValueError where the pool has none."""
        torch.manual_seed(1)
        return self._placed(self.make_base)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def num_encoders(self) -> int:
        return len(self.pool)

    @cached_property
    def indices(self) -> list[list[int]]:
        """[B, k]: distinct encoders for each clip, drawn once."""
        draw = random.Random(0)
        return [draw.sample(range(self.num_encoders), self.top_k) for _ in self.seconds]

    def encoders(self) -> list[nn.Module]:
        """The members of the pool, in evaluation mode, made anew."""
        torch.manual_seed(0)
        return [self._placed(make) for make in self.pool]

    def _placed(self, make: Callable[[], nn.Module]) -> nn.Module:
        with torch.device(self.device):  # weights are drawn where they will be
            model = make()
        return model.to(self.device, self.torch_dtype).eval()

    def waveforms(self) -> list[Tensor]:
        """1-D float32 noise at 16 kHz; no step of any provider looks at what the clips hold."""
        generator = torch.Generator().manual_seed(0)
        waves = [torch.randn(round(s * SAMPLING_RATE), generator=generator) * 0.1 for s in self.seconds]
        return [wave.to(self.device) for wave in waves]


def _quantiles(count: int) -> list[float]:
    """The middles of `count` equal parts of 0..1, in an order drawn once."""
    middles = [(i + 0.5) / count for i in range(count)]
    random.Random(0).shuffle(middles)
    return middles
