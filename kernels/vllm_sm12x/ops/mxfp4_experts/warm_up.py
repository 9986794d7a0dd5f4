"""Compiles what the experts launch; see :mod:`vllm_sm12x.ops.launching`."""

from __future__ import annotations

import torch

from vllm_sm12x.lowering import target_key
from vllm_sm12x.ops.launching import one_of_each, stand_in
from vllm_sm12x.ops.mxfp4_experts import Activations, config, mxfp4_experts
from vllm_sm12x.ops.mxfp4_experts.launch import token_chunk


def warm_up(
    tokens: int,
    top_k: int,
    ids_dtype: torch.dtype,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    swiglu_limit: float | None,
    apply_router_weight_on_input: bool,
    expert_map: torch.Tensor | None,
    activations: Activations,
    capability: tuple[int, int],
) -> None:
    """Call the operation once for each configuration that 1 to ``tokens`` tokens take.

    Args:
        tokens: The most tokens of a call.
        top_k: ``K``.
        ids_dtype: Of the expert numbers, int32 or int64.
        weights: ``w13``, ``w13_scale``, ``w2`` and ``w2_scale`` of the calls.
        swiglu_limit, apply_router_weight_on_input, expert_map, activations: As of the calls.
        capability: Of the GPU.
    """
    experts, hidden, _ = weights[2].shape
    target = target_key(capability)
    # More tokens are worked on in chunks, and no chunk is longer than the longest that is not cut.
    counts = (t for t in range(1, tokens + 1) if token_chunk(t, top_k, hidden) == t)
    float8 = activations == "float8"
    for count in one_of_each(counts, lambda t: config.row(target, t * top_k, experts, float8)):
        hidden_states = torch.empty(count, hidden, dtype=torch.bfloat16, device="meta")
        mxfp4_experts(
            hidden_states,
            *map(stand_in, weights),
            torch.empty(count, top_k, dtype=torch.float32, device="meta"),
            torch.empty(count, top_k, dtype=ids_dtype, device="meta"),
            torch.empty_like(hidden_states),
            swiglu_limit=swiglu_limit,
            apply_router_weight_on_input=apply_router_weight_on_input,
            expert_map=None if expert_map is None else stand_in(expert_map),
            activations=activations,
            implementation="triton",
        )
