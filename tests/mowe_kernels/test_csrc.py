"""The compiled library: built in a folder of its own, it gives the bits of the plain torch path."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mowe_kernels import backend, csrc, nf4_quantize, use_backend

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

COMPARE = """
import sys, torch
from pathlib import Path
from mowe_kernels import csrc, nf4_dequantize_grouped, nf4_quantize, use_backend
csrc.LIBRARIES["cpu"] = Path(sys.argv[1])
assert csrc.available()
torch.manual_seed(0)
for shape in ((1, 1), (3, 5), (64, 64), (130, 67), (33, 100)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for blocksize in (32, 64, 4096):
            weight = (torch.randn(3, *shape) * torch.rand(3, shape[0], 1)).to(dtype)
            weight[2] = 0
            offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
            for nested in (False, True):
                mine = nf4_quantize(weight, blocksize, nested)
                out = nf4_dequantize_grouped([mine.matrix], offsets, dtype)[0]
                with use_backend("reference"):
                    theirs = nf4_quantize(weight, blocksize, nested)
                    expected = nf4_dequantize_grouped([theirs.matrix], offsets, dtype)[0]
                assert torch.equal(mine.codes, theirs.codes) and torch.equal(mine.absmax, theirs.absmax)
                assert torch.equal(out[[0, 2]], expected[[0, 2]])
for shape in ((64, 64), (33, 101)):  # what is not finite spoils its block, whichever place it has there, and shows
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
            for place in (0, 1, 17, 63, 64 * 40 + 5, -1):
                weight = torch.randn(1, *shape).to(dtype)
                weight.view(-1)[place] = value
                mine = nf4_quantize(weight)
                with use_backend("reference"):
                    theirs = nf4_quantize(weight)
                    expected = theirs.dequantize()
                assert torch.equal(mine.codes, theirs.codes)
                torch.testing.assert_close(mine.absmax, theirs.absmax, rtol=0, atol=0, equal_nan=True)
                torch.testing.assert_close(mine.dequantize(), expected, rtol=0, atol=0, equal_nan=True)
                assert not mine.dequantize().view(-1)[place].isfinite()
for shape in ((1024, 2048), (1023, 2049)):  # so much that it is written past the caches, and not at 64 bytes each
    mine = nf4_quantize(torch.randn(3, *shape))
    with use_backend("reference"):
        expected = mine.dequantize()
    assert torch.equal(mine.dequantize(), expected)
print("same")
"""


SCRATCH = """
import sys, threading, torch
from pathlib import Path
from mowe_kernels import csrc, grouped_linear, nf4_dequantize_grouped, nf4_quantize
csrc.LIBRARIES["cpu"] = Path(sys.argv[1])
assert csrc.available()
offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
weights = [nf4_quantize(torch.randn(2, 96, 96)) for _ in range(3)]
expected = [w.dequantize().clone() for w in weights]

def dequantize(index):
    return nf4_dequantize_grouped([weights[index].matrix], offsets, torch.float32)[0]

first = dequantize(0)
place, row = first.data_ptr(), first[1, :1]
second = dequantize(1)
assert second.data_ptr() != place and torch.equal(first, expected[0])
del first
third = dequantize(2)
assert third.data_ptr() != place and torch.equal(row, expected[0][1, :1]), "a view still sees it"
del row
assert dequantize(0).data_ptr() == place, "the memory is used again"
del second, third

x = torch.randn(7, 96, requires_grad=True)
def run(layers):
    y = x
    for weight in layers:
        y = grouped_linear(y, weight() if callable(weight) else weight, None, offsets)
    return torch.autograd.grad(y.square().sum(), x)[0]
assert torch.equal(run([lambda i=i: dequantize(i) for i in range(3)]), run(expected))

def work(index):
    for _ in range(200):
        if not torch.equal(dequantize(index), expected[index]):
            wrong.append(index)
wrong = []
threads = [threading.Thread(target=work, args=(i % 3,)) for i in range(6)]
[t.start() for t in threads], [t.join() for t in threads]
assert not wrong
print("safe")
"""


def build(folder: Path, **environment: str) -> Path:
    command = ["setup.py", "-q", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "tmp"]
    subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, capture_output=True, env={**os.environ, **environment}
    )
    return folder / "lib" / "mowe_kernels" / "_csrc.so"


def run(script: str, library: Path) -> str:
    done = subprocess.run([sys.executable, "-c", script, library], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("csrc"), NVCC=shutil.which("nvcc") or "")


@needs_compiler
def test_library_gives_the_bits_of_plain_torch(library):
    assert run(COMPARE, library) == "same\n"


@needs_compiler
def test_so_it_does_on_any_processor(tmp_path):
    """Built without what only some processors have, as it is chosen for them when it runs."""
    assert run(COMPARE, build(tmp_path, CFLAGS="-DMOWE_PORTABLE", NVCC="")) == "same\n"


@needs_compiler
def test_scratch_is_used_again_but_never_while_it_is_held(library):
    assert run(SCRATCH, library) == "safe\n"


def undefined(library: Path) -> set[str]:
    table = subprocess.run(["nm", "-D", "-C", "--undefined-only", library], capture_output=True, text=True, check=True)
    return {line.split(maxsplit=1)[1] for line in table.stdout.splitlines()}


def foreign(names: set[str]) -> set[str]:
    """Names of torch's that are not part of its stable ABI."""
    torchs = {name for name in names if re.search("torch|c10|at::|caffe", name)}
    return {name for name in torchs if not name.startswith(("aoti_torch_", "torch_"))}


@needs_compiler
def test_library_needs_the_stable_abi_alone(library):
    """So that it runs with every torch from 2.11 on, whatever it was built with."""
    names = undefined(library)
    assert "torch_library_impl" in names
    assert not foreign(names)


@pytest.mark.parametrize("content", [None, b"not a library"], ids=["absent", "broken"])
def test_without_it_plain_torch_runs_and_says_so_once(monkeypatch, tmp_path, content, recwarn):
    library = tmp_path / "_csrc.so"
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setitem(csrc.LIBRARIES, "cpu", library)
    for cached in (csrc.available, backend.module_name):
        cached.cache_clear()
    try:
        weight = torch.randn(2, 8, 9)
        first, _ = nf4_quantize(weight), nf4_quantize(weight)
        with use_backend("reference"):
            assert torch.equal(first.codes, nf4_quantize(weight).codes)
        said = [w for w in recwarn if "runs without its compiled library" in str(w.message)]
        assert len(said) == 1
    finally:
        for cached in (csrc.available, backend.module_name):
            cached.cache_clear()


def architectures(library: Path) -> tuple[set[int], set[int]]:
    """Of the machine code and of the PTX in a library, read from the headers of its "fat binaries"."""
    data, found, start = library.read_bytes(), {1: set(), 2: set()}, 0
    while (start := data.find(struct.pack("<I", 0xBA55ED50), start)) >= 0:
        header, size = struct.unpack_from("<HQ", data, start + 6)
        start += header
        end = start + size
        while start < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, start)
            found[kind] |= set(struct.unpack_from("<I", data, start + 28))
            start += header + size
    return found[2], found[1]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_library_for_gpus_is_built_without_one(library):
    cuda = library.with_name("_csrc_cuda.so")
    machine_code, ptx = architectures(cuda)
    assert 80 in machine_code and ptx == {max(machine_code)}
    names = undefined(cuda)
    assert "aoti_torch_get_current_cuda_stream" in names
    assert not foreign(names)
