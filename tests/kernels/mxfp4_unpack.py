"""Unpacks MXFP4 with the device function of the experts' kernels alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sm12x.lowering import launch_options
from vllm_sm12x.ops.mxfp4_experts.e2m1 import unpack


@triton.jit
def _kernel(packed_ptr, scale_ptr, low_ptr, high_ptr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    groups: tl.constexpr = BYTES // 16
    scale_at = tl.arange(0, ROWS)[:, None] * groups + tl.arange(0, groups)[None, :]
    low, high = unpack(tl.load(packed_ptr + at), tl.load(scale_ptr + scale_at))
    tl.store(low_ptr + at, low)
    tl.store(high_ptr + at, high)


def unpack_bytes(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the low and of the high nibbles of uint8 ``[rows, bytes]``, powers of two."""
    low, high = (torch.full_like(packed, 0, dtype=torch.bfloat16) for _ in range(2))
    rows, columns = packed.shape
    _kernel[(1,)](packed, scale, low, high, ROWS=rows, BYTES=columns, **launch_options())
    return low, high
