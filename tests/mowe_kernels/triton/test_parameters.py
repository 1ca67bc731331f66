"""What the driver is given when launches are made again, also where something is wrong."""

from __future__ import annotations

import pytest
import torch

from mowe_kernels import csrc
from mowe_kernels.csrc.launch import OF_BATCH, Layout, Program, parameter_sizes
from tests.mowe_kernels.triton.no_gpu import needs_compiler, printed_by

SCRIPT = """
import ctypes
import threading
import torch
from mowe_kernels.csrc.launch import parameter_sizes
from mowe_kernels.triton import _gemm, _launch
from mowe_kernels.triton._descriptors import operands
from mowe_kernels.triton._launch import Launch, Programs
from mowe_kernels.triton._repeat import noted

x, weight = torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(2, 64, 64, dtype=torch.bfloat16)
offsets, out = torch.zeros(3, dtype=torch.int32), torch.zeros(64, 64, dtype=torch.bfloat16)
(a, w), _ = operands((x, (64, 32)), (weight, (64, 32)))
constants = dict(E=2, BE=2, N=64, K=64, TRANSPOSED=False, GELU=False, BM=64, BN=64, BK=32, BAND=8, TMA=True)
constants["PERSISTENT"] = False
gemm = Launch(_gemm.grouped_gemm_kernel, num_warps=4, num_stages=2, **constants)
inputs = [x, weight, offsets]

def note():
    def compute():
        gemm._start(0, Programs(64, 16, 1), (a, w, None, offsets, None, None, None, None, out, 64))
        return (out,)
    return noted(inputs[:1], (), inputs[1:], compute)[1]

def made(programs=5):
    (launch,) = started()
    assert launch.programs == programs
    return [value if isinstance(value, int) else value[:2] for value in launch.parameters]

again = note()
by_triton = made()
(result,) = again(inputs, 7)
parameters = made()
assert parameters == [*by_triton[:-4], result.data_ptr(), 64, 0, 0]
assert (result.shape, result.dtype) == (out.shape, out.dtype)

# Fewer rows, in the descriptor and what goes with it too; the numbers of all that has no rows stay.
fewer = x[:57]
(result,) = again([fewer, *inputs[1:]], 7)
assert result.shape == fewer.shape
(a, _), _ = operands((fewer, (64, 32)), (weight, (64, 32)))
gemm._start(0, Programs(57, 16, 1), (a, w, None, offsets, None, None, None, None, result, 57))
again_by_triton, by_triton_again = [launch._replace(parameters=launch.parameters[:-2]) for launch in started()]
assert again_by_triton == by_triton_again and again_by_triton.programs == 4

# Other inputs are told from those: by number, sizes, type, alignment and strides.
flat = torch.zeros(9000, dtype=torch.bfloat16)
for other in (flat[:4160].view(65, 64), x[:, :32], x.half(), flat[1:4097].view(64, 64), x.T, x[None], x[0, 0]):
    assert again([other, *inputs[1:]], 7) == []
assert again([x, weight[:1], offsets], 7) == again(inputs[:2], 7) == [] and not started()

# In a context of the device: its own where that of another device is current, which is current again afterwards.
own, current, used = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
fake().cuCtxGetCurrent(ctypes.byref(own))
for before, expected in ((1, own.value), (2, 2), (own.value, own.value)):
    fake().cuCtxSetCurrent(ctypes.c_void_p(before))
    again(inputs, 7)
    fake().cuCtxGetCurrent(ctypes.byref(current))
    fake().fake_launched_in(ctypes.byref(used))
    assert (len(started()), current.value, used.value) == (1, before, expected)

# A thread in which nobody has used the device yet.
failed = []
def in_thread():
    try:
        again(inputs, 7)
    except RuntimeError as error:
        failed.append(error)
thread = threading.Thread(target=in_thread)
thread.start(), thread.join()
assert not failed and made()[:-4] == by_triton[:-4]

for error in (719, 1234):
    fake().fake_error(error)
    try:
        again(inputs, 7)
    except RuntimeError as error:
        print(error)
fake().fake_error(0)

# A kernel that would be given something it does not take is left to Triton.
known = next(iter(gemm._known.values()))
fake().fake_parameters(ctypes.c_uint64(known.function), 3, (ctypes.c_size_t * 3)(8, 8, 8))
parameter_sizes.cache_clear()
assert note() is None
"""

NEWER = """
import ctypes
import torch
from mowe_kernels.csrc.launch import Address, Launch, Layout, Matrix, Program, Rows, Value, available
from tests.mowe_kernels.triton.no_gpu import _sizes

assert available()
fake().fake_version(13020)
fake().cuCtxSetCurrent(ctypes.c_void_p(1))
_sizes[1] = [128, 4, 8]
fake().fake_parameters(ctypes.c_uint64(1), 3, (ctypes.c_size_t * 3)(128, 4, 8))
matrix = Matrix(Address(1, 256), type=9, swizzle=3, itemsize=2, shape=(64, 32), block=(16, 8))
x, out = torch.zeros(3), torch.zeros(0, 2, dtype=torch.float16)
like_x, like_out = Layout((3,), x.dtype), Layout((0, 2), out.dtype)
launch = Launch(1, 2, 0, 2, 64, 1024, (matrix, Value(2**32 - 1, 4), Rows(8)))
program = Program([launch], [like_x, like_x], 1, [like_out], 3, 0, -1)
(result,) = program([x, x], 7)
assert (result.shape, result.dtype) == (out.shape, out.dtype)
(launch,) = started()
assert launch[:5] == (1, 2, 64, 1024, 7) and launch.parameters[1:] == (2**32 - 1, 3)
assert launch.parameters[0] == (x.data_ptr() + 256, 2**32 - 2**16 + 9, 2, 32, 64, 64, 8, 16, 1, 1, 0, 3, 2, 0, 0, 0)
"""


@needs_compiler
def test_launches_are_made_again_and_what_goes_wrong_is_said():
    errors = printed_by(SCRIPT).split("\n")
    assert [error.split(", ")[-1] for error in errors] == [
        "CUDA error: unspecified launch failure",
        "CUDA error: unknown error",
    ]


@needs_compiler
def test_what_older_drivers_set_wrongly_is_left_to_newer_ones():
    assert not printed_by(NEWER)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
@pytest.mark.skipif(not csrc.available(), reason="the compiled library was not built")
def test_without_a_driver_nobody_knows_a_kernels_parameters():
    assert parameter_sizes(1) is None


@pytest.mark.skipif(not csrc.available(), reason="the compiled library was not built")
def test_without_room_torchs_own_error_is_raised():
    x = torch.zeros(3)
    like_x = Layout((OF_BATCH,), x.dtype)
    (result,) = Program([], [like_x], 1, [like_x], 3, 0, -1)([x], 0)
    assert result.shape == x.shape
    with pytest.raises(torch.OutOfMemoryError, match="out of memory for the results and temporaries of a layer"):
        Program([], [like_x], 1, [like_x], 3, 2**62, -1)([x], 0)
