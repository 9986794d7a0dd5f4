"""Compiles what the compressor launches; see :mod:`vllm_sm12x.ops.launching`."""

from __future__ import annotations

import torch

from vllm_sm12x.ops.compressor import compress_to_cache
from vllm_sm12x.ops.launching import stand_in


def warm_up(
    state_cache: torch.Tensor,
    norm_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    cache: torch.Tensor,
    compress_ratio: int,
    overlap: bool,
) -> None:
    """Call the operation once: for a window all calls take one configuration.

    Args:
        state_cache, norm_weight, cos_sin_cache, cache, compress_ratio, overlap: As of the calls.
    """
    tokens = torch.empty(2, dtype=torch.int64, device="meta")
    compress_to_cache(
        stand_in(state_cache),
        tokens.to(torch.int32),
        tokens,
        tokens,
        torch.empty(1, 1, dtype=torch.int32, device="meta"),
        stand_in(norm_weight),
        1e-6,
        stand_in(cos_sin_cache),
        stand_in(cache),
        tokens,
        compress_ratio,
        overlap,
        implementation="triton",
    )
