"""What runs Gluon kernels on the CPU finds what it is there to find."""

from __future__ import annotations

import pytest
import torch
from gluon_on_cpu import OnCpu
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy


@gluon.jit
def _double(x, y, n, WAIT: gl.constexpr, MASKED: gl.constexpr, SIZE: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    entry = gl.program_id(0) * SIZE + gl.arange(0, SIZE, layout=layout)
    inside = entry < n
    if MASKED:
        entry = gl.where(inside, entry, 0)
    smem = gl.allocate_shared_memory(gl.float32, [SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    async_copy.async_copy_global_to_shared(smem, x + entry, mask=inside)
    async_copy.commit_group()
    if WAIT == 1:
        async_copy.wait_group(0)
    gl.store(y + entry, smem.load(layout) * 2.0, mask=inside)
    if WAIT == 2:
        async_copy.wait_group(0)


def run(n: int, **flags) -> torch.Tensor:
    x, y = torch.arange(float(n)), torch.full((n,), -1.0)
    OnCpu(_double)[(-(-n // 128),)](x, y, n, **{"MASKED": True, "SIZE": 128, **flags}, num_warps=1)
    return y


@pytest.mark.parametrize("n", [1, 128, 300])
def test_a_right_kernel(n):
    assert torch.equal(run(n, WAIT=1), 2 * torch.arange(float(n)))


def test_what_is_read_before_it_is_waited_for_is_not_there():
    assert run(300, WAIT=2).isnan().all()


def test_a_copy_that_nobody_waits_for_is_an_error():
    with pytest.raises(AssertionError, match="nobody waited for"):
        run(300, WAIT=0)


def test_an_address_outside_is_an_error_though_it_is_masked():
    with pytest.raises(AssertionError, match="outside its tensor"):
        run(300, WAIT=1, MASKED=False)
