"""One kernel at one set of launch settings, compiled without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Compilation:
    """A kernel as it is launched.

    name: what the report calls it. kernel: the `triton.jit` function.
    signature: the type of every argument that is not a constant, as Triton spells it ("*bf16", "i32", "fp32",
    "tensordesc<bf16[128, 64]>"). An integer known to be a multiple of 16 is written "i32:16". Pointers are taken as
    16-byte aligned; one that may not be is written "*i32:1".
    constexprs: the value of every other argument, None for an optional pointer that is left out.
    matmul: whether matrix instructions are expected of it.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    matmul: bool


def compile_for(compilation: Compilation, capability: int) -> Any:
    """The compiled kernel (`.asm`, `.metadata`) for `sm_<capability>`.

    Needs the kernel to have been defined without TRITON_INTERPRET in the environment.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, attrs = {}, {}
    for place, name in enumerate(compilation.kernel.arg_names):
        kind, _, multiple = compilation.signature.get(name, "constexpr").partition(":")
        types[name] = kind
        multiple = int(multiple or (16 if kind.startswith("*") else 1))
        if multiple > 1:
            attrs[(place,)] = [["tt.divisibility", multiple]]
    source = ASTSource(compilation.kernel, types, compilation.constexprs, attrs)
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
