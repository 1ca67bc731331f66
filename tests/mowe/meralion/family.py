"""Tiny random checkpoints of the family as its authors write them, and the documented architecture in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM

VOCAB, SPEECH_TOKEN, PAD = 264, 259, 258
FRAMES = 60
SPEECH = {
    "model_type": "meralion2_speech_encoder", "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_layers": 1, "num_mel_bins": 80, "max_source_positions": FRAMES, "vocab_size": 300,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
# Caps low enough to matter, and a window shorter than the prompts.
TEXT = {
    "model_type": "meralion2_text_decoder", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8,
    "query_pre_attn_scalar": 16, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 4.0, "bos_token_id": 256,
    "eos_token_id": [257, 107], "pad_token_id": PAD, "cache_implementation": "hybrid", "torch_dtype": "float32",
}  # fmt: skip
TYPES = ("meralion", "meralion2", "meralion3", "meralion3_asr")


def config_dict(model_type: str, frames: int = FRAMES, **settings: Any) -> dict[str, Any]:
    """A config.json as the authors' are."""
    return {
        "architectures": ["MERaLiON2ForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_meralion2.MERaLiON2Config"},
        "model_type": model_type,
        "head_dim": TEXT["head_dim"],
        "hidden_size": TEXT["hidden_size"],
        "speech_config": {**SPEECH, "max_source_positions": frames},
        "text_config": dict(TEXT),
        "speech_mlp_scale_factor": 15,
        "speech_token_index": SPEECH_TOKEN,
        "torch_dtype": "float32",
        **settings,
    }


def state_dict(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random parameters under the authors' names."""
    generator = torch.Generator().manual_seed(seed)
    speech, text = config["speech_config"], config["text_config"]
    width, ffn, hidden = speech["d_model"], speech["encoder_ffn_dim"], text["hidden_size"]
    factor = (
        config.get("speech_mlp_scale_factor")
        or speech["max_source_positions"] // (config["fixed_speech_embeds_length"])
    )
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    for name, inputs in (("conv1", speech["num_mel_bins"]), ("conv2", width)):
        shapes[f"speech_encoder.{name}.weight"] = (width, inputs, 3)
        shapes[f"speech_encoder.{name}.bias"] = (width,)
    shapes["speech_encoder.embed_positions.weight"] = (speech["max_source_positions"], width)
    for i in range(speech["encoder_layers"]):
        layer = f"speech_encoder.layers.{i}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(f"{layer}.self_attn.{part}", width, width, part != "k_proj")
        linear(f"{layer}.fc1", width, ffn)
        linear(f"{layer}.fc2", ffn, width)
        norm(f"{layer}.self_attn_layer_norm")
        norm(f"{layer}.final_layer_norm")
    norm("speech_encoder.layer_norm")
    norm("ln_speech")
    adapter = "speech_audio_adapter"
    if config["model_type"] == "meralion":
        linear(f"{adapter}.mlp_adapter.0", width * factor, width)
        linear(f"{adapter}.speech_llm_proj.0", width, 4 * width)
        linear(f"{adapter}.speech_llm_proj.3", 4 * width, hidden)
    else:
        linear(f"{adapter}.mlp_adapter.0", width * factor, 5 * width)
        if config.get("speech_mlp_use_projection", True):
            linear(f"{adapter}.gate_proj", 5 * width, 5 * width)
            linear(f"{adapter}.pool_proj", 5 * width, 5 * width)
        linear(f"{adapter}.out_proj", 5 * width, hidden)
    for name, parameter in Gemma2ForCausalLM(Gemma2Config(**_clean(text))).model.named_parameters():
        shapes[f"text_decoder.model.{name}"] = tuple(parameter.shape)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    # Small, or the head, which is the same matrix, would only ever repeat the last token.
    state["text_decoder.model.embed_tokens.weight"] *= 0.1
    return state


def write(
    folder: Path, model_type: str, seed: int = 0, shards: int = 1, frames: int = FRAMES, **settings: Any
) -> dict[str, Tensor]:
    """Write a checkpoint and return its parameters."""
    config = config_dict(model_type, frames, **settings)
    state = state_dict({name: value for name, value in config.items() if value is not None}, seed)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return state
    names, index = sorted(state), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: state[name] for name in names[i::shards]}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names[i::shards], file)
    total = sum(value.nbytes for value in state.values())
    weights = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    return state


def audio_tokens(state: dict[str, Tensor], features: Tensor, heads: int = 2) -> Tensor:
    """[chunks, tokens, H]: encoder, LayerNorm and adapter from the raw parameters."""

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, h: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(name: str, h: Tensor, stride: int) -> Tensor:
        weight, bias = state[f"speech_encoder.{name}.weight"], state[f"speech_encoder.{name}.bias"]
        return F.gelu(F.conv1d(h, weight, bias, stride, 1))

    h = conv("conv2", conv("conv1", features, 1), 2).transpose(1, 2) + state["speech_encoder.embed_positions.weight"]
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("speech_encoder.layers."))
    for i in range(layers):
        layer = f"speech_encoder.layers.{i}"
        x = norm(f"{layer}.self_attn_layer_norm", h)
        q, k, v = (
            linear(f"{layer}.self_attn.{part}", x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("q_proj", "k_proj", "v_proj")
        )
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        h = h + linear(f"{layer}.self_attn.out_proj", (weights @ v).transpose(1, 2).flatten(2))
        h = h + linear(f"{layer}.fc2", F.gelu(linear(f"{layer}.fc1", norm(f"{layer}.final_layer_norm", h))))
    h = norm("ln_speech", norm("speech_encoder.layer_norm", h))
    factor = state["speech_audio_adapter.mlp_adapter.0.weight"].shape[1] // h.shape[-1]
    h = h.reshape(h.shape[0], h.shape[1] // factor, h.shape[2] * factor)
    h = F.silu(linear("speech_audio_adapter.mlp_adapter.0", h))
    if "speech_audio_adapter.speech_llm_proj.0.weight" in state:
        h = F.silu(linear("speech_audio_adapter.speech_llm_proj.0", h))
        return linear("speech_audio_adapter.speech_llm_proj.3", h)
    if "speech_audio_adapter.gate_proj.weight" in state:
        h = F.silu(linear("speech_audio_adapter.gate_proj", h)) * linear("speech_audio_adapter.pool_proj", h)
    return linear("speech_audio_adapter.out_proj", h)


@torch.no_grad()
def logits(
    state: dict[str, Tensor], ids: Tensor, features: Tensor | None, scale_audio: bool = True, attention: str = "eager"
) -> Tensor:
    """[B, T, V]: text and audio embeddings, all multiplied by sqrt(H), through Gemma2."""
    embedding = state["text_decoder.model.embed_tokens.weight"]
    root = embedding.shape[1] ** 0.5
    embeds = embedding[ids] * root
    if features is not None:
        tokens = audio_tokens(state, features).flatten(0, 1)
        embeds[ids == SPEECH_TOKEN] = tokens * root if scale_audio else tokens
    config = Gemma2Config(**_clean(TEXT), attn_implementation=attention)
    decoder = Gemma2ForCausalLM(config).eval()
    decoder.model.load_state_dict(
        {name.removeprefix("text_decoder.model."): v for name, v in state.items() if name.startswith("text_decoder.")}
    )
    decoder.tie_weights()
    return decoder(inputs_embeds=embeds).logits


def _clean(text: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in text.items() if k not in ("model_type", "cache_implementation", "torch_dtype")}
