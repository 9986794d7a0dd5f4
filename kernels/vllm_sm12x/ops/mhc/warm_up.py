"""Compiles what the hyper-connections launch; see :mod:`vllm_sm12x.ops.launching`."""

from __future__ import annotations

import torch

from vllm_sm12x.lowering import target_key
from vllm_sm12x.ops.launching import one_of_each, stand_in
from vllm_sm12x.ops.mhc import hc_head, mhc_fused_post_pre, mhc_post, mhc_pre
from vllm_sm12x.ops.mhc.config import configs

# Any number does: none of them makes another kernel.
_FACTORS = (1e-6, 1e-6, 1e-6, 2.0, 1)


def warm_up_layer(
    tokens: int,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    norm_weight: torch.Tensor,
    capability: tuple[int, int],
) -> None:
    """Call what a layer calls, once for each configuration that 1 to ``tokens`` tokens take.

    That is ``mhc_pre`` and ``mhc_fused_post_pre``, both with a norm, and ``mhc_post``.

    Args:
        tokens: The most tokens of a call.
        fn, hc_scale, hc_base, norm_weight: As of the calls.
        capability: Of the GPU.
    """
    hidden = norm_weight.size(0)
    mult = fn.size(1) // hidden
    mapping = (stand_in(fn), stand_in(hc_scale), stand_in(hc_base), *_FACTORS)
    norm = {"norm_weight": stand_in(norm_weight)}
    for count in _counts(tokens, capability):
        residual = torch.empty(count, mult, hidden, dtype=torch.bfloat16, device="meta")
        x = torch.empty(count, hidden, dtype=torch.bfloat16, device="meta")
        post, comb, _ = mhc_pre(residual, *mapping, **norm, implementation="triton")
        mhc_post(x, residual, post, comb, implementation="triton")
        mhc_fused_post_pre(x, residual, post, comb, *mapping, **norm, implementation="triton")


def warm_up_head(
    tokens: int,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    capability: tuple[int, int],
) -> None:
    """The same for ``hc_head``; the tensors are as of the calls."""
    mult = hc_base.size(0)
    hidden = hc_fn.size(1) // mult
    for count in _counts(tokens, capability):
        streams = torch.empty(count, mult, hidden, dtype=torch.bfloat16, device="meta")
        hc_head(
            streams,
            stand_in(hc_fn),
            stand_in(hc_scale),
            stand_in(hc_base),
            1e-6,
            1e-6,
            implementation="triton",
        )


def _counts(tokens: int, capability: tuple[int, int]) -> list[int]:
    target = target_key(capability)
    return one_of_each(range(1, tokens + 1), lambda t: configs(target, t))
