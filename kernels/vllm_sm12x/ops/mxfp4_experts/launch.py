"""Launches of the Triton kernels: few pairs in three of them, many with the routing before."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vllm_sm12x import lowering
from vllm_sm12x.ops.integers import cdiv, next_power_of_2
from vllm_sm12x.ops.launch_cache import launch
from vllm_sm12x.ops.launching import capability_of
from vllm_sm12x.ops.mxfp4_experts import config
from vllm_sm12x.ops.mxfp4_experts.bfloat16 import halve_kernel
from vllm_sm12x.ops.mxfp4_experts.config import Product, Row
from vllm_sm12x.ops.mxfp4_experts.float8 import quantize_kernel
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

# Columns of e4m3 activations come in steps of so many.
_FLOAT8_STEP = 128
QUANTIZE_WARPS = 4


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a token and an expert, and how they become tiles."""

    count: int
    top_k: int
    experts: int
    ids: torch.Tensor
    expert_map: torch.Tensor | None
    routing: Routing | None
    row: Row
    options: dict[str, object]

    @property
    def dependent_options(self) -> dict[str, object]:
        """Of kernels that start before the one before them ends."""
        return {"launch_pdl": True} if self.row.dependent else {}

    @property
    def mapped(self) -> int:
        return 0 if self.expert_map is None else self.expert_map.numel()


def token_chunk(num_tokens: int, top_k: int, hidden_size: int) -> int:
    """Tokens that are worked on at a time, so that their results fit the budget."""
    most = max(1, RESULT_BUDGET_BYTES // (top_k * hidden_size * 4))
    chunks = max(1, cdiv(num_tokens, most))
    return max(1, cdiv(num_tokens, chunks))


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
    float8: bool = False,
    row: Row | None = None,
) -> None:
    """As :func:`vllm_sm12x.ops.mxfp4_experts.mxfp4_experts`, whose checks came before.

    Does not synchronise with the host; what it allocates follows from shapes.

    Args:
        float8: Whether many pairs are multiplied with activations of e4m3.
        row: By default the table's. For tests and benchmarks.

    Raises:
        ValueError: The tensors are on no GPU, rows are not where 16 bytes can be read at once, or
            ``float8`` is not possible for the shape.
    """
    capability = capability_of("hidden_states", hidden_states, "Triton kernels")
    _check_rows(hidden_states=hidden_states, w13=w13, w2=w2)
    w13_scale, w2_scale = w13_scale.view(torch.uint8), w2_scale.view(torch.uint8)
    for name, scale in (("w13_scale", w13_scale), ("w2_scale", w2_scale)):
        if scale.stride(-1) != 1 and scale.size(-1) > 1:
            raise ValueError(
                f"{name}: stride(-1) is {scale.stride(-1)}, allowed in the Triton kernels: 1"
            )
    if float8:
        _check_float8(hidden_states.size(1), 2 * w2.size(2), (w13_scale, w2_scale))
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
            float8,
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


def _check_float8(
    hidden_size: int, intermediate_size: int, scales: tuple[torch.Tensor, ...]
) -> None:
    for name, size in (("hidden_states: H", hidden_size), ("w2: I", intermediate_size)):
        if size % _FLOAT8_STEP:
            raise ValueError(
                f"{name} is {size}, allowed with activations of float8: multiples of {_FLOAT8_STEP}"
            )
    for name, scale in zip(("w13_scale", "w2_scale"), scales, strict=True):
        if not _in_words(scale, scale.size(-1) * 32, _FLOAT8_STEP):
            raise ValueError(
                f"{name}: address {scale.data_ptr():#x}, strides {scale.stride()}, allowed with"
                " activations of float8: rows at multiples of 4 bytes"
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
    float8: bool,
    row: Row | None,
    capability: tuple[int, int],
) -> None:
    num_tokens, hidden_size = hidden_states.shape
    device = hidden_states.device
    target = lowering.target_key(capability)
    pairs = topk_ids.numel()
    experts = w2[0].size(0)
    if row is None:
        row = config.row(target, pairs, experts, float8)
        float8 = float8 and row.most_pairs == 0
    of = _Pairs(
        pairs,
        topk_ids.size(1),
        experts,
        topk_ids,
        expert_map,
        None,
        row,
        lowering.launch_options(capability),
    )
    if row.most_pairs == 0:
        of = _sorted(of, align)

    intermediate_size = 2 * w2[0].size(2)
    activation = torch.empty((pairs, intermediate_size), dtype=torch.bfloat16, device=device)
    result = torch.empty((pairs, hidden_size), dtype=torch.float32, device=device)
    router_weight = topk_weights if on_input else None
    # The result comes after the first product, in whose time its memory has the halves.
    x = _operand(hidden_states, float8, of, result)
    _product(x, w13, activation, row.first, of, True, router_weight, limit)
    halved = row.halves and not float8
    second = (activation, None) if halved else _operand(activation, float8, of)
    _product(second, w2, result, row.second, of, False)
    total = config.SUM[target]
    launch(
        weighted_sum_kernel,
        (num_tokens * cdiv(hidden_size, total.block), 1, 1),
        result,
        None if on_input else topk_weights,
        of.ids,
        of.expert_map,
        out,
        out.stride(0),
        of.mapped,
        experts,
        TOP_K=of.top_k,
        HIDDEN=hidden_size,
        BLOCK=total.block,
        DEPENDENT=row.dependent,
        num_warps=total.num_warps,
        **of.dependent_options,
        **of.options,
    )


