"""The compiled library: built in a folder of its own, it gives the bits of the plain torch path."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mowe_kernels import csrc, nf4_quantize, use_backend

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

COMPARE = """
import sys, torch
from pathlib import Path
from mowe_kernels import csrc, nf4_dequantize_grouped, nf4_quantize, use_backend
csrc.LIBRARY = Path(sys.argv[1])
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
print("same")
"""


@needs_compiler
def test_library_gives_the_bits_of_plain_torch(tmp_path):
    build = ["setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "tmp"]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True)
    library = tmp_path / "lib" / "mowe_kernels" / "_csrc.so"
    done = subprocess.run([sys.executable, "-c", COMPARE, library], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr


@pytest.mark.parametrize("content", [None, b"not a library"], ids=["absent", "broken"])
def test_without_it_plain_torch_runs_and_says_so_once(monkeypatch, tmp_path, content, recwarn):
    library = tmp_path / "_csrc.so"
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setattr(csrc, "LIBRARY", library)
    csrc.available.cache_clear()
    try:
        weight = torch.randn(2, 8, 9)
        first, _ = nf4_quantize(weight), nf4_quantize(weight)
        with use_backend("reference"):
            assert torch.equal(first.codes, nf4_quantize(weight).codes)
        said = [w for w in recwarn if "runs without its compiled library" in str(w.message)]
        assert len(said) == 1
    finally:
        csrc.available.cache_clear()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
def test_cuda_source_compiles(tmp_path, architecture):
    compile_only = ["nvcc", "-c", "-std=c++17", f"-arch={architecture}", "csrc/nf4_cuda.cu", "-o", tmp_path / "nf4.o"]
    done = subprocess.run(compile_only, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
