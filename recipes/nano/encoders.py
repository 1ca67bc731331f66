"""Pre-training of the encoders: a base that knows speech recognition alone, and weak specialists for the other tasks.

All of it runs in the library's own packed families, so that no clip is padded; what is saved are transformers encoders.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    HubertConfig,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    set_seed,
)

from mowe import EncoderPool
from mowe.audio import AudioBatch, load_audio
from mowe.configuration_mowe import MowePoolConfig
from mowe.families import ClipFeatures, EncoderFamily
from mowe.families.whisper import WhisperFamily
from mowe_kernels import PackLayout, PackPlan
from recipes.nano.data import read
from recipes.nano.settings import Settings

LETTERS = "_ abcdefghijklmnopqrstuvwxyz"
"""Of the CTC head; the first is its blank."""

_BINS = 80
_SPECTRUM_SHARE = 4.0

SPECIALISTS = ("voice", "emotion", "language", "sound")
"""The tasks of the weak encoders, in the order of a pool."""

WAVE_SPECIALISTS = SPECIALISTS[:2]
"""Those that are HuBERT encoders in the diverse pool."""


class SpeechRecogniser(nn.Module):
    """An encoder family of one and a CTC head over letters."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        self.family = WhisperFamily([config])
        self.family.reset_parameters()
        self.head = nn.Linear(config.d_model, len(LETTERS))
        self.layout = PackLayout.build([0], [self.family.num_levels], torch.device("cpu"))

    def forward(self, waves: list[Tensor], answers: list[str], return_loss: bool = True) -> dict[str, Any]:
        """Clips and their texts. loss: CTC a letter. logits: [frames, letters] of each clip."""
        device = self.head.weight.device
        features = ClipFeatures(AudioBatch.from_waveforms(waves, device), "valid")
        if self.training:
            mask_stripes(*features.log_mel(self.family.num_mel_bins))
        lengths = self.family.lengths(features)
        if self.layout.rank.device != device:
            self.layout = PackLayout.build([0], [self.family.num_levels], device)
        plan = PackPlan.build(torch.zeros(len(waves), 1, dtype=torch.long, device=device), lengths, self.layout)
        logits = self.head(self.family(features, plan.family(0))).split(lengths[-1])
        targets = [torch.tensor([LETTERS.index(letter) for letter in answer]) for answer in answers]
        loss = nn.functional.ctc_loss(
            nn.utils.rnn.pad_sequence(logits).log_softmax(-1),
            torch.cat(targets).to(device),
            torch.tensor(lengths[-1]),
            torch.tensor([len(target) for target in targets]),
            zero_infinity=True,
        )
        return {"loss": loss, "logits": logits}

    def transcripts(self, waves: list[Tensor]) -> list[str]:
        """The likeliest letter of every frame, repeats and blanks left out."""
        best = [clip.argmax(-1).unique_consecutive().tolist() for clip in self(waves, [""] * len(waves))["logits"]]
        return ["".join(LETTERS[letter] for letter in clip if letter).strip() for clip in best]


def mask_stripes(mel: Tensor, starts: Tensor, stripes: int = 2, frames: int = 12, bins: int = 12) -> None:
    """SpecAugment, in place: blank stripes over time and over the mel bins of each clip of packed log-mel rows."""
    clips = mel.tensor_split(starts[1:].tolist())
    for clip in clips:
        for _ in range(stripes):
            wide, high = (int(torch.randint(most + 1, ())) for most in (frames, bins))
            first = int(torch.randint(max(1, len(clip) - wide), ()))
            lowest = int(torch.randint(clip.shape[1] - high, ()))
            clip[first : first + wide] = 0
            clip[:, lowest : lowest + high] = 0


