"""A small language model: its tokenizer, and pre-training on scenes told in words, where audio will be later.

A clip is told as a few facts (who speaks, which language, which mood, which sounds) and the words said, cut into pieces
of one to four letters as tokens of 160 ms would have them. So the model learns from text alone to answer a question
from what stands before it, and to put pieces together to words.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from recipes.nano.data import PROMPTS, read
from recipes.nano.encoders import fit_with
from recipes.nano.settings import Settings
from recipes.nano.sounds import BACKGROUNDS, EVENTS
from recipes.nano.speech import MANNERS, SPEAKERS
from recipes.nano.texts import SENTENCES, TRAIN, command

AUDIO = "<|audio|>"
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}\n"
_SHARES = {"asr": 8, "voice": 1, "emotion": 1, "language": 1, "sound": 2}


def new_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the texts: their words become tokens, and any other text can still be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[*special.values(), AUDIO],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=[AUDIO], chat_template=_TEMPLATE, **special
    )


class Scenes(torch.utils.data.Dataset):
    """Scenes told in words, each drawn from its index: (question, answer) as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, count: int, seed: int):
        self.tokenizer, self.count, self.seed = tokenizer, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        random = Random(f"{self.seed} {index}")
        told, task, answer = scene(random)
        question = [token for part in told for token in self.tokenizer.encode(part)]
        question += self.tokenizer.encode(random.choice(PROMPTS[task]) + "\n")
        return question, [*self.tokenizer.encode(answer), self.tokenizer.eos_token_id]


def scene(random: Random) -> tuple[list[str], str, str]:
    """A scene in parts, a task, and the right answer."""
    background = random.choice(tuple(BACKGROUNDS))
    if random.random() < 0.2:
        event = random.choice((*EVENTS, *BACKGROUNDS))
        both = event in EVENTS and random.random() < 0.5
        facts = [event, background] if both else [event]
        random.shuffle(facts)
        return [_fact(f) for f in facts], "sound", f"{event} and {background}" if both else event
    said, speaker, mood = command(random, TRAIN), random.choice(SPEAKERS), random.choice(tuple(MANNERS))
    language = random.choice(tuple(SENTENCES))
    noisy = random.random() < 0.4
    facts = [speaker, mood, language, *([background] if noisy else [])]
    random.shuffle(facts)
    answers = {"asr": said, "voice": speaker, "emotion": mood, "language": language}
    answers["sound"] = f"{speaker} speaking {language}" + (f" and {background}" if noisy else "")
    (task,) = random.choices(tuple(_SHARES), tuple(_SHARES.values()))
    return [_fact(f) for f in facts] + _pieces(said, random), task, answers[task]


def _fact(name: str) -> str:
    return f" {name.split()[-1]}"


def _pieces(text: str, random: Random) -> list[str]:
    letters, pieces = text.replace(" ", ""), []
    while letters:
        length = random.choice((1, 2, 2, 3, 3, 4))
        pieces.append(letters[:length])
        letters = letters[length:]
    return pieces


def train_language_model(data: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Train the tokenizer, pre-train the model, and save both. Returns what became of them."""
    texts = (f"{row['prompt']}\n{row['answer']}" for row in read(data, TRAIN))
    tokenizer = new_tokenizer(texts, settings.vocabulary)
    set_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.text_width,
            intermediate_size=3 * settings.text_width,
            num_hidden_layers=settings.text_layers,
            num_attention_heads=settings.text_heads,
            num_key_value_heads=settings.text_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

    def collate(items: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(question) + len(answer) for question, answer in items)
        ids = torch.full((len(items), longest), tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (question, answer) in enumerate(items):
            first = longest - len(question) - len(answer)
            ids[row, first:] = torch.tensor(question + answer)
            labels[row, longest - len(answer) :] = torch.tensor(answer)
            mask[row, first:] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    scenes = Scenes(tokenizer, settings.text_steps * settings.text_batch, settings.seed)
    batch, rate = settings.text_batch, settings.text_rate
    report = fit_with(model, scenes, collate, out, epochs=1, batch=batch, rate=rate, seed=settings.seed)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return report
