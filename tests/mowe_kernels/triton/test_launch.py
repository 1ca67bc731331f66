"""What is started without asking Triton is what Triton would have started."""

from __future__ import annotations

from mowe_kernels.triton._launch import alike
from tests.mowe_kernels.triton.no_gpu import needs_compiler, printed_by

ON_THE_CPU = """
import torch
from mowe_kernels import sequence_mean, use_backend

with use_backend("triton"):
    try:
        sequence_mean(torch.zeros(4, 3), torch.zeros(1).int(), torch.ones(1).int())
    except ValueError as error:
        print(error)
"""

SCRIPT = """
import torch
from mowe_kernels.triton import _attention, _gemm, _launch
from mowe_kernels.triton._launch import Launch
from mowe_kernels.triton._descriptors import operands

def gemm(rows, shift=0, gelu=False, bias=True, dtype=torch.bfloat16, tma=False):
    x = torch.zeros(rows * 64 + 8, dtype=dtype)[shift : shift + rows * 64].view(rows, 64)
    weight, offsets = torch.zeros(2, 64, 64, dtype=dtype), torch.zeros(3, dtype=torch.int32)
    (a, w), described = operands((x, (64, 32)), (weight, (64, 32))) if tma else ((x, weight), False)
    out = torch.empty(rows, 64, dtype=dtype)
    args = a, w, weight[:, 0] if bias else None, offsets, None, None, None, None, out, rows
    constants = dict(E=2, BE=2, N=64, K=64, TRANSPOSED=False, GELU=gelu, BM=64, BN=64, BK=32, BAND=8, TMA=described)
    return _gemm.grouped_gemm_kernel, args, constants | dict(PERSISTENT=rows > 1000)

def attention(rows, sequences):
    qkv, offsets = torch.zeros(rows, 3, 2, 32).bfloat16(), torch.zeros(sequences + 1, dtype=torch.int32)
    args = qkv, offsets, torch.empty(rows, 2, 32).bfloat16(), None, rows, sequences, 0.5
    constants = dict(HEADS=2, DIM=32, BLOCK_D=32, BLOCK_M=64, BLOCK_N=32)
    return _attention.varlen_attention_fwd_kernel, args, constants

def reduce(chunk):
    parts, offsets = torch.zeros(4, 32), torch.zeros(3, dtype=torch.int32)
    return _gemm.grouped_wgrad_reduce_kernel, (parts, offsets, torch.empty(2, 32), chunk), dict(M=32, BLOCK=32)

cases = [
    gemm(64), gemm(65), gemm(64, shift=1), gemm(64, shift=8), gemm(64, gelu=True), gemm(64, bias=False),
    gemm(64, dtype=torch.float16), gemm(64, tma=True), gemm(65, tma=True), gemm(64, shift=1, tma=True),
    gemm(1024, tma=True), attention(64, 1), attention(64, 16), attention(65, 3), reduce(1), reduce(16), reduce(17),
]
how = dict(num_warps=4, num_stages=2)
functions = set()
for kernel, args, constants in cases:
    kernel[(5,)](*args, **how, **constants)
    Launch(kernel, **how, **constants)._start(0, 5, args)
    Launch(kernel, **how, **constants)._start(0, 5, args)
    theirs, first, ours = started()
    assert theirs == first == ours, kernel.__name__
    assert theirs[1:3] == (5, 128) and theirs.stream == 7
    functions.add(theirs.function)
assert len(functions) >= 8
# Where somebody wants to hear of launches, Triton makes them, and tells.
heard = []
_launch.knobs.runtime.launch_enter_hook.add(heard.append)
Launch(cases[0][0], **how, **cases[0][2])._start(0, 5, cases[0][1])
assert len(started()) == len(heard) == 1
print("the same")
"""


def test_rows_are_rounded_up_by_a_quarter_at_most():
    for rows in (*range(1, 3000), 8192, 8193, 50_990, 10**6 + 1):
        most = alike(rows)
        assert rows <= most <= rows + min(rows // 4, 1023) and alike(most) == most
    assert len({alike(rows) for rows in range(1025, 8193)}) == 3 * 4
    assert (alike(0), alike(50_990)) == (0, 51_200)


@needs_compiler
def test_a_launch_without_triton_is_the_one_with_it():
    assert printed_by(SCRIPT) == "the same"


@needs_compiler
def test_tensors_on_the_cpu_need_the_interpreter():
    assert "TRITON_INTERPRET=1" in printed_by(ON_THE_CPU)
