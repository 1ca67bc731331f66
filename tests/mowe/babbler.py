"""An AudioLLM of random weights: it routes, and babbles on until it is cut."""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    GenerationConfig,
    HubertConfig,
    HubertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mowe.modeling_mowe import MoweForConditionalGeneration
from mowe.pool import EncoderPool
from mowe.processing_mowe import MoweFeatureExtractor, MoweProcessor

AUDIO_TOKEN = "<|audio|>"
_ROUTER_SEED = 6957  # one that sends the bundled clips to all four encoders


def babbler() -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    """The model and its processor, in evaluation mode, the same at every call.

    A Whisper encoder smaller than Whisper-tiny as base; a pool of two Whisper and two HuBERT encoders; one slot of
    each router; the paper's `conv` projector; a Llama of two layers that reads and writes bytes. Clips are encoded on
    their own frames alone ("valid"): there is no pre-training on 30 s windows to be true to.
    """
    tokenizer = _byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # At the usual 0.02 the positions drown the sound, and every clip of one length would be routed alike.
        base = _whisper(width=256, layers=4, init_std=0.2)
        weak: list[nn.Module] = [_whisper(width=128, layers=2), _whisper(width=128, layers=2), _hubert(), _hubert()]
        model = MoweForConditionalGeneration.from_parts(
            base,
            EncoderPool.from_encoders(weak, context="valid"),
            _language_model(tokenizer),
            audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO_TOKEN),
            context="valid",
        )
        torch.manual_seed(_ROUTER_SEED)
        router: Any = model.model.mixture.router
        nn.init.normal_(router.independent_logits)
        nn.init.normal_(router.dependent.weight, std=0.15)
    return model, MoweProcessor(MoweFeatureExtractor.from_config(model.config), tokenizer)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: any text in any language goes in, and nothing has to be learned or downloaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[AUDIO_TOKEN],
    )


def _whisper(width: int, layers: int, init_std: float = 0.02) -> WhisperEncoder:
    return WhisperEncoder(
        WhisperConfig(
            d_model=width,
            encoder_layers=layers,
            encoder_attention_heads=width // 64,
            encoder_ffn_dim=4 * width,
            num_mel_bins=80,
            init_std=init_std,
        )
    ).eval()


def _hubert() -> HubertModel:
    return HubertModel(
        HubertConfig(
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=512,
            conv_dim=[64] * 7,
            num_conv_pos_embeddings=64,
            num_conv_pos_embedding_groups=8,
        )
    ).eval()


def _language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            **special,
        )
    )
    # Random bytes are mostly not text: the model may babble letters only.
    letters = set(tokenizer.convert_tokens_to_ids(list(string.ascii_lowercase + "Ġ")))
    muted = [token for token in range(len(tokenizer)) if token not in letters]
    model.generation_config = GenerationConfig(suppress_tokens=muted, **special)
    return model.eval()
