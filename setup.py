"""Builds the optional compiled libraries; everything else about the package is in pyproject.toml.

They use torch's stable ABI alone: one binary for every torch from 2.11 on, CUDA or not. They need torch at build time,
so install with `--no-build-isolation`; without torch or a compiler the package is installed without them, and the plain
torch path runs. The one for NVIDIA GPUs is built where torch is a CUDA build and nvcc is found, or where $NVCC names it
(empty: never); no GPU is needed for that.
"""

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

ARCHITECTURES = (80, 90, 100)  # a binary serves all GPUs of its major version, PTX of the last those that come after
# Without fused multiply-adds: the bits are those of bitsandbytes. GCC warns of its own headers for AVX-512.
FLAGS = "-std=c++17 -O3 -fno-math-errno -ffp-contract=off -fvisibility=hidden -Wno-maybe-uninitialized"
MACROS = [("TORCH_TARGET_VERSION", "0x020b000000000000")]


class SharedLibrary(build_ext):
    """A library that torch loads, not a Python module: one name for all Python versions."""

    def get_ext_filename(self, name):
        return name.replace(".", "/") + ".so"

    def build_extension(self, ext):
        if not ext.sources[0].endswith(".cu"):
            return super().build_extension(ext)
        target = Path(self.get_ext_fullpath(ext.name))
        if not (self.force or newer_group([*ext.sources, *ext.depends], target)):
            return None
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run([*nvcc_command(ext), "-o", target], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(str(error)) from None


def nvcc(torch_root):
    """The compiler for GPUs, where it is wanted."""
    has_cuda = (torch_root / "lib" / "libtorch_cuda.so").exists()
    return os.environ.get("NVCC", shutil.which("nvcc") if has_cuda else None)


def nvcc_command(ext):
    """Compiles and links for those of our architectures that this nvcc knows."""
    compiler = nvcc(Path(ext.library_dirs[0]).parent)
    listed = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = [number for number in ARCHITECTURES if f"compute_{number}" in listed]
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
    targets.append(f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}")
    macros = [f"-D{name}={value}" for name, value in ext.define_macros]
    paths = [f"-I{ext.include_dirs[0]}", f"-L{ext.library_dirs[0]}"]
    # What a CUDA build of torch has beside a CPU build is found through libtorch, which is therefore always linked.
    libraries = ["-Xlinker", "--no-as-needed", *(f"-l{name}" for name in ext.libraries)]
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return [compiler, "-shared", "-std=c++17", "-O3", *host, *macros, *targets, *paths, *ext.sources, *libraries]


def extensions():
    torch = find_spec("torch")  # not imported: its own dependencies may still be missing
    if torch is None:
        print("torch is not installed here: the compiled libraries are left out")
        return []
    root = Path(torch.origin).parent
    with_torch = {
        "include_dirs": [str(root / "include")],
        "library_dirs": [str(root / "lib")],
        "libraries": ["torch", "torch_cpu", "c10"],
        "optional": True,
    }
    libraries = [
        Extension(
            "mowe_kernels._csrc",
            sources=["csrc/launch.cpp", "csrc/nf4_cpu.cpp", "csrc/plan_cpu.cpp"],
            depends=["csrc/nf4.h", "csrc/scratch.h"],
            define_macros=MACROS,
            extra_compile_args=FLAGS.split(),
            **with_torch,
        )
    ]
    if nvcc(root):
        cuda = Extension(
            "mowe_kernels._csrc_cuda",
            sources=["csrc/nf4_cuda.cu"],
            depends=["csrc/nf4.h"],
            define_macros=[*MACROS, ("USE_CUDA", "1")],
            **with_torch,
        )
        libraries.append(cuda)
    return libraries


setup(ext_modules=extensions(), cmdclass={"build_ext": SharedLibrary})
