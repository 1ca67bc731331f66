"""The whole way, from waveforms to the language model's embeddings: base encoder, routers, pool, projector.

`mixture` is the library's; `naive` is the same mixture as one would write it with transformers, clip by clip, each
padded to 30 s; `base_alone` is the library's base encoder, to see what the mixture adds to it. All slots are
data-dependent, the routers' weights random: which encoders a clip gets is left to them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, WhisperFeatureExtractor

from benchmarks.providers import PROVIDERS, Outputs, Provider, Run
from benchmarks.workloads import Workload
from mowe import EncoderPool, MoweForConditionalGeneration
from mowe.audio import SAMPLING_RATE, AudioBatch
from mowe.families import ClipFeatures, Context
from mowe.modeling_mowe import MoweModel

_LLM_WIDTH = 2048


def mixture(workload: Workload, context: Context | None = None) -> Run:
    model, waveforms = (_model(workload, context or workload.context), workload.waveforms())
    inputs, mask = _padded(waveforms)

    def run() -> Outputs:
        out = model.get_audio_features(inputs, mask).mixture
        return [[tokens] for tokens in out.tokens.split(out.lengths)]

    return run


def base_alone(workload: Workload, context: Context | None = None) -> Run:
    context = context or workload.context
    model, waveforms = _model(workload, context), workload.waveforms()

    def run() -> Outputs:
        base = model.encode_base(ClipFeatures(AudioBatch.from_waveforms(waveforms), context))
        return [[base.rows[start : start + n]] for start, n in zip(base.starts.tolist(), base.lengths, strict=True)]

    return run


def naive(workload: Workload) -> Run:
    model, waveforms = _model(workload, "window"), workload.waveforms()
    config, projector = model.config, model.multi_modal_projector
    pool, router = model.mixture.pool, model.mixture.router
    if len(pool.families) != 1:
        raise ValueError(f"{workload.name}: the naive mixture is written for a pool of one family")
    base = model.audio_tower.to_transformers(0)
    encoders = [pool.to_transformers(e) for e in range(pool.num_encoders)]
    extractors = [WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins) for encoder in (base, encoders[0])]
    first = torch.cat((projector.base_weight, *projector.slot_weights[0]), dim=-1).mT
    layers = [(first, projector.bias)] + [(conv.weight[0].mT, conv.bias[0]) for conv in projector.convs]

    def clip(wave: Tensor) -> Tensor:
        for_base, for_pool = (
            extract(wave.cpu().numpy(), sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features.to(
                workload.device, workload.torch_dtype
            )
            for extract in extractors
        )
        frames = model.audio_tower.level_lengths(len(wave), "valid")[-1]
        rows = base(for_base).last_hidden_state[0, :frames]
        weights, chosen = router.dependent(rows.mean(0)).softmax(-1).topk(config.num_dependent_slots)
        slots = [
            w * encoders[e](for_pool).last_hidden_state[0, :frames]
            for w, e in zip(weights, chosen.tolist(), strict=True)
        ]
        h = torch.cat((rows, *slots), dim=1).T[None]
        for weight, bias in layers:
            h = nn.functional.gelu(nn.functional.conv1d(h, weight, bias, stride=2, padding=1))
        return projector.linear(h[0].T)

    return lambda: [[clip(wave)] for wave in waveforms]


ALL: dict[str, Provider] = PROVIDERS | {
    "naive": Provider(naive, "window", "transformers and torch, clip by clip, each padded to 30 s", "mixture"),
    "mixture": Provider(mixture, None, "base encoder and mixture, packed", "mixture"),
    "base_alone": Provider(base_alone, None, "the base encoder alone, packed", None),
}


def _model(workload: Workload, context: Context) -> MoweModel:
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


def _padded(waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[B, S] zero-padded waveforms and the mask of real samples, as the processor makes them."""
    lengths = torch.tensor([len(wave) for wave in waveforms])
    padded = nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths.to(padded.device)[:, None]
