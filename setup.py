"""Builds the optional compiled library; everything else about the package is in pyproject.toml.

It uses torch's stable ABI alone: one binary for every torch from 2.11 on. Needs torch at build time, so install with
`--no-build-isolation`; without torch or a compiler the package is installed without it, and the plain torch path runs.
"""

from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class SharedLibrary(build_ext):
    """A library that torch loads, not a Python module: one name for all Python versions."""

    def get_ext_filename(self, name):
        return name.replace(".", "/") + ".so"


def extensions():
    torch = find_spec("torch")  # not imported: its own dependencies may still be missing
    if torch is None:
        print("torch is not installed here: the compiled library is left out")
        return []
    root = Path(torch.origin).parent
    library = Extension(
        "mowe_kernels._csrc",
        sources=["csrc/cpu.cpp"],
        depends=["csrc/nf4.h"],
        include_dirs=[str(root / "include")],
        library_dirs=[str(root / "lib")],
        libraries=["torch", "torch_cpu", "c10"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        # Without fused multiply-adds: the bits are those of bitsandbytes.
        extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden"],
        optional=True,
    )
    return [library]


setup(ext_modules=extensions(), cmdclass={"build_ext": SharedLibrary})
