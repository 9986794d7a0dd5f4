"""Sparse MLA prefill in Gluon, 32 heads a program, two programs a multiprocessor.

Arguments and results are those of the Triton kernel in ``prefill_kernel``. The queries stay in
registers. While one program waits, for a copy, a barrier or its softmax, the other multiplies: no
round of the loop overlaps the next, so that two tiles of keys are enough and shared memory holds
both programs.

The 512 columns are cut into ``PARTS`` parts, each for an equal share of the warps. A warp's scores
are sums over its part; they are added up through shared memory.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from vllm_sm12x.ops.sparse_mla.softmax_gluon import middle, weigh

_LOG2_E = gl.constexpr(math.log2(math.e))
_LN_2 = gl.constexpr(math.log(2))

# These change from call to call, or are 1 in one call and not in the next: a kernel for each of
# their kinds would be compiled while serving. In the Triton kernel too.
VARIABLE = [
    "indices_ptr",
    "lens_ptr",
    "sink_ptr",
    "lse_ptr",
    "rows",
    "width",
    "indices_stride",
    "lens_stride",
    "sink_stride",
    "lse_token_stride",
    "lse_head_stride",
]


@gluon.jit
def _load_rows(indices_ptr, start, count, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Rows of ``kv`` that the tile at ``start`` names, int32 ``[BLOCK_N]``; -1 beyond ``count``.

    They are looked at where they are used, a round later: to compare them here would be to wait.
    """
    entry = start + gl.arange(0, BLOCK_N, layout=layout)
    inside = entry < count
    return gl.load(indices_ptr + gl.where(inside, entry, 0), mask=inside, other=-1)


@gluon.jit
def _is_row(row, rows):
    """Which of the numbers are rows of ``kv``."""
    return (row >= 0) & (row < rows)


@gluon.jit
def _start_copy(keys, kv_ptr, kv_stride, row, rows, column):
    """Start to copy rows of ``kv`` to shared memory ``[PARTS, n, columns]``; zeros for no row."""
    named = _is_row(row, rows)
    pointers = kv_ptr + middle(gl.where(named, row, 0).to(gl.int64) * kv_stride) + column
    async_copy.async_copy_global_to_shared(keys, pointers, mask=middle(named))
    async_copy.commit_group()


@gluon.jit(do_not_specialize=VARIABLE)
def prefill_kernel(
    q_ptr,
    kv_ptr,
    indices_ptr,
    lens_ptr,
    sink_ptr,
    out_ptr,
    lse_ptr,
    softmax_scale,
    rows,
    width,
    q_token_stride,
    q_head_stride,
    kv_stride,
    indices_stride,
    lens_stride,
    sink_stride,
    out_token_stride,
    out_head_stride,
    lse_token_stride,
    lse_head_stride,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_H: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """As ``prefill_kernel.prefill_kernel``; ``STAGES`` tiles of keys are in shared memory."""
    WARPS: gl.constexpr = gl.num_warps()
    COLUMNS: gl.constexpr = HEAD_DIM // PARTS
    # Both products: a part of the columns for WARPS / PARTS warps, which lie along the last axis.
    product: gl.constexpr = gl.NVMMADistributedLayout(
        [2, 0], [PARTS, 1, WARPS // PARTS], [1, 16, 8]
    )
    left: gl.constexpr = gl.DotOperandLayout(0, product, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, product, 2)
    # Scores once they are added up: all parts of a score in one thread, eight heads a warp.
    summed: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1, WARPS], [1, 16, 8])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    # Where rows are shorter than the 128 bytes of all banks, several share a phase.
    weights_swizzled: gl.constexpr = gl.SwizzledSharedLayout(
        8, max(1, 64 // BLOCK_H), min(8, BLOCK_H // 8), [2, 1, 0]
    )
    scores_swizzled: gl.constexpr = gl.SwizzledSharedLayout(
        8, max(1, 32 // BLOCK_H), min(8, BLOCK_H // 8), [2, 1, 0]
    )
    LANES: gl.constexpr = min(32, COLUMNS // 8)
    blocked: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [1, 32 // LANES, LANES], [1, WARPS, 1], [2, 1, 0]
    )
    copied_rows: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, blocked))
    summed_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, summed))
    summed_heads: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, summed))
    out_heads: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, product))

    # Blocks of one token are neighbours: they read the same keys at about the same time.
    head_blocks: gl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    token = (gl.program_id(0) // head_blocks).to(gl.int64)
    first_head = (gl.program_id(0) % head_blocks) * BLOCK_H
    count = gl.minimum(gl.load(lens_ptr + token * lens_stride), width)
    indices_ptr += token * indices_stride
    part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, blocked)))
    part = gl.expand_dims(gl.expand_dims(part, 1), 2)
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(0, blocked)))
    column = part * COLUMNS + gl.expand_dims(gl.expand_dims(column, 0), 0)

    keys = gl.allocate_shared_memory(gl.bfloat16, [STAGES, PARTS, BLOCK_N, COLUMNS], swizzled)
    for i in gl.static_range(STAGES - 1):
        row = _load_rows(indices_ptr, i * BLOCK_N, count, BLOCK_N, copied_rows)
        _start_copy(keys.index(i), kv_ptr, kv_stride, row, rows, column)
    row = _load_rows(indices_ptr, (STAGES - 1) * BLOCK_N, count, BLOCK_N, copied_rows)
    named = _load_rows(indices_ptr, 0, count, BLOCK_N, summed_rows)

    # The queries go through shared memory that scores and weights have later, in halves of each
    # part's columns, so that they fit beside the keys.
    HALF: gl.constexpr = COLUMNS // 2
    half_lanes: gl.constexpr = min(32, HALF // 8)
    halves: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [1, 32 // half_lanes, half_lanes], [1, WARPS, 1], [2, 1, 0]
    )
    head = first_head + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(0, gl.SliceLayout(2, halves)))
    head_inside = middle(head < HEADS)
    head = middle(gl.where(head < HEADS, head, 0))
    half = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, halves)))
    half = gl.expand_dims(gl.expand_dims(half, 1), 2) * COLUMNS
    within = gl.arange(0, HALF, layout=gl.SliceLayout(0, gl.SliceLayout(0, halves)))
    q_ptr += token * q_token_stride
    pointers = q_ptr + head * q_head_stride + (half + gl.expand_dims(gl.expand_dims(within, 0), 0))
    first_half = gl.load(pointers, mask=head_inside, other=0.0)
    second_half = gl.load(pointers + HALF, mask=head_inside, other=0.0)
    staged = gl.allocate_shared_memory(gl.bfloat16, [PARTS, BLOCK_H, HALF], swizzled)
    staged.store(first_half)
    first_queries = staged.permute((0, 2, 1)).load(right)
    staged.store(second_half)
    second_queries = staged.permute((0, 2, 1)).load(right)

    weights = gl.allocate_shared_memory(gl.bfloat16, [PARTS, BLOCK_N, BLOCK_H], weights_swizzled)
    scores_of_parts = gl.allocate_shared_memory(
        gl.float32, [PARTS, BLOCK_N, BLOCK_H], scores_swizzled
    )
    shrinks = gl.allocate_shared_memory(
        gl.float32, [BLOCK_H], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    # Warps with heads of their own.
    HEAD_WARPS: gl.constexpr = min(WARPS, BLOCK_H // 8)
    grown_warps = gl.allocate_shared_memory(
        gl.int32, [HEAD_WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    every_thread: gl.constexpr = gl.BlockedLayout([HEAD_WARPS], [32], [WARPS], [0])
    nothing = gl.zeros([PARTS, BLOCK_N, BLOCK_H], gl.float32, layout=product)
    scale = softmax_scale * _LOG2_E
    acc = gl.zeros([PARTS, BLOCK_H, COLUMNS], gl.float32, layout=product)
    largest = gl.full([BLOCK_H], float("-inf"), gl.float32, layout=summed_heads)
    totals = gl.zeros([BLOCK_N, BLOCK_H], gl.float32, layout=gl.SliceLayout(0, summed))
    now = 0
    free = STAGES - 1
    for start in range(0, count, BLOCK_N):
        async_copy.wait_group(STAGES - 2)
        tile = keys.index(now)
        scores = mma_v2(tile.slice(0, HALF, dim=2).load(left), first_queries, nothing)
        scores = mma_v2(tile.slice(HALF, HALF, dim=2).load(left), second_queries, scores)
        scores_of_parts.store(scores)
        scores = gl.sum(scores_of_parts.load(summed), 0)
        # Here, where the barrier of the scores has just ended every use of the memory and that of
        # the weights is still to come, the copy needs no barrier of its own.
        _start_copy(keys.index(free), kv_ptr, kv_stride, row, rows, column)
        row = _load_rows(indices_ptr, start + STAGES * BLOCK_N, count, BLOCK_N, copied_rows)

        is_key = gl.expand_dims(_is_row(named, rows), 1)
        scores = gl.where(is_key, scores * scale, float("-inf"))
        named = _load_rows(indices_ptr, start + BLOCK_N, count, BLOCK_N, summed_rows)
        largest, totals = weigh(scores, largest, totals, weights, shrinks, grown_warps)

        if gl.max(grown_warps.load(every_thread), 0) > 0:
            acc = acc * middle(shrinks.load(out_heads))
        spread = weights.permute((0, 2, 1)).load(left)
        acc = mma_v2(spread, tile.load(right), acc)
        now = gl.where(now + 1 == STAGES, 0, now + 1)
        free = gl.where(free + 1 == STAGES, 0, free + 1)
    async_copy.wait_group(0)

    total = gl.sum(totals, 0)
    # The sink joins the denominator alone. Against a very large one the share is 1 / inf = 0.
    summed_head = first_head + gl.arange(0, BLOCK_H, layout=summed_heads)
    summed_inside = summed_head < HEADS
    summed_head = gl.where(summed_inside, summed_head, 0)
    sink = gl.load(sink_ptr + summed_head * sink_stride) * _LOG2_E
    shift = gl.where(largest == float("-inf"), 0.0, largest)
    # Without a key the sum is 0; with a sink of -inf that would be 0 * (1 / 0).
    share = gl.where(total == 0.0, 0.0, 1.0 / (total + gl.exp2(sink - shift)))
    result = (acc * middle(gl.convert_layout(share, out_heads))).to(gl.bfloat16)
    head = first_head + gl.arange(0, BLOCK_H, layout=copied_rows)
    head_inside = middle(head < HEADS)
    head = middle(gl.where(head < HEADS, head, 0))
    gl.store(
        out_ptr + token * out_token_stride + head * out_head_stride + column,
        gl.convert_layout(result, blocked),
        mask=head_inside,
    )
    if lse_ptr is not None:
        lse = (largest + gl.log2(total)) * _LN_2
        lse_ptr += token * lse_token_stride
        gl.store(lse_ptr + summed_head * lse_head_stride, lse, mask=summed_inside)
