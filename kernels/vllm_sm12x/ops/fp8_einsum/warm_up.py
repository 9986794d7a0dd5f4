"""Compiles what the einsum launches; see :mod:`vllm_sm12x.ops.launching`."""

from __future__ import annotations

import torch

from vllm_sm12x.lowering import target_key
from vllm_sm12x.ops.fp8_einsum import fp8_einsum_bhr_hdr
from vllm_sm12x.ops.fp8_einsum.config import einsum_config
from vllm_sm12x.ops.fp8_einsum.reference import BLOCK
from vllm_sm12x.ops.launching import one_of_each, stand_in


def warm_up(
    tokens: int,
    groups: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    capability: tuple[int, int],
) -> None:
    """Call the einsum once for each configuration that 1 to ``tokens`` tokens take.

    Args:
        tokens: The most tokens of a call.
        groups: ``G``.
        weight: ``b`` of the calls.
        weight_scale: ``b_scale`` of the calls.
        capability: Of the GPU.
    """
    target = target_key(capability)
    k, n = weight.size(-1), weight.numel() // weight.size(-1) // groups
    for count in one_of_each(range(1, tokens + 1), lambda t: einsum_config(target, t)):
        a = torch.empty(groups, count, k, dtype=torch.float8_e4m3fn, device="meta")
        fp8_einsum_bhr_hdr(
            a.transpose(0, 1),
            torch.empty(count, groups, k // BLOCK, dtype=torch.float32, device="meta"),
            stand_in(weight),
            stand_in(weight_scale),
            torch.empty(count, groups, n, dtype=torch.bfloat16, device="meta"),
            implementation="triton",
        )
