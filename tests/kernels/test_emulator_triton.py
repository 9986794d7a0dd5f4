"""Kernels that Triton compiles for SM12x, launched on the emulator, against torch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from emulator.driver import allocation_of, emulated
from emulator.errors import KernelFault
from emulator.machine import Program
from emulator.parse import parse
from triton.runtime.errors import OutOfResources

SM120 = dict(capability=(12, 0), shared_limit=101_376)


@triton.jit
def product_kernel(a, b, out, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros([M, N], tl.float32)
    for start in tl.range(0, depth, K, num_stages=3):
        left = tl.load(a + row[:, None] * depth + (start + inner)[None, :])
        right = tl.load(b + (start + inner)[:, None] * N + column[None, :])
        acc = tl.dot(left, right, acc)
    tl.store(out + row[:, None] * N + column[None, :], acc)


@triton.jit
def softmax_kernel(x, out, columns, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < columns
    values = tl.load(x + row * columns + column, mask=inside, other=float("-inf"))
    weights = tl.exp(values - tl.max(values, 0))
    tl.store(out + row * columns + column, weights / tl.sum(weights, 0), mask=inside)


@triton.jit
def running_sum_kernel(x, out, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, tl.cumsum(tl.load(x + place), 0))


@triton.jit
def shift_kernel(x, out, by, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(x + place + by))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("num_warps", [1, 4, 8])
def test_a_pipelined_product(dtype, num_warps):
    """Asynchronous copies in three stages, ldmatrix and matrix instructions."""
    torch.manual_seed(num_warps)
    a, b = torch.randn(64, 256).to(dtype), torch.randn(256, 128).to(dtype)
    out = torch.full((64, 128), torch.nan)
    with emulated(**SM120) as gpu:
        product_kernel[(1,)](a, b, out, 256, 64, 128, 64, num_warps=num_warps)
    expected = a.to(torch.float64) @ b.to(torch.float64)
    assert torch.allclose(out.to(torch.float64), expected, rtol=0, atol=1e-4)
    (launched,) = gpu.launched
    multiplied = sum(n for name, n in launched.counts.warps.items() if name.startswith("mma"))
    # A warp multiplies 16 x 8 x 16 numbers of 16 bits at a time, or 16 x 8 x 32 of 8.
    each = 16 * 8 * 32 // dtype.itemsize
    assert multiplied >= 64 * 128 * 256 // each
    assert launched.counts.warps["cp.async.commit_group"] > 0


@pytest.mark.parametrize("columns", [1, 100, 128, 1000])
def test_reductions_across_warps(columns):
    x = torch.randn(7, columns)
    out = torch.full_like(x, torch.nan)
    with emulated(**SM120):
        softmax_kernel[(7,)](x, out, columns, triton.next_power_of_2(columns))
    assert torch.allclose(out, torch.softmax(x, 1), atol=1e-6)


def test_a_running_sum():
    x = torch.randint(-1000, 1000, (3, 512), dtype=torch.int32)
    out = torch.zeros_like(x)
    with emulated(**SM120):
        running_sum_kernel[(3,)](x, out, 512)
    assert torch.equal(out, x.cumsum(1).to(torch.int32))


@pytest.mark.parametrize(
    ("opcode", "message"),
    [
        ("bar.sync", "another warp (wrote|read) since the last barrier"),
        ("cp.async.wait_group", "a copy is under way"),
    ],
)
def test_compiled_code_without_its_barriers_or_waits_is_a_fault(monkeypatch, opcode, message):
    """They are taken out of what the compiler made: each sort is needed, and missed."""

    def without(path):
        kernel = parse(path.read_text())
        before = sum(1 for _ in kernel.instructions)
        kernel.segments = [
            [each for each in segment if each.opcode != opcode] for segment in kernel.segments
        ]
        assert sum(1 for _ in kernel.instructions) < before
        return Program(kernel)

    monkeypatch.setattr("emulator.driver._program", without)
    a, b = torch.randn(64, 256).to(torch.bfloat16), torch.randn(256, 128).to(torch.bfloat16)
    # Of a limit that no other test has, so that the kernel is loaded anew.
    limit = 100_000 + len(opcode)
    with emulated((12, 0), limit), pytest.raises(KernelFault, match=message):
        product_kernel[(1,)](a, b, torch.empty(64, 128), 256, 64, 128, 64)


def test_an_address_outside_a_tensor_is_a_fault_of_this_line():
    x, out = torch.randn(256), torch.empty(256)
    with emulated(**SM120):
        shift_kernel[(1,)](x, out, 0, 256)
        assert torch.equal(out, x)
        with pytest.raises(
            KernelFault, match=r"^shift_kernel, test_emulator_triton\.py:\d+: 2 of 128 addresses"
        ):
            # Of 128 threads with two numbers each, the last two reach past the end.
            shift_kernel[(1,)](x, out, 4, 256)


def test_padding_behind_a_tensor_is_reached_where_that_is_allowed():
    """Nothing beyond the memory that the tensor is a part of is."""
    x, memory = torch.randn(256), torch.empty(260)
    with emulated(**SM120, span=allocation_of):
        shift_kernel[(1,)](x, memory[4:], 0, 256)
        assert torch.equal(memory[4:], x)
        shift_kernel[(1,)](memory[:256], x, 4, 256)
        assert torch.equal(memory[4:], x)
        with pytest.raises(KernelFault, match="2 of 128 addresses"):
            shift_kernel[(1,)](memory[:256], x, 8, 256)


def test_shared_memory_has_an_end():
    a, b = torch.randn(64, 256).to(torch.bfloat16), torch.randn(256, 128).to(torch.bfloat16)
    out = torch.full((64, 128), torch.nan)
    with emulated((12, 0), 16384), pytest.raises(OutOfResources, match="shared memory"):
        product_kernel[(1,)](a, b, out, 256, 64, 128, 64)
    assert out.isnan().all()


def test_it_is_gone_afterwards():
    from triton.runtime import driver

    before = driver._active
    with emulated(**SM120) as gpu:
        assert driver.active is gpu
    assert driver._active is before
