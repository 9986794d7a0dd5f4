"""Launches of the Triton kernels: few pairs in three of them, many with the routing before."""

from __future__ import annotations

import torch
import triton

from vllm_sm12x import lowering
from vllm_sm12x.ops.interpreter import INTERPRETED
from vllm_sm12x.ops.mxfp4_experts import config
from vllm_sm12x.ops.mxfp4_experts.config import Product, Row
from vllm_sm12x.ops.mxfp4_experts.kernel import (
    local_experts_kernel,
    product_kernel,
    weighted_sum_kernel,
)
from vllm_sm12x.ops.mxfp4_experts.routing import Align, Routing, align_block_size

# Bound of the experts' results that are alive at a time.
RESULT_BUDGET_BYTES = 512 * 2**20

# Rows are read 16 bytes at a time.
_ALIGNMENT = 16

# Pairs a program of the kernel that looks up their experts.
LOCAL_BLOCK = 1024


def token_chunk(num_tokens: int, top_k: int, hidden_size: int) -> int:
    """Tokens that are worked on at a time, so that their results fit the budget."""
    most = max(1, RESULT_BUDGET_BYTES // (top_k * hidden_size * 4))
    chunks = max(1, -(-num_tokens // most))
    return max(1, -(-num_tokens // chunks))


def scratch_bytes(num_tokens: int, top_k: int, hidden_size: int, intermediate_size: int) -> int:
    """Bytes of the two intermediate results of a call, without the routing's few."""
    pairs = token_chunk(num_tokens, top_k, hidden_size) * top_k
    return pairs * (4 * hidden_size + 2 * intermediate_size)


def mxfp4_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    swiglu_limit: float | None = None,
    apply_router_weight_on_input: bool = False,
    expert_map: torch.Tensor | None = None,
    align: Align = align_block_size,
    row: Row | None = None,
) -> None:
    """As :func:`vllm_sm12x.ops.mxfp4_experts.mxfp4_experts`, whose checks came before.

    Does not synchronise with the host; what it allocates follows from shapes.

    Args:
        row: By default the table's. For tests and benchmarks.

    Raises:
        ValueError: The tensors are on no GPU, or rows are not where 16 bytes can be read at once.
    """
    if not hidden_states.is_cuda and not INTERPRETED.value:
        raise ValueError(
            f"hidden_states: device {hidden_states.device}, allowed in the Triton kernels: cuda"
        )
    _check_rows(hidden_states=hidden_states, w13=w13, w2=w2)
    w13_scale, w2_scale = w13_scale.view(torch.uint8), w2_scale.view(torch.uint8)
    for name, scale in (("w13_scale", w13_scale), ("w2_scale", w2_scale)):
        if scale.stride(-1) != 1 and scale.size(-1) > 1:
            raise ValueError(
                f"{name}: stride(-1) is {scale.stride(-1)}, allowed in the Triton kernels: 1"
            )
    capability = None
    if hidden_states.is_cuda:
        capability = torch.cuda.get_device_capability(hidden_states.device)
    num_tokens, top_k = topk_ids.shape
    chunk = token_chunk(num_tokens, top_k, hidden_states.size(1))
    for start in range(0, num_tokens, chunk):
        tokens = slice(start, start + chunk)
        _chunk(
            hidden_states[tokens],
            (w13, w13_scale),
            (w2, w2_scale),
            topk_weights[tokens].contiguous(),
            topk_ids[tokens].contiguous(),
            out[tokens],
            swiglu_limit,
            apply_router_weight_on_input,
            expert_map if expert_map is None else expert_map.contiguous(),
            align,
            row,
            capability,
        )


def _check_rows(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        size = tensor.element_size()
        strides = tensor.stride()[:-1]
        if tensor.data_ptr() % _ALIGNMENT or any(s * size % _ALIGNMENT for s in strides):
            raise ValueError(
                f"{name}: address {tensor.data_ptr():#x}, strides {tensor.stride()}, allowed in the"
                f" Triton kernels: rows at multiples of {_ALIGNMENT} bytes"
            )


def _chunk(
    hidden_states: torch.Tensor,
    w13: tuple[torch.Tensor, torch.Tensor],
    w2: tuple[torch.Tensor, torch.Tensor],
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    limit: float | None,
    on_input: bool,
    expert_map: torch.Tensor | None,
    align: Align,
    row: Row | None,
    capability: tuple[int, int] | None,
) -> None:
    num_tokens, hidden_size = hidden_states.shape
    top_k = topk_ids.size(1)
    pairs, experts = num_tokens * top_k, w2[0].size(0)
    device = hidden_states.device
    target = lowering.target_key(capability)
    if row is None:
        row = config.row(target, pairs, experts)
    total = config.SUM[target]
    options = lowering.launch_options(capability)
    mapped = 0 if expert_map is None else expert_map.numel()

    routing: Routing | None = None
    if row.most_pairs == 0:
        local = torch.empty((num_tokens, top_k), dtype=torch.int32, device=device)
        local_experts_kernel[(triton.cdiv(pairs, LOCAL_BLOCK),)](
            topk_ids, expert_map, local, pairs, mapped, experts, BLOCK=LOCAL_BLOCK, **options
        )
        topk_ids, expert_map, mapped = local, None, 0
        # One expert more, for pairs without one; its tiles are left out.
        routing = align(local, row.block_m, experts + 1)

    intermediate_size = 2 * w2[0].size(2)
    activation = torch.empty((pairs, intermediate_size), dtype=torch.bfloat16, device=device)
    result = torch.empty((pairs, hidden_size), dtype=torch.float32, device=device)
    of_pairs = (topk_ids, expert_map, routing, pairs, mapped, experts, top_k, row)
    _product(
        hidden_states,
        w13,
        activation,
        row.first,
        of_pairs,
        options,
        gated=True,
        router_weight=topk_weights if on_input else None,
        limit=limit,
    )
    _product(activation, w2, result, row.second, of_pairs, options, gated=False)
    weighted_sum_kernel[(num_tokens * triton.cdiv(hidden_size, total.block),)](
        result,
        None if on_input else topk_weights,
        topk_ids,
        expert_map,
        out,
        out.stride(0),
        mapped,
        experts,
        TOP_K=top_k,
        HIDDEN=hidden_size,
        BLOCK=total.block,
        num_warps=total.num_warps,
        **options,
    )


def _in_words(scale: torch.Tensor, columns: int, block_k: int) -> bool:
    """Whether a product's scales can be read four at a time."""
    strides = scale.stride()[:-1]
    return (
        block_k % 64 == 0
        and columns % block_k == 0
        and scale.size(-1) % 4 == 0
        and scale.data_ptr() % 4 == 0
        and all(stride % 4 == 0 for stride in strides)
    )


def _product(
    x: torch.Tensor,
    weight: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    how: Product,
    of_pairs: tuple,
    options: dict[str, object],
    *,
    gated: bool,
    router_weight: torch.Tensor | None = None,
    limit: float | None = None,
) -> None:
    topk_ids, expert_map, routing, pairs, mapped, experts, top_k, row = of_pairs
    values, scale = weight
    tiles = pairs if routing is None else routing[1].numel()
    words = x.view(torch.int32)
    in_words = _in_words(scale, 2 * words.size(1), how.block_k)
    if in_words:
        scale = scale.view(torch.int32)
    product_kernel[(tiles * triton.cdiv(values.size(1), how.block_n),)](
        words,
        words.stride(0),
        values,
        values.stride(0),
        values.stride(1),
        scale,
        scale.stride(0),
        scale.stride(1),
        out,
        router_weight,
        limit,
        topk_ids if routing is None else None,
        expert_map,
        *((None,) * 3 if routing is None else routing),
        pairs,
        mapped,
        experts,
        TOP_K=top_k,
        ROWS=out.size(1),
        COLUMNS=2 * words.size(1),
        GATED=gated,
        MOST_PAIRS=row.most_pairs,
        BLOCK_M=row.block_m,
        BLOCK_N=how.block_n,
        BLOCK_K=how.block_k,
        SCALE_WORDS=in_words,
        num_warps=how.num_warps,
        num_stages=how.num_stages,
        **options,
    )
