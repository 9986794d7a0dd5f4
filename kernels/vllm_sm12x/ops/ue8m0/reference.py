"""Definitions, in PyTorch, for CPU and GPU; safe under CUDA-graph capture."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def ue8m0_to_float32(scale: torch.Tensor) -> torch.Tensor:
    byte = scale.view(torch.uint8).to(torch.int32)
    # The byte is the biased exponent of a float32. Its two ends need the top bit of the mantissa:
    # with exponent 0 it makes 2**-127 out of 0, and with exponent 255 it makes NaN out of infinity.
    ends = ((byte == 0) | (byte == 255)).to(torch.int32)
    return ((byte << 23) | (ends << 22)).view(torch.float32)


def scale_blocks_(
    values: torch.Tensor, scale: torch.Tensor, block_shape: Sequence[int]
) -> torch.Tensor:
    blocked = values
    for offset, block in enumerate(reversed(block_shape)):
        # From the last dimension back, so that the dimensions still to be split keep their place.
        dim = values.dim() - 1 - offset
        blocked = blocked.unflatten(dim, (values.size(dim) // block, block))
        scale = scale.unsqueeze(dim + 1)
    blocked.mul_(scale)
    return values
