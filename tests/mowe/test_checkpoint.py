"""Encoders from folders that transformers wrote, whole and damaged."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    HubertForCTC,
    HubertForSequenceClassification,
    HubertModel,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mowe import CheckpointError, ConfigError, EncoderPool
from mowe.families import find_encoder
from tests.mowe.encoders import LARGE, alone, assert_same, clip, hubert, randomized, wav2vec2, whisper

MODELS = {
    WhisperModel: whisper,
    WhisperForConditionalGeneration: whisper,
    WhisperForAudioClassification: whisper,
    WhisperEncoder: whisper,
    HubertModel: hubert,
    HubertForSequenceClassification: hubert,
    HubertForCTC: hubert,
    Wav2Vec2Model: wav2vec2,
    Wav2Vec2ForCTC: wav2vec2,
}
WAVE = clip(6_000)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[type], Path]:
    """The folder that a model of a class was saved to."""
    root = tmp_path_factory.mktemp("checkpoints")
    for model_class, make in MODELS.items():
        randomized(model_class(make().config), 1).save_pretrained(root / model_class.__name__)
    return lambda model_class: root / model_class.__name__


@pytest.fixture
def copy(saved, tmp_path) -> Callable[[type], Path]:
    """A folder of the test's own."""
    return lambda model_class: Path(shutil.copytree(saved(model_class), tmp_path / "checkpoint"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def reconfigure(folder: Path, **settings: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def assert_loads(folder: Path, model_class: type, do_normalize: bool = False) -> None:
    """The folder gives the encoder that transformers finds in it."""
    expected = find_encoder(model_class.from_pretrained(folder)).eval()
    pool = EncoderPool.from_pretrained([folder])
    with torch.no_grad():
        out = pool.encode([WAVE], [[0]], "valid").pair(0, 0)
        assert_same(out, alone(expected, WAVE, "valid", do_normalize))


def assert_refused(folder: Path, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=rf"{folder.name}: .*{told}") as raised:
        EncoderPool.from_pretrained([folder])
    assert str(raised.value).startswith(str(folder)) and "\n" not in str(raised.value)


@pytest.mark.parametrize("model_class", MODELS)
def test_the_encoder_inside_is_found(saved, model_class):
    assert_loads(saved(model_class), model_class)


def test_folders_of_every_kind_make_one_pool(saved):
    sources = [saved(model_class) for model_class in MODELS]
    pool = EncoderPool.from_pretrained([sources[0], *map(str, sources[1:])], context="valid")
    assert pool.config.context == "valid"
    assert pool.members == ((0, 1, 2, 3), (4, 5, 6), (7, 8))
    assert not any(module.training for module in pool.modules())
    assert all(parameter.dtype == torch.float32 for parameter in pool.parameters())


def test_half_precision_checkpoints_load_in_single_precision(tmp_path):
    model = hubert().bfloat16()
    model.save_pretrained(tmp_path)
    pool = EncoderPool.from_pretrained([tmp_path])
    assert pool.families[0].dtype == torch.float32
    with torch.no_grad():
        assert_same(pool.encode([WAVE], [[0]]).pair(0, 0), alone(model.float(), WAVE))


def test_sharded_checkpoints(tmp_path):
    whisper(3).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_loads(tmp_path, WhisperModel)


@pytest.mark.parametrize("model_class", [HubertModel, HubertForCTC, Wav2Vec2ForCTC])
def test_the_names_older_checkpoints_use(copy, model_class):
    folder = copy(model_class)
    expected = find_encoder(model_class.from_pretrained(folder)).eval()
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}

    def rename(name: str) -> str:
        for new_name, old_name in old.items():
            name = name.replace(new_name, old_name)
        return name

    rewrite(folder, lambda state: {rename(name): value for name, value in state.items()})
    with torch.no_grad():
        out = EncoderPool.from_pretrained([folder]).encode([WAVE], [[0]])
        assert_same(out.pair(0, 0), alone(expected, WAVE))


def test_a_lost_training_mask_is_no_loss(copy):
    folder = copy(Wav2Vec2ForCTC)
    rewrite(folder, lambda state: {k: v for k, v in state.items() if "masked_spec_embed" not in k})
    assert_loads(folder, Wav2Vec2ForCTC)


@pytest.mark.parametrize("architectures", [None, ["HubertForSpeechClassification"], ["pipeline"], ["BertModel"]])
def test_the_encoder_of_a_model_that_transformers_does_not_have(copy, architectures):
    folder = copy(HubertForCTC)
    expected = find_encoder(HubertForCTC.from_pretrained(folder)).eval()
    reconfigure(folder, architectures=architectures)
    with torch.no_grad():
        out = EncoderPool.from_pretrained([folder]).encode([WAVE], [[0]])
        assert_same(out.pair(0, 0), alone(expected, WAVE))
    rewrite(folder, lambda state: {**state, "hubert.encoder.layers.9.layer_norm.bias": torch.zeros(24)})
    assert_refused(folder, CheckpointError, r"surplus keys of the encoder: hubert\.encoder\.layers\.9\.")


@pytest.mark.parametrize("do_normalize", [True, False])
def test_the_preprocessor_decides_the_normalisation(copy, do_normalize):
    folder = copy(Wav2Vec2Model)
    Wav2Vec2FeatureExtractor(do_normalize=do_normalize).save_pretrained(folder)
    assert_loads(folder, Wav2Vec2Model, do_normalize)


def test_a_preprocessor_within_a_processor(copy):
    folder = copy(HubertForCTC)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    nested = {"processor_class": "Wav2Vec2Processor", "feature_extractor": extractor.to_dict()}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert_loads(folder, HubertForCTC, do_normalize=True)


def test_whisper_with_its_preprocessor(tmp_path):
    whisper(2, num_mel_bins=128).save_pretrained(tmp_path)
    WhisperFeatureExtractor(feature_size=128).save_pretrained(tmp_path)
    assert_loads(tmp_path, WhisperModel)


@pytest.mark.parametrize(
    ("model_class", "key"),
    [
        (WhisperForConditionalGeneration, "model.encoder.layers.1.fc2.bias"),
        (WhisperEncoder, "conv1.weight"),
        (HubertModel, "encoder.pos_conv_embed.conv.bias"),
        (Wav2Vec2ForCTC, "wav2vec2.feature_extractor.conv_layers.0.layer_norm.weight"),
    ],
)
def test_missing_surplus_and_misshapen_keys(copy, model_class, key):
    folder = copy(model_class)
    whole = load_file(folder / "model.safetensors")
    rewrite(folder, lambda state: {k: v for k, v in state.items() if k != key})
    assert_refused(folder, CheckpointError, f"missing keys of the encoder: {key}")
    rewrite(folder, lambda state: {**whole, key.replace("conv", "convolution") + ".more": torch.zeros(2)})
    assert_refused(folder, CheckpointError, "surplus keys of the encoder: ")
    rewrite(folder, lambda state: {**whole, key: torch.zeros(2)})
    assert_refused(folder, CheckpointError, f"misshapen keys of the encoder: {key}")


def test_what_is_not_the_encoder_does_not_matter(copy):
    folder = copy(WhisperForConditionalGeneration)
    rewrite(folder, lambda state: {k: v for k, v in state.items() if "decoder.layers" not in k})
    assert_loads(folder, WhisperForConditionalGeneration)


def test_a_configuration_that_says_more_layers(copy):
    folder = copy(HubertModel)
    reconfigure(folder, num_hidden_layers=3)
    assert_refused(folder, CheckpointError, r"missing keys of the encoder: encoder\.layers\.2\..* and 12 more")


def test_transformers_says_nothing_beside_the_error(copy):
    folder = copy(HubertModel)
    reconfigure(folder, num_hidden_layers=3)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.WARNING)  # its default, which another test may have changed
    logger.addHandler(handler)
    try:
        assert_refused(folder, CheckpointError, "missing keys")
        assert not records
        HubertModel.from_pretrained(folder)
        assert any("MISSING" in record.getMessage() for record in records)  # its own report, as loud as before
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-100], lambda data: data[:4], lambda data: b"", lambda data: b"not a checkpoint " * 1_000],
    ids=["truncated", "four bytes", "empty", "garbage"],
)
def test_damaged_parameters(copy, damage):
    folder = copy(HubertForSequenceClassification)
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert_refused(folder, CheckpointError, "cannot read the parameters: ")