class Specialists(nn.Module):
    """A pool whose encoders each learn a task of their own, each from its own clips.

    labels: of each task, in the order of the pool. A clip may have several of them (a bell in the rain has two); it
    counts as right when all of them and no others are found. Wave encoders also learn to tell the log-mel spectrum of
    every frame: from a label a clip alone, convolutions over samples learn several times slower.
    """

    def __init__(self, pool: EncoderPool, labels: dict[str, list[str]]):
        super().__init__()
        self.pool, self.labels, self.tasks = pool, labels, list(labels)
        widths = {member: pool.widths[f] for f, members in enumerate(pool.members) for member in members}
        self.hears_waves = [config.model_type == "hubert" for config in pool.config.encoder_configs()]
        self.spectrum = nn.Linear(widths[0], _BINS)
        self.heads = nn.ModuleList(nn.Linear(widths[i], len(found)) for i, found in enumerate(labels.values()))

    def forward(
        self, waves: list[Tensor], tasks: list[str], answers: list[str], return_loss: bool = True
    ) -> dict[str, Any]:
        """Clips, each with its task and answer. right: whether each clip's labels were found."""
        device = self.heads[0].weight.device
        features = ClipFeatures(AudioBatch.from_waveforms(waves, device), self.pool.config.context)
        chosen = torch.tensor([[self.tasks.index(task)] for task in tasks], device=device)
        plan = PackPlan.build(chosen, self.pool.lengths(features), self.pool.layout(device))
        output = self.pool(features, plan)
        mel, starts = features.log_mel(_BINS)
        spectra = mel.tensor_split(starts[1:].tolist())
        losses, right = [], []
        for clip, (task, answer) in enumerate(zip(tasks, answers, strict=True)):
            place = self.tasks.index(task)
            frames = output.pair(clip, 0)
            scores = self.heads[place](frames.mean(0))
            wanted = torch.tensor([label in parts_of(task, answer) for label in self.labels[task]], device=device)
            if task == "sound":
                loss = nn.functional.binary_cross_entropy_with_logits(scores, wanted.float(), reduction="sum")
                found = scores > 0
            else:
                loss = nn.functional.cross_entropy(scores, wanted.float())
                found = scores == scores.max()
            losses.append(loss)
            right.append(bool((found == wanted).all()))
            if self.hears_waves[place]:
                spectrum = spectra[clip][: 2 * len(frames)].view(len(frames), 2, _BINS).mean(1)
                losses[-1] = losses[-1] + _SPECTRUM_SHARE * (self.spectrum(frames) - spectrum).square().mean()
        return {"loss": torch.stack(losses).mean(), "right": right}


def parts_of(task: str, answer: str) -> list[str]:
    """What a specialist should find in a clip with this answer; whose speech it is, the sound specialist need not."""
    if task != "sound":
        return [answer]
    return ["speech" if " speaking " in part else part for part in answer.split(" and ")]


def whisper(width: int, heads: int, layers: int) -> WhisperConfig:
    return WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        num_mel_bins=_BINS,
    )


def hubert(settings: Settings) -> HubertConfig:
    """HuBERT with three convolutions instead of seven, 50 frames a second as ever."""
    return HubertConfig(
        hidden_size=settings.weak_width,
        num_hidden_layers=settings.weak_layers,
        num_attention_heads=settings.weak_heads,
        intermediate_size=4 * settings.weak_width,
        conv_dim=[32] * 3,
        conv_kernel=[32, 10, 8],
        conv_stride=[16, 5, 4],
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        mask_time_prob=0.0,
    )


def new_pool(configs: Sequence[WhisperConfig | HubertConfig]) -> EncoderPool:
    """An untrained pool."""
    entries = [{"config": config, "do_normalize": config.model_type == "hubert"} for config in configs]
    pool = EncoderPool(MowePoolConfig(encoders=entries, context="valid"))
    for module in pool.modules():
        if isinstance(module, EncoderFamily):
            module.reset_parameters()
    return pool


