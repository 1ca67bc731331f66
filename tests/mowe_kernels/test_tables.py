from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mowe_kernels import tables
from mowe_kernels.tables import AttentionChoice, DeviceTable
from mowe_kernels.triton import grouped_mlp
from mowe_kernels.triton import varlen_attention as attention
from mowe_kernels.triton._launch import ARCHITECTURES, override
from mowe_kernels.triton.grouped_linear import Tile, gemm_tile
from tests.mowe_kernels.checks import raises

CHOICES = (
    AttentionChoice(64, 256, False, "kernel", "kernel"),
    AttentionChoice(64, None, False, "torch", "kernel"),
    AttentionChoice(64, None, True, "dense", "torch"),
)
TABLE = DeviceTable("Some GPU 80GB", ("route_topk",), {"gemm_tile, 16 bits, many blocks": [64, 32, 32, 4, 2]}, CHOICES)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mowe_kernels"


def test_a_table_is_read_as_it_was_written(cache):
    assert tables.of_name(TABLE.device) is None
    assert TABLE.write(tables.user_folder()) == cache / "some-gpu-80gb.json"
    assert tables.of_name(TABLE.device) == TABLE
    assert tables.of_name("Another GPU") is None


def test_the_users_table_goes_before_that_of_the_package(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "PACKAGED", tmp_path / "packaged")
    packaged = DeviceTable(TABLE.device, ())
    packaged.write(tables.PACKAGED)
    assert tables.of_name(TABLE.device) == packaged
    TABLE.write(cache)
    assert tables.of_name(TABLE.device) == TABLE


def test_a_device_without_a_table_has_that_of_its_kind(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Another GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    replace(TABLE, capability=80).write(tables.PACKAGED)
    alike = DeviceTable("One more GPU", (), capability=90)
    alike.write(tables.PACKAGED)
    DeviceTable("The user's GPU", (), capability=91).write(cache)
    found = tables.of_device.__wrapped__
    assert (found(0), found(1)) == (alike, None)
    own = DeviceTable("Another GPU", ("route_topk",), capability=90)
    own.write(cache)
    assert found(0) == own


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"device": "x", "ops": [], "attention": [{}]}', '{"attention": 1}'])
def test_a_file_that_is_no_table(cache, text):
    cache.mkdir()
    path = cache / tables.file_name(TABLE.device)
    path.write_text(text)
    with raises(str(path), "expected a table of device, ops", "make it anew"):
        tables.of_name(TABLE.device)


@pytest.mark.parametrize("path", sorted(tables.PACKAGED.glob("*.json")), ids=lambda path: path.stem)
def test_packaged_tables(path):
    table = tables.read(path)
    assert path.name == tables.file_name(table.device)
    assert {"torch", "triton", "driver"} <= table.made_with.keys()
    assert table.capability
    assert json.loads(path.read_text())["ops"]


@pytest.mark.parametrize(
    ("case", "forward"),
    [((64, 256, False), "kernel"), ((64, 257, False), "torch"), ((64, 10, True), "dense"), ((80, 10, False), None)],
)
def test_choice_of_attention(case, forward):
    choice = TABLE.attention_of(*case)
    assert (choice and choice.forward) == forward


def test_equal_lengths_without_a_choice_of_their_own_are_lengths_like_others():
    table = DeviceTable("x", (), {}, CHOICES[:2])
    assert table.attention_of(64, 1500, True) == CHOICES[1]


def test_settings_of_a_table_go_before_those_of_the_op():
    plain = ARCHITECTURES[90]
    tuned = plain._replace(tuned=TABLE.settings)
    assert gemm_tile(tuned, torch.bfloat16, 100_000, 384, 1536) == Tile(64, 32, 32, 4, 2)
    assert gemm_tile(tuned, torch.bfloat16, 10, 16, 16) == gemm_tile(plain, torch.bfloat16, 10, 16, 16)
    assert gemm_tile(tuned, torch.float32, 100_000, 384, 1536) == gemm_tile(plain, torch.float32, 100_000, 384, 1536)
    assert gemm_tile(tuned, torch.bfloat16, 100_000, 384, 384) == gemm_tile(plain, torch.bfloat16, 100_000, 384, 384)
    with override(gemm_tile=Tile(16, 16, 16, 4, 2)):
        assert gemm_tile(tuned, torch.bfloat16, 100_000, 384, 1536) == Tile(16, 16, 16, 4, 2)


def test_settings_of_another_version():
    tuned = ARCHITECTURES[90]._replace(tuned={"gemm_tile, 16 bits, many blocks": [64, 32, 32, 4]})
    with raises("gemm_tile", "16 bits, many blocks", "[64, 32, 32, 4]", "mowe_kernels.tune"):
        gemm_tile(tuned, torch.bfloat16, 100_000, 384, 1536)


def test_a_table_may_say_that_a_kernel_is_not_worth_it_or_is():
    rows = torch.bfloat16, 512
    key = "mlp_block, 16 bits, width 512"
    for capability, measured in ((90, None), (100, [64, 32, 128, 8, 2])):
        hardware = ARCHITECTURES[capability]
        chosen = grouped_mlp.fused_block(hardware._replace(tuned={key: measured}), *rows)
        assert chosen == (measured and grouped_mlp.Block(*measured)) != grouped_mlp.fused_block(hardware, *rows)


def test_settings_of_attention():
    key = "attention_forward, 16 bits, heads of 64"
    tuned = ARCHITECTURES[90]._replace(tuned={key: [64, 64, 4, 2]})
    assert attention.choose("forward", torch.float16, 64, tuned) == attention.Settings(64, 64, 4, 2)


def test_the_cpu_has_none():
    """Kernels in Triton's interpreter ask for it."""
    assert tables.of_device(torch.device("cpu").index) is None