def _sorted(of: _Pairs, align: Align) -> _Pairs:
    """The same pairs with the routing."""
    local = torch.empty(of.ids.shape, dtype=torch.int32, device=of.ids.device)
    launch(
        local_experts_kernel,
        (cdiv(of.count, LOCAL_BLOCK), 1, 1),
        of.ids,
        of.expert_map,
        local,
        of.count,
        of.mapped,
        of.experts,
        BLOCK=LOCAL_BLOCK,
        **of.options,
    )
    # One expert more, for pairs without one; its tiles are left out.
    routing = align(local, of.row.block_m, of.experts + 1)
    return replace(of, ids=local, expert_map=None, routing=routing)


def _operand(
    x: torch.Tensor, float8: bool, of: _Pairs, memory: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Activations as a product takes them, and their scales where they are e4m3.

    Args:
        memory: For halves; at least as many bytes as ``x``.
    """
    rows, columns = x.shape
    if memory is not None and of.row.halves and not float8:
        halves = memory.view(x.dtype).flatten()[: rows * columns].view(rows, columns)
        launch(
            halve_kernel,
            (rows, 1, 1),
            x,
            x.stride(0),
            halves,
            COLUMNS=columns,
            BLOCK=next_power_of_2(columns),
            num_warps=QUANTIZE_WARPS,
            **of.options,
        )
        return halves, None
    if not float8:
        return x.view(torch.int32), None
    values = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    launch(
        quantize_kernel,
        (rows, 1, 1),
        x,
        x.stride(0),
        values,
        scale,
        COLUMNS=columns,
        BLOCK=next_power_of_2(columns),
        num_warps=QUANTIZE_WARPS,
        **of.options,
    )
    return values, scale


def prefetch_lines(row: Row, columns: int) -> int:
    """Lines of 128 bytes to ask for: the configured ones, or the power of two that a row has."""
    whole = columns // 256
    return min(row.lines, 1 << (whole.bit_length() - 1)) if whole else 0


def _product(
    operand: tuple[torch.Tensor, torch.Tensor | None],
    weight: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    how: Product,
    of: _Pairs,
    gated: bool,
    router_weight: torch.Tensor | None = None,
    limit: float | None = None,
) -> None:
    x, x_scale = operand
    values, scale = weight
    columns = 2 * values.size(2)
    tiles = of.count if of.routing is None else of.routing[1].numel()
    in_words = _in_words(scale, columns, how.block_k)
    if in_words:
        scale = scale.view(torch.int32)
    launch(
        product_kernel,
        (tiles * cdiv(values.size(1), how.block_n), 1, 1),
        x,
        x.stride(0),
        x_scale,
        values,
        values.stride(0),
        values.stride(1),
        scale,
        scale.stride(0),
        scale.stride(1),
        out,
        router_weight,
        limit,
        of.ids if of.routing is None else None,
        of.expert_map,
        *((None,) * 3 if of.routing is None else of.routing),
        of.count,
        of.mapped,
        of.experts,
        TOP_K=of.top_k,
        ROWS=out.size(1),
        COLUMNS=columns,
        GATED=gated,
        MOST_PAIRS=of.row.most_pairs,
        BLOCK_M=of.row.block_m,
        HALVES=gated and x.dtype == torch.bfloat16,
        BLOCK_N=how.block_n,
        BLOCK_K=how.block_k,
        SCALE_WORDS=in_words,
        SCALE_SLOTS=0 if x_scale is None else next_power_of_2(columns // _FLOAT8_STEP),
        DEPENDENT=of.row.dependent,
        PREFETCH=0 if gated else prefetch_lines(of.row, columns),
        num_warps=how.num_warps,
        num_stages=how.num_stages,
        maxnreg=how.maxnreg,
        **({} if gated else of.dependent_options),
        **of.options,
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