def train_base(data: Path, out: Path, width: int, heads: int, settings: Settings) -> dict[str, Any]:
    """Pre-train a base encoder on speech recognition and save it. Returns what became of it."""
    set_seed(settings.seed)
    model = SpeechRecogniser(whisper(width, heads, settings.base_layers))
    report = fit(model, read(data, "train", ["asr"]), out, settings.base_epochs, settings.base_batch, settings)
    model.eval()
    import jiwer

    rows = read(data, "validation", ["asr"])
    with torch.inference_mode():
        said = [text for clips in _in_batches(rows) for text in model.transcripts(_waves(clips))]
    report["validation_wer"] = jiwer.wer([row["answer"] for row in rows], [text or "-" for text in said])
    save_encoder(model.family.to_transformers(0), out)
    return report


def train_specialists(
    data: Path, out: Path, config: WhisperConfig | HubertConfig, tasks: Sequence[str], epochs: int, settings: Settings
) -> dict[str, Any]:
    """Pre-train a weak encoder for each task and save it in a folder of its own. Returns what became of them."""
    set_seed(settings.seed)
    rows = read(data, "train", tasks)
    labels = {
        task: sorted({part for row in rows if row["task"] == task for part in parts_of(task, row["answer"])})
        for task in tasks
    }
    model = Specialists(new_pool([config] * len(tasks)), labels)
    report = fit(model, rows, out, epochs, settings.weak_batch, settings)
    model.eval()
    right: dict[str, list[bool]] = {task: [] for task in tasks}
    with torch.inference_mode():
        for clips in _in_batches(read(data, "validation", tasks)):
            asked, answers = ([row[key] for row in clips] for key in ("task", "answer"))
            for task, is_right in zip(asked, model(_waves(clips), asked, answers)["right"], strict=True):
                right[task].append(is_right)
    report["validation_accuracy"] = {task: sum(found) / len(found) for task, found in right.items()}
    for place, task in enumerate(tasks):
        save_encoder(model.pool.to_transformers(place), out / task)
    return report


def save_encoder(encoder: Any, folder: Path) -> None:
    """As transformers does, with what prepares its input."""
    encoder.save_pretrained(folder)
    wave = encoder.config.model_type == "hubert"
    (Wav2Vec2FeatureExtractor(do_normalize=True) if wave else WhisperFeatureExtractor()).save_pretrained(folder)


class Clips(torch.utils.data.Dataset):
    """Rows of a manifest with their waves, decoded once."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows, self.waves = rows, _waves(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], Tensor]:
        return self.rows[index], self.waves[index]


def _waves(rows: Sequence[dict[str, Any]]) -> list[Tensor]:
    return [load_audio(row["audio"]) for row in rows]


def _in_batches(rows: Sequence[dict[str, Any]], size: int = 20) -> list[Sequence[dict[str, Any]]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def fit(
    model: nn.Module, rows: Sequence[dict[str, Any]], out: Path, epochs: int, batch: int, settings: Settings
) -> dict[str, Any]:
    """Train on the clips of these rows."""

    def collate(items: Sequence[tuple[dict[str, Any], Tensor]]) -> dict[str, Any]:
        batch = {"waves": [wave for _, wave in items], "answers": [row["answer"] for row, _ in items]}
        return batch | ({"tasks": [row["task"] for row, _ in items]} if isinstance(model, Specialists) else {})

    rate, seed = settings.encoder_rate, settings.seed
    return fit_with(model, Clips(rows), collate, out, epochs=epochs, batch=batch, rate=rate, seed=seed)


def fit_with(
    model: nn.Module, dataset: Any, collate: Any, out: Path, *, epochs: float, batch: int, rate: float, seed: int
) -> dict[str, Any]:
    """Train with transformers' Trainer. Returns parameters, losses and time."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out),
            num_train_epochs=epochs,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            warmup_steps=0.05,
            lr_scheduler_type="cosine",
            adam_beta2=0.98,
            weight_decay=0.01,
            seed=seed,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            dataloader_drop_last=True,
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        data_collator=collate,
    )
    trainer.remove_callback(PrinterCallback)
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }
