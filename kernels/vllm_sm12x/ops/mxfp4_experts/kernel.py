"""MXFP4 experts in Triton: two grouped products and a weighted sum.

Weights are the left operand, so that a block's weight rows split over its warps and a nibble is
unpacked in the registers of the warp that multiplies it: to bfloat16 or, with activations of the
same type, to e4m3 (see ``bfloat16`` and ``float8``).

A tile is up to ``BLOCK_M`` pairs of a token and an expert, all of one expert. Few pairs find their
tiles themselves, inside the products; many are sorted before (see ``routing``). The rows of the
intermediate results are pairs, ``token * K + slot``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_sm12x.ops.mxfp4_experts import float8
from vllm_sm12x.ops.mxfp4_experts.bfloat16 import tile_sums
from vllm_sm12x.ops.prefetch import prefetch_l2

# Gate and up rows take turns of so many: a thread then has both of an activation, for its part of
# a matrix instruction's result is of two rows so far apart.
_TURN = tl.constexpr(8)

# These change from call to call, or are 1 in one call and not in the next; the pointers are of
# slices that begin at any pair. A kernel for each of their kinds would be compiled while serving.
_VARIABLE = ["pairs", "mapped", "experts", "ids_ptr", "map_ptr", "router_weight_ptr"]
_VARIABLE_IN_SUM = ["mapped", "experts", "ids_ptr", "map_ptr", "router_weight_ptr"]
_VARIABLE_IN_LOOKUP = ["pairs", "mapped", "experts", "ids_ptr", "map_ptr"]


@triton.jit
def _local_experts(ids_ptr, map_ptr, pair, inside, mapped, experts):
    """Index in the weights of each pair's expert, or ``experts`` where there is none."""
    expert = tl.load(ids_ptr + pair, mask=inside, other=-1).to(tl.int64)
    if map_ptr is not None:
        known = (expert >= 0) & (expert < mapped)
        expert = tl.load(map_ptr + tl.where(known, expert, 0), mask=known, other=-1).to(tl.int64)
    return tl.where((expert >= 0) & (expert < experts), expert, experts).to(tl.int32)


@triton.jit(do_not_specialize=_VARIABLE_IN_LOOKUP)
def local_experts_kernel(ids_ptr, map_ptr, local_ptr, pairs, mapped, experts, BLOCK: tl.constexpr):
    """``local[pair]``, int32 ``[pairs]``: index of its expert in the weights, ``experts`` for none.

    Args:
        ids_ptr: int32 or int64 ``[pairs]``.
        map_ptr: int32 or int64 ``[mapped]`` or None.
    """
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    pair = tl.where(inside, pair, 0)
    local = _local_experts(ids_ptr, map_ptr, pair, inside, mapped, experts)
    tl.store(local_ptr + pair, local, mask=inside)


@triton.jit
def _tile_of_pair(
    ids_ptr,
    map_ptr,
    pair,
    pairs,
    mapped,
    experts,
    BLOCK_M: tl.constexpr,
    MOST_PAIRS: tl.constexpr,
):
    """Expert of a pair, and the pairs of the tile that begins with it, or -1.

    A pair begins a tile where ``BLOCK_M`` times some number of earlier pairs have its expert; where
    it begins none, or has no expert, the expert is ``experts``.
    """
    every = tl.arange(0, MOST_PAIRS)
    inside = every < pairs
    local = _local_experts(ids_ptr, map_ptr, tl.where(inside, every, 0), inside, mapped, experts)
    expert = _local_experts(ids_ptr, map_ptr, pair, pair < pairs, mapped, experts)
    same = (local == expert) & inside
    rank = tl.cumsum(same.to(tl.int32), 0) - 1
    first = tl.sum(tl.where(every == pair, rank, 0), 0)
    wanted = first + tl.arange(0, BLOCK_M)
    hit = same[None, :] & (rank[None, :] == wanted[:, None])
    rows = tl.sum(tl.where(hit, every[None, :] + 1, 0), 1) - 1
    return tl.where(first % BLOCK_M == 0, expert, experts), rows


@triton.jit
def _store_columns(out_at, column, values, live, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """``values [columns, rows]`` where the rows are live and the columns below ``COLUMNS``."""
    inside = live[None, :]
    if not WHOLE:
        inside = inside & (column < COLUMNS)[:, None]
        column = tl.where(column < COLUMNS, column, 0)
    tl.store(out_at + column[:, None], values, mask=inside)


@triton.jit(do_not_specialize=_VARIABLE)
def product_kernel(
    x_ptr,
    x_stride,
    x_scale_ptr,
    weight_ptr,
    weight_expert_stride,
    weight_row_stride,
    scale_ptr,
    scale_expert_stride,
    scale_row_stride,
    out_ptr,
    router_weight_ptr,
    limit,
    ids_ptr,
    map_ptr,
    sorted_ptr,
    tile_expert_ptr,
    padded_ptr,
    pairs,
    mapped,
    experts,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    MOST_PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    SCALE_SLOTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """One tile of pairs by ``BLOCK_N`` rows of their expert's weight.

    ``tiles * cdiv(weight rows, BLOCK_N)`` programs. Strides are in elements; columns are
    neighbours.

    Args:
        x_ptr: int32, two bfloat16 each: ``[tokens, COLUMNS / 2]`` where ``GATED``, else
            ``[pairs, COLUMNS / 2]``. Or bfloat16 in halves, as ``halve_kernel`` in ``bfloat16``
            writes it. With ``x_scale_ptr`` e4m3 ``[tokens or pairs, COLUMNS]`` as
            :func:`vllm_sm12x.ops.mxfp4_experts.float8.quantize_kernel` writes it.
        x_scale_ptr: float32 ``[tokens or pairs]``, or None for bfloat16 activations.
        weight_ptr: uint8 ``[experts, 2 * ROWS if GATED else ROWS, COLUMNS / 2]``.
        scale_ptr: uint8 ``[experts, as weight_ptr, COLUMNS / 32]``; where ``SCALE_WORDS`` int32,
            four scales each.
        out_ptr: ``[pairs, ROWS]``. Where ``GATED`` bfloat16, ``silu(gate) * up``, with ``HALVES``
            in halves, else float32.
        router_weight_ptr: float32 ``[pairs]``, a factor of the gate and up, or None.
        limit: float32 that cuts the gate and up, or None.
        ids_ptr, map_ptr: As for :func:`local_experts_kernel`. Used where ``MOST_PAIRS`` is not 0.
        sorted_ptr, tile_expert_ptr, padded_ptr: int32, the routing, used where it is 0.
        GATED: The first product.
        MOST_PAIRS: Power of two of at least ``pairs``: program ``pair`` finds its own tile. 0: the
            routing says which pairs a tile has.
        BLOCK_M: Pairs a tile.
        HALVES: The first product's result is for a second that takes it in halves.
        BLOCK_N: Weight rows a program, where ``GATED`` half of them of the gate.
        BLOCK_K: Columns a step; 128 for e4m3 activations.
        SCALE_WORDS: Scales are read four at a time, which the pipeline can do ahead however few
            of them a step needs. Steps must be whole.
        SCALE_SLOTS: For e4m3 activations a power of two of at least ``COLUMNS / 128``.
        DEPENDENT: The kernels are launched as dependents of each other: each starts before the one
            before it ends, and waits for its end before it reads what that wrote.
        PREFETCH: The second product asks for so many lines of 128 bytes of each weight row, a power
            of two or 0, before it waits.
    """
    WEIGHT_ROWS: tl.constexpr = 2 * ROWS if GATED else ROWS
    BLOCKS: tl.constexpr = (WEIGHT_ROWS + BLOCK_N - 1) // BLOCK_N
    WHOLE: tl.constexpr = WEIGHT_ROWS % BLOCK_N == 0
    tile = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS

    if DEPENDENT:
        gdc_launch_dependents()
    if MOST_PAIRS > 0:
        expert, rows = _tile_of_pair(
            ids_ptr, map_ptr, tile, pairs, mapped, experts, BLOCK_M, MOST_PAIRS
        )
        live = rows >= 0
    else:
        if tile * BLOCK_M >= tl.load(padded_ptr):
            return
        expert = tl.load(tile_expert_ptr + tile)
        rows = tl.load(sorted_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        live = (rows >= 0) & (rows < pairs)
    if (expert < 0) | (expert >= experts):
        return
    # No address outside a tensor is formed, not even by lanes that a mask switches off.
    rows = tl.where(live, rows, 0).to(tl.int64)
    expert = expert.to(tl.int64)

    row = tl.arange(0, BLOCK_N)
    if GATED:
        output = block * (BLOCK_N // 2) + (row // (2 * _TURN)) * _TURN + row % _TURN
        output = tl.where(WHOLE | (output < ROWS), output, 0)
        weight_row = output + tl.where(row // _TURN % 2 == 0, 0, ROWS)
    else:
        output = block * BLOCK_N + row
        weight_row = tl.where(WHOLE | (output < ROWS), output, 0)
    x_row = rows // TOP_K if GATED else rows
    x_at = x_ptr + x_row[:, None] * x_stride
    weight_at = weight_ptr + expert * weight_expert_stride + weight_row[:, None] * weight_row_stride
    scale_at = scale_ptr + expert * scale_expert_stride + weight_row[:, None] * scale_row_stride

    if DEPENDENT and not GATED:
        if PREFETCH > 0:
            prefetch_l2(weight_at + 128 * tl.arange(0, PREFETCH)[None, :])
        gdc_wait()
    if x_scale_ptr is None:
        acc = tile_sums(
            x_at,
            live,
            weight_at,
            scale_at,
            COLUMNS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            SCALE_WORDS,
        )
    else:
        tl.static_assert(SCALE_WORDS and BLOCK_K == 128 and COLUMNS % BLOCK_K == 0)
        scale_at = scale_ptr + expert * scale_expert_stride + weight_row * scale_row_stride
        x_scale_at = x_scale_ptr + x_row
        acc = float8.tile_sums(
            x_at, live, x_scale_at, weight_at, scale_at, COLUMNS, SCALE_SLOTS, BLOCK_M, BLOCK_N
        )

    out_at = out_ptr + rows[None, :] * ROWS
    if not GATED:
        column = block * BLOCK_N + row
        _store_columns(out_at, column, acc, live, ROWS, WHOLE)
        return
    turns = tl.reshape(acc, [BLOCK_N // (2 * _TURN), 2, _TURN, BLOCK_M])
    gate, up = tl.split(tl.permute(turns, [0, 2, 3, 1]))
    if router_weight_ptr is not None:
        router_weight = tl.load(router_weight_ptr + rows, mask=live, other=0.0)
        gate *= router_weight[None, None, :]
        up *= router_weight[None, None, :]
    if limit is not None:
        # NaN compares false and stays.
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    activation = (gate * tl.sigmoid(gate) * up).to(tl.bfloat16)
    if HALVES:
        pairs_of_columns = tl.reshape(activation, [BLOCK_N // 4, 2, BLOCK_M])
        even, odd = tl.split(tl.permute(pairs_of_columns, [0, 2, 1]))
        column = block * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        _store_columns(out_at, column, even, live, ROWS // 2, WHOLE)
        _store_columns(out_at + ROWS // 2, column, odd, live, ROWS // 2, WHOLE)
    else:
        column = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        activation = tl.reshape(activation, [BLOCK_N // 2, BLOCK_M])
        _store_columns(out_at, column, activation, live, ROWS, WHOLE)


@triton.jit(do_not_specialize=_VARIABLE_IN_SUM)
def weighted_sum_kernel(
    result_ptr,
    router_weight_ptr,
    ids_ptr,
    map_ptr,
    out_ptr,
    out_stride,
    mapped,
    experts,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Sum of a token's experts, in the order of their slots, for ``BLOCK`` columns.

    ``tokens * cdiv(HIDDEN, BLOCK)`` programs.

    Args:
        result_ptr: float32 ``[tokens * TOP_K, HIDDEN]``; rows of pairs without an expert may hold
            anything.
        router_weight_ptr: float32 ``[tokens * TOP_K]``, or None for ones.
        ids_ptr, map_ptr: As for :func:`local_experts_kernel`.
        out_ptr: bfloat16 ``[tokens, HIDDEN]``.
    """
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    column = tl.where(inside, column, 0)
    total = tl.zeros([BLOCK], tl.float32)
    if DEPENDENT:
        gdc_wait()
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        routed = _local_experts(ids_ptr, map_ptr, pair, pair >= 0, mapped, experts) < experts
        value = tl.load(result_ptr + pair * HIDDEN + column, mask=inside & routed, other=0.0)
        if router_weight_ptr is not None:
            value *= tl.load(router_weight_ptr + pair, mask=routed, other=0.0)
        total += value
    tl.store(out_ptr + token * out_stride + column, total.to(tl.bfloat16), mask=inside)
