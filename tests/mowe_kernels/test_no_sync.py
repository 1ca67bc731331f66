"""Nothing on the way of a CUDA tensor waits for the device: no op reads a tensor on the host."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "mowe_kernels"
ROOMS = ("triton", "ops", "attention")
MODULES = [*(path for room in ROOMS for path in PACKAGE.glob(f"{room}/*.py")), PACKAGE / "plan.py"]
MODULES = sorted(path for path in MODULES if path.name != "_compilation.py")  # which launches nothing
METHODS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "synchronize"}


def syncs(node: ast.AST) -> Iterator[str]:
    """What reads a tensor on the host; the branches for the CPU and functions that say "Host reads" may."""
    if isinstance(node, ast.FunctionDef) and "Host reads" in (ast.get_docstring(node) or ""):
        return
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and "device.type == 'cpu'" in ast.unparse(node.test):
        children = node.orelse
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        to_cpu = name == "to" and any(isinstance(a, ast.Constant) and a.value == "cpu" for a in node.args)
        if (name in METHODS and isinstance(node.func, ast.Attribute)) or name in ("int", "bool") or to_cpu:
            yield f"line {node.lineno}: {ast.unparse(node)}"
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Compare):
        yield f"line {node.lineno}: {ast.unparse(node)}"
    for child in children:
        yield from syncs(child)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_op_waits_for_the_device(path):
    assert list(syncs(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "planted",
    ["x.item()", "x.tolist()", "x.cpu()", "x.numpy()", "int(x[-1])", "bool(x.any())", "torch.nonzero(x)", "x[x > 0]",
     "torch.cuda.synchronize()", "x.to('cpu')"],
)  # fmt: skip
def test_a_planted_one_is_found(planted):
    function = f"def forward(x):\n    y = {planted}\n    return y"
    assert len(list(syncs(ast.parse(function)))) == 1
    host = f'def narrow(x):\n    """Host reads."""\n    return {planted}'
    branch = f"if x.device.type == 'cpu':\n    y = {planted}"
    assert not [*syncs(ast.parse(host)), *syncs(ast.parse(branch))]
