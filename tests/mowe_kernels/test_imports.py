"""Imports point one way: from what is nearer to the user to what is farther."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Inside mowe a module imports its own level and those above it in this table. A module named nowhere is of the last.
LEVELS = (
    ("mowe.errors",),
    ("mowe.audio", "mowe.features", "mowe.files", "mowe.configuration_mowe"),
    ("mowe.plots", "mowe.families", "mowe.losses", "mowe.generation"),
    ("mowe.checkpoint",),
    ("mowe.pool", "mowe.router", "mowe.projector"),
    ("mowe.mixture", "mowe.graphs"),
    ("mowe.model", "mowe.modeling_mowe", "mowe.processing_mowe", "mowe.quantization"),
    ("mowe.attach", "mowe.data"),
    ("mowe.evaluation",),
    ("mowe.training",),
    ("mowe.cli",),
)
# Who must not import whom, besides.
FORBIDDEN = (
    ("mowe_kernels", "mowe"),
    ("mowe_kernels", "transformers"),
    ("mowe_kernels.reference", "mowe_kernels.ops"),
    ("mowe_kernels.reference", "mowe_kernels.plan"),
    ("mowe_kernels.reference", "mowe_kernels.backend"),
    ("mowe_kernels.reference", "mowe_kernels.triton"),
    ("mowe_kernels.reference", "triton"),
    ("mowe_kernels.triton", "mowe_kernels.ops"),
    ("mowe_kernels.triton", "mowe_kernels.plan"),
    ("mowe_kernels.triton", "mowe_kernels.backend"),
    ("mowe_kernels.ops", "mowe_kernels.plan"),
    ("mowe_kernels.ops", "triton"),
    ("mowe.audio", "transformers"),
    ("mowe.features", "transformers"),
    ("mowe", "mowe_kernels.ops"),
    ("mowe", "mowe_kernels.reference"),
    ("mowe", "mowe_kernels.triton"),
    ("mowe", "tests"),
    ("mowe_kernels", "tests"),
)
ALLOWED = {"transformers.audio_utils.mel_filter_bank"}  # numbers, no model


def modules() -> dict[str, Path]:
    found = {}
    for package in ("mowe", "mowe_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(module: str) -> Iterator[str]:
    """Full names of all that a module imports, wherever in it; `from a import b` is a.b."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def level(name: str) -> int:
    for number, packages in enumerate(LEVELS):
        if any(inside(name, package) for package in packages):
            return number
    return len(LEVELS) - 1


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module):
    for imported in imports(module):
        for importer, other in FORBIDDEN:
            forbidden = inside(module, importer) and inside(imported, other) and imported not in ALLOWED
            assert not forbidden, f"{module} imports {imported}"
        if inside(module, "mowe") and inside(imported, "mowe"):
            assert level(imported) <= level(module), f"{module} imports {imported}, which is nearer to the user"


def test_the_tree_is_found():
    assert {"mowe_kernels", "mowe_kernels.plan", "mowe_kernels.ops.grouped_linear"} <= MODULES.keys()
    assert "mowe_kernels.backend.implementation" in set(imports("mowe_kernels.ops._op"))


def test_the_kernels_import_neither_triton_nor_transformers():
    code = "import sys, mowe_kernels; print(*{'triton', 'transformers', 'mowe'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
