"""How an op is made: one registration for torch.compile, one direct path for eager code, the same formulas in both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import is_autocast_enabled as autocasts
from torch.autograd import forward_ad

from mowe_kernels.backend import implementation


def _separate(result: Any) -> Any:
    """A backend may return one empty tensor for all that nobody asked for; torch.library wants results apart."""
    if isinstance(result, torch.Tensor):
        return result if result.numel() else result.new_empty(result.shape)
    return type(result)(map(_separate, result))


@contextmanager
def _types_as_given() -> Iterator[None]:
    """No autocast: what an op computes in follows from its arguments alone."""
    with ExitStack() as stack:
        for kind in filter(autocasts, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class Op:
    """A function `mowe::<name>`, computed by `<backend>.<module>.<function>` of the backend in force.

    schema: the torch.library schema without the name. fake: the shapes of the results for given arguments.
    Calling it goes straight to the backend; under torch.compile it goes through `torch.ops.mowe`, so that the
    graph holds one opaque node. So does a call that autograd follows: torch.library then refuses its derivative.

    compute: goes straight to the backend, whoever asks.
    """

    def __init__(self, name: str, schema: str, fake: Callable[..., Any], *, module: str, function: str):
        self.name = name

        def compute(*args: Any) -> Any:
            by = getattr(implementation(module, args), function)
            if autocasts("cpu") or autocasts("cuda"):
                with _types_as_given():
                    return by(*args)
            return by(*args)

        self.compute = compute
        self.op = torch.library.custom_op(
            f"mowe::{name}", lambda *args: _separate(compute(*args)), mutates_args=(), schema=schema
        )
        self.op.register_fake(fake)

    def __call__(self, *args: Any) -> Any:
        return self.op(*args) if traced(*args) or needs_grad(*args) else self.compute(*args)


class DifferentiableOp(Op):
    """An op with a gradient.

    setup_context and backward are those of torch.autograd.Function; backward calls another `Op`, so that
    it too is one node of a compiled graph. Ops that take lists of tensors get their gradient through torch.library,
    which alone can see into lists.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        fake: Callable[..., Any],
        *,
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
    ):
        super().__init__(name, schema, fake, module=name, function="forward")
        self.op.register_autograd(backward, setup_context=setup_context)
        self._takes_lists = "Tensor[]" in schema

        def forward(ctx: Any, *args: Any) -> Any:
            output = self.compute(*args)
            setup_context(ctx, args, output)
            return output

        # Where it has a setup_context of its own, torch works out the signature of its forward anew at every call.
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(name, (torch.autograd.Function,), members)

    def __call__(self, *args: Any) -> Any:
        seen = [a for arg in args for a in (arg if isinstance(arg, list) else (arg,))] if self._takes_lists else args
        if traced(*seen):
            return self.op(*args)
        if needs_grad(*seen):
            return self.op(*args) if self._takes_lists else self._function.apply(*args)
        return self.compute(*args)


def launched_again(op: str, x: torch.Tensor, *args: Any) -> Sequence[torch.Tensor]:
    """What the backend gives without a check where it has launched the like before: results, or nothing."""
    again = getattr(implementation(op, (x,)), "again", None)
    return again(x, *args) if again else ()


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, int, float, bool, str, list, type(None)))


def traced(*args: Any) -> bool:
    """Whether torch.compile or a tensor subclass (fake, functional) must see the op as one node."""
    if torch.compiler.is_compiling():
        return True
    if _PLAIN.issuperset(map(type, args)):  # the common case, and the quick one: this runs before every op
        return False
    return any(type(a) not in _PLAIN and isinstance(a, torch.Tensor) for a in args)


def needs_grad(*args: Any) -> bool:
    """Whether autograd will ask for a gradient through any of these arguments.

    Raises NotImplementedError where one has a tangent, which the kernels would drop without a word, and inside other
    transforms of torch.func, which cannot see into them.
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(args)
    if torch._C._are_functorch_transforms_active():
        _refuse_transforms(args)
    if not torch.is_grad_enabled():
        return False
    for a in args:  # noqa: SIM110
        if isinstance(a, torch.Tensor) and a.requires_grad:
            return True
    return False


def _refuse_tangents(args: tuple[Any, ...]) -> None:
    if any(isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise NotImplementedError("mowe_kernels has no forward-mode derivatives (jvp, jacfwd); use backward")


def _refuse_transforms(args: tuple[Any, ...]) -> None:
    if any(isinstance(a, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(a) for a in args):
        raise NotImplementedError("mowe_kernels cannot be transformed by torch.func (grad, vmap, ...); use backward")


def check(condition: bool, op: str, message: str) -> None:
    """Raise ValueError `<op>: <message>` unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: {message}")


def check_shape(op: str, name: str, tensor: torch.Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """Raise ValueError unless the tensor has the expected sizes (None: any), saying what was got."""
    shape = tensor.shape
    if shape == expected:  # the common case, and the quick one
        return
    fits = len(shape) == len(expected)
    for size, wanted in zip(shape, expected, strict=False):
        fits &= wanted is None or size == wanted
    if not fits:
        sizes = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{op}: {name} must be {meaning} with sizes [{sizes}], got {list(shape)}")


def check_dtype(op: str, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise ValueError unless the tensors that are there have the type of x, and lie where it does."""
    dtype, device = x.dtype, x.device
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"{op}: {name} must be {dtype} as the rows are, got {tensor.dtype}")
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device} as the rows are, got {tensor.device}")


def check_offsets(op: str, name: str, offsets: torch.Tensor, count: int | None, meaning: str) -> None:
    """Raise ValueError unless the offsets are `count` integers (None: any number), saying what was got."""
    check_shape(op, name, offsets, (count,), f"row offsets {meaning}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: {name} must be of type int32 or int64, got {offsets.dtype}")


def empty(like: torch.Tensor) -> torch.Tensor:
    """What an op returns in place of a result nobody asked for."""
    return like.new_empty(0)


def optional(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient a backward op returned, None where it was not asked for."""
    return None if tensor is None or tensor.shape == (0,) else tensor
