"""The bodies of the GPU tests, as far as the CPU goes: short clips in plain torch, few rows in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from mowe import graphs
from mowe_kernels.triton import grouped_mlp
from mowe_kernels.triton._launch import assume, hardware
from tests.gpu import test_kernels_on_gpu as kernels
from tests.gpu import test_mixture_on_gpu as mixture

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tests themselves run here")


@pytest.fixture
def short_clips(monkeypatch) -> None:
    monkeypatch.setattr(mixture, "LENGTHS", [1_300, 401, 2_000])


@pytest.fixture
def again(monkeypatch) -> None:
    monkeypatch.setattr(graphs, "_capture", lambda run, device: run)


@pytest.mark.usefixtures("short_clips", "again")
@pytest.mark.parametrize(
    "body",
    [
        lambda: mixture.test_error_is_at_most_twice_that_of_plain_torch(torch.float32),
        mixture.test_forward_and_backward_never_wait_for_the_device,
        lambda: mixture.test_two_runs_are_bitwise_equal(torch.float32),
        mixture.test_clips_of_the_device_laid_out_on_the_host_are_all_there,
        mixture.test_a_clip_does_not_depend_on_its_batch,
        lambda: mixture.test_a_cuda_graph_under_other_lengths_and_another_routing(torch.float32),
    ],
)
def test_of_the_mixture(body):
    body()


@pytest.mark.parametrize("case", kernels.far_cases(16))
def test_rows_far_away(case):
    kernels.check_far(case, 3_000)


def test_the_fused_kernel_is_tried_whatever_a_table_prefers(monkeypatch):
    def block(x):
        return grouped_mlp.fused_block(hardware(x.device), x.dtype, x.shape[1])

    monkeypatch.setattr(kernels.mk, "grouped_mlp", lambda x, *parameters: block(x))
    op, (width,), _ = kernels.far_cases(1536)["grouped_mlp, fused"]
    x = torch.empty(kernels.LAST, width, dtype=torch.bfloat16)
    with assume(hardware(x.device)._replace(tuned={f"mlp_block, 16 bits, width {width}": None})):
        assert block(x) is None and op(x, *[x] * 4) is not None


@pytest.mark.parametrize(
    ("left_after", "ends"), [(0, pytest.skip.Exception), (2**40, torch.OutOfMemoryError)], ids=["others", "itself"]
)
def test_whose_fault_too_little_memory_is(monkeypatch, left_after, ends):
    def out_of_memory(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels.mk, "grouped_linear", out_of_memory)
    monkeypatch.setattr(kernels, "room", iter((2**40, left_after)).__next__)
    with pytest.raises(ends):
        kernels.check_far("grouped_linear", 3_000)


def test_clips_far_away():
    kernels.check_far_clip(40_000)


def test_of_the_memory_checker():
    kernels.small_grid()
