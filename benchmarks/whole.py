"""The whole way, from waveforms to the language model's embeddings: base encoder, routers, pool, projector.

`mixture` is the library's; `naive` is the same mixture as one would write it with transformers, clip by clip, each
padded to 30 s; `base_alone` is the library's base encoder, to see what the mixture adds to it. All slots are
data-dependent, the routers' weights random: which encoders a clip gets is left to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.providers import Outputs, Provider, Run, extractors, kind
from benchmarks.workloads import Workload
from mowe import EncoderPool, MoweForConditionalGeneration
from mowe.audio import AudioBatch
from mowe.families import ClipFeatures, Context
from mowe.modeling_mowe import MoweModel

_LLM_WIDTH = 2048


def mixture(workload: Workload, context: Context | None = None) -> Run:
    return mixture_of(workload, _shared(workload, context or workload.context))


def mixture_of(workload: Workload, model: MoweModel) -> Run:
    """The workload's clips through a model that is there already."""
    inputs, mask = padded(workload.waveforms())

    def run() -> Outputs:
        out = model.get_audio_features(inputs, mask).mixture
        return [[tokens] for tokens in out.tokens.split(out.lengths)]

    return run


def captured(workload: Workload, context: Context | None = None) -> Run:
    """The mixture as a CUDA graph, for clips up to the longest of these; the base encoder before it as it is."""
    context = context or workload.context
    model, waveforms = _shared(workload, context), workload.waveforms()

    def base() -> tuple[Tensor, tuple[int, ...]]:
        found = model.encode_base(ClipFeatures(AudioBatch.from_waveforms(waveforms), context))
        if context == "window":
            return found.rows.view(len(waveforms), -1, found.rows.shape[1]), found.lengths
        return nn.utils.rnn.pad_sequence(found.rows.split(found.lengths), batch_first=True), found.lengths

    graph = model.mixture.capture(len(waveforms), max(map(len, waveforms)), base()[0].shape[1])

    def run() -> Outputs:
        rows, lengths = base()
        out = graph(rows, waveforms, lengths)
        return [[tokens] for tokens in out.tokens.split(out.lengths)]

    return run


def base_alone(workload: Workload, context: Context | None = None) -> Run:
    context = context or workload.context
    model, waveforms = _shared(workload, context), workload.waveforms()

    def run() -> Outputs:
        base = model.encode_base(ClipFeatures(AudioBatch.from_waveforms(waveforms), context))
        return [[base.rows[start : start + n]] for start, n in zip(base.starts.tolist(), base.lengths, strict=True)]

    return run


@dataclass(frozen=True)
class Parts:
    """A model's parts as one would have them without this library: encoders of transformers, and torch's own layers.

    layers: weight [N, K, 3] and bias [N] of every convolution of the projector, the first over base and slots joined.
    """

    base: nn.Module
    encoders: list[nn.Module]
    router: nn.Linear
    slots: int
    layers: list[tuple[Tensor, Tensor]]
    linear: nn.Linear

    @classmethod
    def of(cls, model: MoweModel) -> Parts:
        """Raises ValueError for a pool of several families."""
        pool, projector = model.mixture.pool, model.multi_modal_projector
        if len(pool.families) != 1:
            raise ValueError("the mixture without this library is written for a pool of one family")
        first = torch.cat((projector.base_weight, *projector.slot_weights[0]), dim=-1).mT
        return cls(
            model.audio_tower.to_transformers(0),
            [pool.to_transformers(e) for e in range(pool.num_encoders)],
            model.mixture.router.dependent,
            model.config.num_dependent_slots,
            [(first, projector.bias)] + [(conv.weight[0].mT, conv.bias[0]) for conv in projector.convs],
            projector.linear,
        )

    def route(self, rows: Tensor) -> tuple[Tensor, list[int]]:
        """Weight and encoder of each slot of a clip, from its base features [T, D]."""
        weights, chosen = self.router(rows.mean(0)).softmax(-1).topk(self.slots)
        return weights, chosen.tolist()

    def project(self, rows: Tensor, weights: Tensor, slots: list[Tensor]) -> Tensor:
        """Base features [T, D] and those of the slots -> tokens of one clip."""
        h = torch.cat((rows, *(w * features for w, features in zip(weights, slots, strict=True))), dim=1).T[None]
        for weight, bias in self.layers:
            h = nn.functional.gelu(nn.functional.conv1d(h, weight, bias, stride=2, padding=1))
        return self.linear(h[0].T)


def naive(workload: Workload) -> Run:
    model, waveforms = _shared(workload, "window"), workload.waveforms()
    parts = Parts.of(model)
    of_base, of_pool = extractors([parts.base, parts.encoders[0]])
    alike = kind(parts.base) == kind(parts.encoders[0])

    def clip(wave: Tensor) -> Tensor:
        for_base = of_base(wave)
        for_pool = for_base if alike else of_pool(wave)
        frames = model.audio_tower.level_lengths(len(wave), "valid")[-1]
        rows = parts.base(for_base).last_hidden_state[0, :frames]
        weights, chosen = parts.route(rows)
        slots = [parts.encoders[e](for_pool).last_hidden_state[0, :frames] for e in chosen]
        return parts.project(rows, weights, slots)

    return lambda: [[clip(wave)] for wave in waveforms]


WHOLE = {
    "naive": Provider(naive, "window", "transformers and torch, clip by clip, each padded to 30 s", "mixture"),
    "mixture": Provider(mixture, None, "base encoder and mixture, packed", "mixture"),
    "captured": Provider(
        captured,
        None,
        "base encoder packed, the mixture as a CUDA graph",
        "mixture",
        missing=lambda: None if torch.cuda.is_available() else "needs a CUDA GPU",
    ),
    "base_alone": Provider(base_alone, None, "the base encoder alone, packed", None),
}


def assembled(workload: Workload, context: Context) -> MoweModel:
    """Base, routers, pool and projector with random weights, and a language model of which only the width matters."""
    encoders = workload.encoders()
    torch.manual_seed(1)
    llm = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=_LLM_WIDTH,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            vocab_size=8,
        )
    ).to(workload.device, workload.torch_dtype)
    model = MoweForConditionalGeneration.from_parts(
        workload.base(),
        EncoderPool.from_encoders(encoders, context=context),
        llm,
        audio_token_id=7,
        context=context,
        num_independent_slots=0,
        num_dependent_slots=workload.top_k,
    )
    return model.model.eval()


# One copy for all who leave it as it is.
_shared = lru_cache(maxsize=2)(assembled)


def padded(waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[B, S] zero-padded waveforms and the mask of real samples, as the processor makes them."""
    lengths = torch.tensor([len(wave) for wave in waveforms])
    padded = nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths.to(padded.device)[:, None]