def test_no_parameters(copy):
    folder = copy(HubertModel)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")  # a pickle is not read
    assert_refused(folder, CheckpointError, "cannot read the parameters: .*no file named model.safetensors")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot read config.json: "),
        ("[]", "cannot read config.json: "),
        ("{}", "cannot read config.json: .*model_type"),
        ('{"model_type": "nonsense"}', "cannot read config.json: .*nonsense"),
        ('{"model_type": "hubert", "hidden_size": "wide"}', "cannot read config.json: .*'hidden_size' expected int"),
    ],
)
def test_damaged_configurations(copy, text, told):
    folder = copy(HubertModel)
    (folder / "config.json").write_text(text)
    assert_refused(folder, CheckpointError, told)


def test_no_configuration(copy):
    folder = copy(HubertModel)
    (folder / "config.json").unlink()
    assert_refused(folder, CheckpointError, "the folder has no config.json")


def test_no_folder(tmp_path):
    assert_refused(tmp_path / "nowhere", CheckpointError, "no such folder")
    file = tmp_path / "model.safetensors"
    file.touch()
    assert_refused(file, CheckpointError, "no such folder")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("preprocessor_config.json", "{"),
        ("preprocessor_config.json", "[]"),
        ("preprocessor_config.json", '{"feature_extractor_type": "Nonsense"}'),
        ("processor_config.json", "{"),
        ("processor_config.json", "3"),
    ],
)
def test_damaged_preprocessors(copy, name, text):
    folder = copy(HubertModel)
    (folder / name).write_text(text)
    assert_refused(folder, CheckpointError, "cannot read preprocessor_config.json: ")


def test_preprocessors_that_prepare_something_else(copy):
    folder = copy(HubertModel)
    Wav2Vec2FeatureExtractor(sampling_rate=8_000).save_pretrained(folder)
    assert_refused(folder, ConfigError, "takes features of sampling_rate 16000, its feature extractor has 8000")


def test_encoders_that_no_family_can_run(copy, tmp_path):
    folder = copy(HubertModel)
    reconfigure(folder, hidden_act="relu")
    assert_refused(folder, ConfigError, "hidden_act must be 'gelu', got 'relu'")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert_refused(folder, ConfigError, "encoders of type 'bert' are not supported; supported: whisper, ")


def test_large_wave_encoders(tmp_path):
    hubert(5, **LARGE).save_pretrained(tmp_path)
    assert_loads(tmp_path, HubertModel)
