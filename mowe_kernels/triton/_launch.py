"""Starting a kernel, or writing down how it would be started; what a launcher may know of the hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from threading import local
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import JITFunction, knobs
from triton.runtime import driver

from mowe_kernels import tables
from mowe_kernels.triton._compilation import Compilation

DTYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
COMPUTES_IN = frozenset((torch.float16, torch.bfloat16, torch.float32))


class Hardware(NamedTuple):
    """capability: 80, 86, 89, 90, 100. num_sms: multiprocessors. shared: bytes of shared memory a program may use.

    tuned: by "<name>, <key>", the launch settings that were measured to be faster than those chosen without.
    """

    capability: int
    num_sms: int
    shared: int
    tuned: Mapping[str, Any] = MappingProxyType({})


class Programs(int):
    """(rows // block + more) * times: of a kernel that walks packed rows, of which every batch has others."""

    block: int
    more: int
    times: int

    def __new__(cls, rows: int, block: int, more: int, times: int = 1) -> Programs:
        count = super().__new__(cls, (rows // block + more) * times)
        count.block, count.more, count.times = block, more, times
        return count


class Started(NamedTuple):
    """What Triton compiled, and how it starts that: `run`, with some of its arguments and the kernel's constants."""

    run: Callable[..., None]
    function: Any
    metadata: Any
    constants: list[Any]
    compiled: Any


class Tuning(NamedTuple):
    """A launch setting worth measuring: its name, the key it is looked up by, and what to try.

    call: runs the kernel on tensors of a real size, as it is set, and gives its result.
    """

    name: str
    key: str
    candidates: tuple[Any, ...]
    call: Callable[[], Tensor]


# Of each architecture: what launch settings are chosen for when there is no device to ask.
ARCHITECTURES = {
    80: Hardware(80, 108, 166912),
    86: Hardware(86, 84, 101376),
    89: Hardware(89, 142, 101376),
    90: Hardware(90, 132, 232448),
    100: Hardware(100, 148, 232448),
}

# For the whole process: autograd runs the backward of CUDA tensors in threads of its own.
_UNTUNED = object()
_state: dict[str, Any] = {"hardware": None, "settings": {}, "launches": None}
_to_forget: list[Callable[[], None]] = []
# Of a thread: what `noting` gathers.
_noting = local()
# By kernel and constants, then by what else a launch's code depends on: what Triton compiled, and how that is started.
# To find that out anew, Triton takes several times what the start itself does.
_compiled: dict[tuple, dict[tuple, Started]] = {}


@contextmanager
def _changed(**changes: Any) -> Iterator[None]:
    before = dict(_state)
    _state.update(changes)
    _forget()
    try:
        yield
    finally:
        _state.update(before)
        _forget()


def remembered(function: Callable[..., Any]) -> Any:
    """`lru_cache` for what follows from sizes, types and the device, until launch settings are changed: a layer of an
    encoder asks for the same as the one before it.
    """
    cached = lru_cache(maxsize=4096)(function)
    forget_by(cached.cache_clear)
    return cached


def forget_by(clear: Callable[[], None]) -> None:
    """Call `clear` whenever launch settings are changed."""
    _to_forget.append(clear)


def _forget() -> None:
    for clear in _to_forget:
        clear()


def assume(hardware: Hardware) -> AbstractContextManager[None]:
    """Inside the `with` block, choose launch settings for this hardware instead of the device the tensors are on."""
    return _changed(hardware=hardware)


def override(**settings: Any) -> AbstractContextManager[None]:
    """Inside the `with` block, use these launch settings, whatever the tables of the ops say."""
    return _changed(settings={**_state["settings"], **settings})


@contextmanager
def record(capability: int) -> Iterator[list[Compilation]]:
    """Write down the launches of the `with` block, as on hardware of this capability, instead of making them.

    Inside, launchers take tensors of the meta device.
    """
    launches: list[Compilation] = []
    with _changed(hardware=ARCHITECTURES[capability], launches=launches):
        yield launches


def setting(
    name: str, default: Any, device: Hardware | None = None, key: str = "", kind: Callable[..., Any] | None = None
) -> Any:
    """A launch setting: the one `override` asks for, or the one that was measured on the device to be the best for
    `key`, or what the op's table gives.

    kind: what to make of the values of a measured one; the default's own type without.
    Raises ValueError for a measured one of another number of values.
    """
    if name in _state["settings"]:
        return _state["settings"][name]
    measured = device.tuned.get(f"{name}, {key}", _UNTUNED) if device is not None and device.tuned else _UNTUNED
    if measured is _UNTUNED:
        return default
    if not isinstance(measured, list):
        return measured
    make = kind or type(default)
    try:
        return make(*measured)
    except TypeError:
        raise ValueError(
            f"the measured setting {name!r} ({key}) has other values than this version asks for: {measured}; "
            "make the table anew: python -m mowe_kernels.tune"
        ) from None


def hardware(device: torch.device) -> Hardware:
    """The hardware to choose launch settings for. The interpreter passes for an sm_80 with few multiprocessors."""
    if _state["hardware"] is not None:
        return _state["hardware"]
    return _query(device.index) if device.type == "cuda" else ARCHITECTURES[80]._replace(num_sms=4)


@cache
def _query(index: int) -> Hardware:
    properties = torch.cuda.get_device_properties(index)
    # 12.x has the matrix instructions and the shared memory of 8.9, not those of 9.0 and 10.0.
    capability = 89 if properties.major >= 12 else 10 * properties.major + properties.minor
    shared = properties.shared_memory_per_block_optin
    table = tables.of_device(index)
    return Hardware(capability, properties.multi_processor_count, shared, table.settings if table else {})


def check_dtypes(op: str, *tensors: Tensor | None) -> None:
    """Raise ValueError unless all the tensors there are share one of the types the kernels compute in."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) != 1 or not dtypes <= COMPUTES_IN:
        got = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(f"{op}: the Triton kernels take one type of float16, bfloat16 and float32, got {got}")


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as the kernels read them: rows one after the other."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, made for kernels, costs a launcher microseconds; so does the next."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def alike(rows: int) -> int:
    """The number of rows that launch settings are chosen for: rounded up to three binary digits, or to a multiple of
    1,024 where that is closer, so that batches of other lengths are often launched alike.
    """
    step = 1 << min(max((rows - 1).bit_length() - 3, 0), 10)
    return cdiv(rows, step) * step


class Launch:
    """A kernel with its constants and launch settings, started by calling it with the number of programs and the
    arguments that are not constants, in the kernel's order, the first a tensor or a descriptor of one.

    matmul: whether its dot products are expected on matrix instructions; only the report of compilations asks.
    """

    __slots__ = ("_known", "constexprs", "kernel", "matmul", "num_stages", "num_warps")

    def __init__(self, kernel: Any, *, num_warps: int, num_stages: int, matmul: bool = False, **constexprs: Any):
        self.kernel, self.constexprs = kernel, constexprs
        self.num_warps, self.num_stages, self.matmul = num_warps, num_stages, matmul
        constants = kernel.fn, num_warps, num_stages, *constexprs, *constexprs.values()
        self._known = _compiled.setdefault(constants, {})

    def __call__(self, programs: int, *args: Any) -> None:
        """Run the programs on the device the first argument is on; none, if there is nothing to do."""
        if programs <= 0:
            return
        if _state["launches"] is not None:
            _state["launches"].append(_describe(self, args))
            return
        index = (args[0] if isinstance(args[0], Tensor) else args[0].base).get_device()
        if index < 0:
            if isinstance(self.kernel, JITFunction):
                raise ValueError(
                    "the Triton kernels take tensors on the CPU only in Triton's interpreter: "
                    "set TRITON_INTERPRET=1 before triton is imported"
                )
            self._by_triton(programs, args)
        elif index == torch.cuda.current_device():
            self._start(index, programs, args)
        else:
            with torch.cuda.device(index):
                self._start(index, programs, args)

    def _start(self, device: int, programs: int, args: tuple) -> None:
        """Have Triton compile and start what was not started yet, and start what was without asking it again.

        Then tensors are given by their addresses, which Triton would have to ask of them, and the driver whether it
        knows them.
        """
        kinds, values = [device], []
        for arg in args:
            if arg is None:
                kinds.append(None)
                values.append(None)
            elif isinstance(arg, Tensor):
                address = arg.data_ptr()
                kinds += (arg.dtype, arg.get_device(), address % 16 == 0)
                values.append(address)
            else:
                kinds.append(_kind(arg))
                values.append(arg)
        key = tuple(kinds)
        known = self._known.get(key)
        if known is None or hooked():
            compiled = self._by_triton(programs, args)
            if compiled is None:  # TRITON_INTERPRET=1
                return
            constants = [self.constexprs[name] for name in self.kernel.arg_names[len(args) :]]
            known = Started(compiled.run, compiled.function, compiled.packed_metadata, constants, compiled)
            self._known[key] = known
        else:
            start(known, programs, current_stream(device), values)
        if (noted := getattr(_noting, "launches", None)) is not None:
            noted.append((known, programs, args))

    def _by_triton(self, programs: int, args: tuple) -> Any:
        return self.kernel[(programs,)](*args, num_warps=self.num_warps, num_stages=self.num_stages, **self.constexprs)


def start(known: Started, programs: int, stream: int, values: Iterable[Any]) -> None:
    """values: the arguments that are not constants, of tensors the addresses."""
    run, function, metadata, constants, _ = known
    run(programs, 1, 1, stream, function, metadata, None, None, None, *values, *constants)


def current_stream(device: int) -> int:
    return driver.active.get_current_stream(device)


@contextmanager
def noting() -> Iterator[list[tuple[Started, int, tuple[Any, ...]]]]:
    """Write down the launches this thread makes on a GPU inside the `with` block: how, how many programs, with what.
    They may depend on the exact number of rows only through `Programs`, arguments called "num_rows", descriptors and
    sizes of tensors that have the batch's rows; all else through the number `alike`.
    """
    before, launches = getattr(_noting, "launches", None), []
    _noting.launches = launches
    try:
        yield launches
    finally:
        _noting.launches = before


def launch(kernel: Any, programs: int, *args: Any, **settings: Any) -> None:
    """Make a `Launch`, and start it."""
    Launch(kernel, **settings)(programs, *args)


def _kind(arg: Any) -> Any:
    """What a compiled kernel may depend on of an argument that is neither a constant nor a tensor: as for tensors,
    never less than what Triton looks at.
    """
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, -(2**31) <= arg < 2**31
    return float if isinstance(arg, float) else (arg.base.dtype, *arg.block_shape)


def hooked() -> bool:
    """Whether somebody, a profiler say, wants to hear of every launch."""
    return any((knobs.runtime.launch_enter_hook.calls, knobs.runtime.launch_exit_hook.calls))


def recorded(capability: int, calls: Mapping[str, Callable[[], Any]]) -> Iterator[Compilation]:
    """The launches each of the named calls makes, called "<kernel>, <call>"; those that differ in nothing else once."""
    seen = []
    for name, call in calls.items():
        with record(capability) as launches:
            call()
        for launched in launches:
            if launched not in seen:
                seen.append(launched)
                yield replace(launched, name=f"{launched.name}, {name}")


def _describe(launched: Launch, args: tuple[Any, ...]) -> Compilation:
    kernel, signature, constants = launched.kernel, {}, dict(launched.constexprs)
    for name, arg, parameter in zip(kernel.arg_names, args, kernel.params, strict=False):
        if arg is None:
            constants[name] = None
        elif isinstance(arg, Tensor):
            signature[name] = f"*{DTYPES[arg.dtype]}" + (":1" if parameter.do_not_specialize_on_alignment else "")
        elif hasattr(arg, "block_shape"):
            signature[name] = f"tensordesc<{DTYPES[arg.base.dtype]}{list(arg.block_shape)}>"
        else:
            signature[name] = "fp32" if isinstance(arg, float) else "i32"
    return Compilation(
        kernel.__name__, kernel, signature, constants, launched.num_warps, launched.num_stages, launched.matmul
    )
