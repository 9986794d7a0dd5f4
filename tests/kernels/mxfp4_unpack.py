"""The device functions that unpack MXFP4, alone, and what they must give."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from test_mxfp4_experts import decode

from vllm_sm12x.lowering import launch_options
from vllm_sm12x.ops.mxfp4_experts.bfloat16 import unpack
from vllm_sm12x.ops.mxfp4_experts.float8 import quantize_kernel, unpack_e4m3

E4M3 = torch.float8_e4m3fn


@triton.jit
def _kernel(
    packed_ptr,
    scale_ptr,
    low_ptr,
    high_ptr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    ANY: tl.constexpr,
):
    at = tl.arange(0, ROWS)[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    groups: tl.constexpr = BYTES // 16
    scale_at = tl.arange(0, ROWS)[:, None] * groups + tl.arange(0, groups)[None, :]
    low, high = unpack(tl.load(packed_ptr + at), tl.load(scale_ptr + scale_at), ANY)
    tl.store(low_ptr + at, low)
    tl.store(high_ptr + at, high)


@triton.jit
def _e4m3_kernel(packed_ptr, word_ptr, top_ptr, low_ptr, high_ptr, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    at = row[:, None] * 64 + tl.arange(0, 64)[None, :]
    word, top = tl.load(word_ptr + row), tl.load(top_ptr + row)
    low, high = unpack_e4m3(tl.load(packed_ptr + at), word, top)
    tl.store(low_ptr + at, low)
    tl.store(high_ptr + at, high)


def check_every_byte_at_every_scale(device: str) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    expected = decode(packed, scale)
    # 2 and more times 2**127 are infinite.
    expected[expected.abs() >= 2.0**128] *= math.inf
    # By one multiplication up to scales of 2, by two any.
    for scales, both in ((129, False), (256, True)):
        low, high = (torch.zeros(256, 256, dtype=torch.bfloat16, device=device) for _ in range(2))
        given = (packed.to(device), scale.to(device), low, high)
        _kernel[(1,)](*given, ROWS=256, BYTES=256, ANY=both, **launch_options())
        for values, wanted in ((low.cpu(), expected[:, ::2]), (high.cpu(), expected[:, 1::2])):
            values, wanted = values[:scales], wanted[:scales]
            assert torch.equal(values.isnan(), wanted.isnan())
            assert torch.equal(values.double().nan_to_num(), wanted.nan_to_num())
            assert torch.equal(values.signbit()[:255], wanted.signbit()[:255])


def check_every_byte_in_e4m3(device: str) -> None:
    """Every byte in each place of four, in groups from the row's largest scale down to none."""
    drops = torch.arange(16)
    first = torch.arange(256, dtype=torch.uint8)
    # A row's 64 bytes are four groups of 16; each row holds 64 of the bytes, rotated.
    packed = torch.stack([first.roll(-4 * k)[:64] for k in range(64)]).repeat(4, 1)
    scale = 120 - torch.stack([drops[(torch.arange(4) * 5 + k) % 16] for k in range(256)])
    top = torch.full((256,), 120, dtype=torch.int32)
    words = scale.to(torch.uint8).contiguous().view(torch.int32).flatten()
    low, high = (torch.zeros(256, 64, dtype=E4M3, device=device) for _ in range(2))
    given = (packed.contiguous().to(device), words.to(device), top.to(device), low, high)
    _e4m3_kernel[(1,)](*given, ROWS=256, **launch_options())
    # The largest scale becomes 2**6; what is more than 2**11 below it is 0.
    expected = decode(packed, scale.to(torch.uint8)) * 2.0 ** (127 - 120 + 6)
    expected *= (scale >= 120 - 11).repeat_interleave(32, 1)
    assert expected.abs().max() == 6 * 64
    for values, wanted in ((low.cpu(), expected[:, ::2]), (high.cpu(), expected[:, 1::2])):
        assert torch.equal(values.double(), wanted)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By the kernel: values in their own order and times no scale, and the scales."""
    rows, columns = x.shape
    values = torch.zeros(rows, columns, dtype=E4M3, device=x.device)
    scale = torch.full((rows,), math.nan, device=x.device)
    block = triton.next_power_of_2(columns)
    options = dict(COLUMNS=columns, BLOCK=block, **launch_options())
    quantize_kernel[(rows,)](x, x.stride(0), values, scale, **options)
    return in_order(values), scale


def in_order(values: torch.Tensor) -> torch.Tensor:
    """E4m3 as the kernel writes it, of each 128 the even ones first, in the order of the row."""
    turns = values.view(torch.uint8).unflatten(1, (-1, 2, 64)).mT
    return turns.reshape(values.shape).view(E4M3)


def quantized(x: torch.Tensor) -> torch.Tensor:
    """By the definition, in float64: to e4m3 times the least power of two that fits the row."""
    x = x.double()
    largest = x.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, 2.0 ** torch.ceil(torch.log2(largest / 448)), 1.0)
    return (x / scale).to(E4M3).double() * scale


def check_quantize(device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 384, generator=generator).bfloat16()
    x *= torch.logspace(-30, 30, 9)[:, None].bfloat16()
    x[1, 5], x[1, 6:] = 448.0, 1.0
    x[2, 5], x[2, 6:] = 450.0, 1.0
    x[3] = torch.linspace(-1, 1, 384).bfloat16() ** 9
    x[4] = 0.0
    values, scale = (tensor.cpu() for tensor in quantize(x.to(device)))
    assert torch.equal(values.double() * scale[:, None].double(), quantized(x))
    assert scale[1] == 1.0 and scale[2] == 2.0
    for bad in (math.nan, math.inf, -math.inf):
        x[5, 100] = bad
        _, scale = quantize(x.to(device))
        assert scale.cpu().isnan().tolist() == [row == 5 for row in range(9)]
