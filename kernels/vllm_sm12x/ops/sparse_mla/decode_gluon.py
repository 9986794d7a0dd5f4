"""Sparse MLA decode in Gluon, for 16, 32 or 64 heads a program, with layouts chosen by hand.

Arguments and results are those of the Triton kernel in ``decode_kernel``. What the two differ in: a
program takes up to 64 heads, so that a key is read and made bfloat16 once for all of them, the
queries stay in registers, and the products of one tile of keys fill the time that the softmax of
the tile before takes.

The 512 columns are cut into ``PARTS`` parts, each for an equal share of the warps. A warp's scores
are sums over its part; they are added up through shared memory. Three tiles of keys are in flight::

    tile i      weights times keys
    tile i + 1  queries times keys (its scores are needed in the next round)
    tile i + 2  e4m3 codes, scales and rotated part made bfloat16, in shared memory
    tile i + 3  on the way from global memory, as it lies there
    tile i + 4  its copy starts where tile i + 2 was
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from vllm_sm12x.ops.fp8_ds_mla.layout import DATA_BYTES, HEAD_DIM, NOPE_DIM, ROPE_DIM
from vllm_sm12x.ops.sparse_mla.softmax_gluon import middle, weigh

_DATA_BYTES = gl.constexpr(DATA_BYTES)
_HEAD_DIM = gl.constexpr(HEAD_DIM)
_NOPE_DIM = gl.constexpr(NOPE_DIM)
_ROPE_DIM = gl.constexpr(ROPE_DIM)
_GROUPS = gl.constexpr(HEAD_DIM // ROPE_DIM)
_LOG2_E = gl.constexpr(math.log2(math.e))
_LN_2 = gl.constexpr(math.log(2))

# As in the Triton kernel: no load gets wider by knowing more of these.
_PLAIN = [
    "swa_shift",
    "swa_capacity",
    "swa_indices",
    "swa_row",
    "swa_width",
    "swa_lens",
    "swa_lens_stride",
    "extra_shift",
    "extra_capacity",
    "extra_indices",
    "extra_row",
    "extra_width",
    "extra_lens",
    "extra_lens_stride",
    "sink",
    "sink_stride",
    "lse",
    "lse_token",
    "lse_head",
    "heads",
    "splits",
]


@gluon.jit
def _load_slots(
    tile,
    last,
    swa_tiles,
    swa_indices,
    swa_count,
    extra_indices,
    extra_count,
    HAS_EXTRA: gl.constexpr,
    BLOCK_N: gl.constexpr,
    layout: gl.constexpr,
):
    """Slots that a tile names, int32 ``[BLOCK_N]``; -1 beyond its keys, and from ``last`` on.

    They are looked at where they are used, a round later: to compare them here would be to wait.
    """
    indices, count, start = swa_indices, swa_count, tile * BLOCK_N
    if HAS_EXTRA:  # noqa: SIM102 (one is known when compiling, one is not)
        if tile >= swa_tiles:
            indices, count = extra_indices, extra_count
            start = (tile - swa_tiles) * BLOCK_N
    entry = start + gl.arange(0, BLOCK_N, layout=layout)
    inside = (entry < count) & (tile < last)
    return gl.load(indices + gl.where(inside, entry, 0), mask=inside, other=-1)


@gluon.jit
def _is_slot(slot, tile, swa_tiles, swa_capacity, extra_capacity, HAS_EXTRA: gl.constexpr):
    """Which of a tile's slots are in their cache."""
    capacity = swa_capacity
    if HAS_EXTRA:  # noqa: SIM102 (one is known when compiling, one is not)
        if tile >= swa_tiles:
            capacity = extra_capacity
    return (slot >= 0) & (slot < capacity)


@gluon.jit
def _start_copy(
    raw,
    slot,
    tile,
    swa_tiles,
    swa_cache,
    swa_page_bytes,
    swa_shift,
    swa_capacity,
    extra_cache,
    extra_page_bytes,
    extra_shift,
    extra_capacity,
    HAS_EXTRA: gl.constexpr,
    codes_layout: gl.constexpr,
    part_layout: gl.constexpr,
    scales_layout: gl.constexpr,
):
    """Start to copy the keys in ``slot`` (``[n]``) as they lie; zeros where that is no slot.

    ``raw`` is shared memory: codes uint8 ``[n, 512]``, of which the last 64 stay as they are,
    rotated part bfloat16 ``[n, 512 / PARTS]``, of which the last 64 are written, and exponents
    uint8 ``[n, 8]``.
    """
    codes, rotated, exponents = raw
    cache, page_bytes, shift = swa_cache, swa_page_bytes, swa_shift
    if HAS_EXTRA:  # noqa: SIM102 (one is known when compiling, one is not)
        if tile >= swa_tiles:
            cache, page_bytes, shift = extra_cache, extra_page_bytes, extra_shift
    valid = _is_slot(slot, tile, swa_tiles, swa_capacity, extra_capacity, HAS_EXTRA)
    slot = gl.where(valid, slot, 0)
    page = (slot >> shift).to(gl.int64) * page_bytes
    within = slot & ((1 << shift) - 1)
    data = page + within * _DATA_BYTES
    scales = page + ((_DATA_BYTES << shift) + within * 8)

    column = gl.expand_dims(gl.arange(0, _HEAD_DIM, layout=gl.SliceLayout(0, codes_layout)), 0)
    row = gl.expand_dims(gl.convert_layout(data, gl.SliceLayout(1, codes_layout)), 1)
    mask = gl.expand_dims(gl.convert_layout(valid, gl.SliceLayout(1, codes_layout)), 1)
    mask = mask & (column < _NOPE_DIM)
    async_copy.async_copy_global_to_shared(codes, cache + row + column, mask=mask)

    first: gl.constexpr = rotated.shape[1] - _ROPE_DIM
    column = gl.arange(0, rotated.shape[1], layout=gl.SliceLayout(0, part_layout))
    column = gl.expand_dims(column, 0)
    row = gl.expand_dims(gl.convert_layout(data, gl.SliceLayout(1, part_layout)), 1)
    mask = gl.expand_dims(gl.convert_layout(valid, gl.SliceLayout(1, part_layout)), 1)
    mask = mask & (column >= first)
    pointers = (cache + row + _NOPE_DIM).to(gl.pointer_type(gl.bfloat16)) + (column - first)
    async_copy.async_copy_global_to_shared(rotated, pointers, mask=mask)

    column = gl.expand_dims(gl.arange(0, 8, layout=gl.SliceLayout(0, scales_layout)), 0)
    row = gl.expand_dims(gl.convert_layout(scales, gl.SliceLayout(1, scales_layout)), 1)
    mask = gl.expand_dims(gl.convert_layout(valid, gl.SliceLayout(1, scales_layout)), 1)
    mask = mask & (column >= 0)
    async_copy.async_copy_global_to_shared(exponents, cache + row + column, mask=mask)
    async_copy.commit_group()


@gluon.jit
def _make_keys(
    keys,
    raw,
    PARTS: gl.constexpr,
    AT_ONCE: gl.constexpr,
    blocked: gl.constexpr,
    groups_layout: gl.constexpr,
):
    """Make bfloat16 ``[PARTS, n, 512 / PARTS]`` in shared memory of what was copied.

    ``AT_ONCE`` parts at a time, which a thread holds in registers. The compiler puts a barrier
    between one store and the next.
    """
    codes, rotated, exponents = raw
    rows: gl.constexpr = rotated.shape[0]
    columns: gl.constexpr = rotated.shape[1]
    groups: gl.constexpr = _GROUPS // PARTS
    for first in gl.static_range(0, PARTS, AT_ONCE):
        exponent = exponents.reshape([rows, PARTS, groups]).permute([1, 0, 2])
        exponent = exponent.slice(first, AT_ONCE, dim=0)
        exponent = exponent.load(gl.SliceLayout(3, groups_layout)).to(gl.int32)
        # E8M0: the float32 with these exponent bits, save 2**-127, which is subnormal, and NaN.
        bits = gl.where(exponent == 0, 0x0040_0000, exponent << 23)
        bits = gl.where(exponent == 255, 0x7FC0_0000, bits)
        scale = gl.expand_dims(bits.to(gl.float32, bitcast=True), 3)
        scale = scale.broadcast_to([AT_ONCE, rows, groups, _ROPE_DIM])
        scale = gl.reshape(scale, [AT_ONCE, rows, columns])
        scale = gl.convert_layout(scale, blocked, assert_trivial=True)
        code = codes.reshape([rows, PARTS, columns]).permute([1, 0, 2])
        code = code.slice(first, AT_ONCE, dim=0).load(blocked)
        value = code.to(gl.float8e4nv, bitcast=True).to(gl.float32) * scale
        value = value.to(gl.bfloat16)
        if first + AT_ONCE == PARTS:
            part = gl.arange(0, AT_ONCE, layout=gl.SliceLayout(1, gl.SliceLayout(2, blocked)))
            column = gl.arange(0, columns, layout=gl.SliceLayout(0, gl.SliceLayout(0, blocked)))
            is_last = gl.expand_dims(gl.expand_dims(part, 1), 2) == AT_ONCE - 1
            column = gl.expand_dims(gl.expand_dims(column, 0), 0)
            last = gl.expand_dims(rotated.load(gl.SliceLayout(0, blocked)), 0)
            last = last.broadcast_to([AT_ONCE, rows, columns])
            value = gl.where(is_last & (column >= columns - _ROPE_DIM), last, value)
        keys.slice(first, AT_ONCE, dim=0).store(value)


@gluon.jit
def _places(first_head, heads, shape: gl.constexpr, layout: gl.constexpr):
    """Of ``[PARTS, BLOCK_H, n]``: each head, 0 for one beyond ``heads``; whether it is one; each
    column."""
    head = first_head + gl.arange(0, shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    # Made anew in each place: what the compiler finds to be the same it keeps in registers.
    head = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [head], dtype=gl.int32, is_pure=False, pack=1
    )
    part = gl.arange(0, shape[0], layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    column = gl.arange(0, shape[2], layout=gl.SliceLayout(0, gl.SliceLayout(0, layout)))
    column = gl.expand_dims(gl.expand_dims(column, 0), 0)
    part = gl.expand_dims(gl.expand_dims(part, 1), 2)
    inside = middle(head < heads)
    head = middle(gl.where(head < heads, head, 0)).to(gl.int64)
    return head, inside, part * (_HEAD_DIM // shape[0]) + column


@gluon.jit(do_not_specialize=_PLAIN)
def split_kernel(
    q,
    q_token,
    q_head,
    swa_cache,
    swa_page_bytes,
    swa_shift,
    swa_capacity,
    swa_indices,
    swa_row,
    swa_width,
    swa_lens,
    swa_lens_stride,
    extra_cache,
    extra_page_bytes,
    extra_shift,
    extra_capacity,
    extra_indices,
    extra_row,
    extra_width,
    extra_lens,
    extra_lens_stride,
    sink,
    sink_stride,
    scale,
    out,
    out_token,
    out_head,
    lse,
    lse_token,
    lse_head,
    partial,
    stats,
    heads,
    splits,
    HAS_EXTRA: gl.constexpr,
    HAS_LSE: gl.constexpr,
    ONE_SPLIT: gl.constexpr,
    BLOCK_H: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PARTS: gl.constexpr,
):
    """As ``decode_kernel._split_kernel``; ``BLOCK_N`` is 16."""
    WARPS: gl.constexpr = gl.num_warps()
    COLUMNS: gl.constexpr = _HEAD_DIM // PARTS
    # With 64 heads there are no registers for more.
    ROOM: gl.constexpr = BLOCK_H <= 32
    AT_ONCE: gl.constexpr = PARTS if ROOM else 1
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
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    LANES: gl.constexpr = min(32, COLUMNS // 8)
    blocked: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [1, 32 // LANES, LANES], [1, WARPS, 1], [2, 1, 0]
    )
    part_layout: gl.constexpr = gl.SliceLayout(0, blocked)
    groups_layout: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 8], [1, 32 // LANES, LANES // 8, 8], [1, WARPS, 1, 1], [3, 2, 1, 0]
    )
    # A thread copies from the rows that it makes keys of: addresses need not change threads.
    rows: gl.constexpr = [32 // LANES, LANES]
    codes_layout: gl.constexpr = gl.BlockedLayout([1, 16], rows, [WARPS, 1], [1, 0])
    scales_layout: gl.constexpr = gl.BlockedLayout([1, 8], rows, [WARPS, 1], [1, 0])
    copied_rows: gl.constexpr = gl.SliceLayout(1, codes_layout)
    summed_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, summed))
    summed_heads: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, summed))
    out_heads: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, product))

    first_head = gl.program_id(0) * BLOCK_H
    split = gl.program_id(1)
    token = gl.program_id(2).to(gl.int64)
    # Asked for before all else, whose addresses come from memory, one from another.
    whole: gl.constexpr = [PARTS, BLOCK_H, COLUMNS]
    head, inside, column = _places(first_head, heads, whole, blocked)
    loaded = gl.load(q + token * q_token + head * q_head + column, mask=inside, other=0.0)

    swa_count = gl.minimum(gl.load(swa_lens + token * swa_lens_stride), swa_width)
    swa_tiles = (gl.maximum(swa_count, 0) + BLOCK_N - 1) // BLOCK_N
    swa_indices += token * swa_row
    tiles = swa_tiles
    extra_count = 0
    if HAS_EXTRA:
        extra_indices += token * extra_row
        extra_count = gl.minimum(gl.load(extra_lens + token * extra_lens_stride), extra_width)
        tiles += (gl.maximum(extra_count, 0) + BLOCK_N - 1) // BLOCK_N
    tiles_per_split = (tiles + splits - 1) // splits
    first = gl.minimum(split * tiles_per_split, tiles)
    last = gl.minimum(first + tiles_per_split, tiles)
    chosen = (
        swa_tiles,
        swa_indices,
        swa_count,
        extra_indices,
        extra_count,
    )
    caches = (
        swa_tiles,
        swa_cache,
        swa_page_bytes,
        swa_shift,
        swa_capacity,
        extra_cache,
        extra_page_bytes,
        extra_shift,
        extra_capacity,
    )

    codes = gl.allocate_shared_memory(gl.uint8, [2, BLOCK_N, _HEAD_DIM], plain)
    rotated = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_N, COLUMNS], plain)
    exponents = gl.allocate_shared_memory(gl.uint8, [2, BLOCK_N, 8], plain)
    for i in gl.static_range(2):
        slot = _load_slots(first + i, last, *chosen, HAS_EXTRA, BLOCK_N, copied_rows)
        raw = (codes.index(i), rotated.index(i), exponents.index(i))
        _start_copy(
            raw, slot, first + i, *caches, HAS_EXTRA, codes_layout, part_layout, scales_layout
        )

    # The queries go through shared memory that the keys have later, and stay in registers.
    staged = gl.allocate_shared_memory(gl.bfloat16, whole, swizzled)
    staged.store(loaded)
    queries = staged.permute((0, 2, 1)).load(right)

    keys = gl.allocate_shared_memory(gl.bfloat16, [3, PARTS, BLOCK_N, COLUMNS], swizzled)
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
    for i in gl.static_range(2):
        slot = _load_slots(first + 2 + i, last, *chosen, HAS_EXTRA, BLOCK_N, copied_rows)
        raw = (codes.index(i), rotated.index(i), exponents.index(i))
        async_copy.wait_group(1)
        _make_keys(keys.index(i), raw, PARTS, AT_ONCE, blocked, groups_layout)
        _start_copy(
            raw, slot, first + 2 + i, *caches, HAS_EXTRA, codes_layout, part_layout, scales_layout
        )
    slot = _load_slots(first + 4, last, *chosen, HAS_EXTRA, BLOCK_N, copied_rows)
    named = _load_slots(first, last, *chosen, HAS_EXTRA, BLOCK_N, summed_rows)
    nothing = gl.zeros([PARTS, BLOCK_N, BLOCK_H], gl.float32, layout=product)
    scores_of_parts.store(mma_v2(keys.index(0).load(left), queries, nothing))
    scores = gl.sum(scores_of_parts.load(summed), 0)

    factor = scale * _LOG2_E
    acc = gl.zeros([PARTS, BLOCK_H, COLUMNS], gl.float32, layout=product)
    largest = gl.full([BLOCK_H], float("-inf"), gl.float32, layout=summed_heads)
    if ROOM:
        total = gl.zeros([BLOCK_N, BLOCK_H], gl.float32, layout=gl.SliceLayout(0, summed))
    else:
        total = gl.zeros([BLOCK_H], gl.float32, layout=summed_heads)
    now = 0
    following = 1
    free = 2
    copied = 0
    for tile in range(first, last):
        raw = (codes.index(copied), rotated.index(copied), exponents.index(copied))
        async_copy.wait_group(1)
        _make_keys(keys.index(free), raw, PARTS, AT_ONCE, blocked, groups_layout)
        _start_copy(
            raw, slot, tile + 4, *caches, HAS_EXTRA, codes_layout, part_layout, scales_layout
        )
        slot = _load_slots(tile + 5, last, *chosen, HAS_EXTRA, BLOCK_N, copied_rows)

        is_key = _is_slot(named, tile, swa_tiles, swa_capacity, extra_capacity, HAS_EXTRA)
        scores = gl.where(gl.expand_dims(is_key, 1), scores * factor, float("-inf"))
        named = _load_slots(tile + 1, last, *chosen, HAS_EXTRA, BLOCK_N, summed_rows)
        largest, total = weigh(scores, largest, total, weights, shrinks, grown_warps)
        # As late as this: earlier, with 64 heads, they would take registers that the rest needs.
        following_scores = mma_v2(keys.index(following).load(left), queries, nothing)
        scores_of_parts.store(following_scores)

        if gl.max(grown_warps.load(every_thread), 0) > 0:
            acc = acc * middle(shrinks.load(out_heads))
        scores = gl.sum(scores_of_parts.load(summed), 0)
        spread = weights.permute((0, 2, 1)).load(left)
        acc = mma_v2(spread, keys.index(now).load(right), acc)
        spare = now
        now = following
        following = free
        free = spare
        copied = 1 - copied
    async_copy.wait_group(0)
    if ROOM:
        total = gl.sum(total, 0)

    head = first_head + gl.arange(0, BLOCK_H, layout=summed_heads)
    head_inside = head < heads
    head = gl.where(head_inside, head, 0)
    # A product leaves a thread two columns side by side. Through shared memory it comes to 16 bytes
    # that it can write at once.
    if ONE_SPLIT:
        sink_score = gl.load(sink + head * sink_stride, mask=head_inside, other=0.0) * _LOG2_E
        # Overflows to infinity for a large sink: its share of the result is then 0, rightly.
        # (Without a key, -inf takes the place of NaN; the result is 0 by the line after.)
        base = gl.where(total == 0.0, 0.0, largest)
        share = gl.where(total == 0.0, 0.0, 1.0 / (total + gl.exp2(sink_score - base)))
        result = (acc * middle(gl.convert_layout(share, out_heads))).to(gl.bfloat16)
        row, inside, column = _places(first_head, heads, whole, blocked)
        gl.store(
            out + token * out_token + row * out_head + column,
            gl.convert_layout(result, blocked),
            mask=inside,
        )
        if HAS_LSE:
            gl.store(
                lse + token * lse_token + head * lse_head,
                (largest + gl.log2(total)) * _LN_2,
                mask=head_inside,
            )
    else:
        entry = (token * heads + head) * splits + split
        gl.store(stats + entry * 2, largest, mask=head_inside)
        gl.store(stats + entry * 2 + 1, total, mask=head_inside)
        # A split without a key leaves its sum unwritten; the combine step does not read it.
        if first < last:
            # In halves: all of 64 heads have no place in shared memory.
            HALF: gl.constexpr = COLUMNS // 2
            half_lanes: gl.constexpr = min(32, HALF // 4)
            halves: gl.constexpr = gl.BlockedLayout(
                [1, 1, 4], [1, 32 // half_lanes, half_lanes], [1, WARPS, 1], [2, 1, 0]
            )
            row, exists, place = _places(first_head, heads, [PARTS, BLOCK_H, HALF], halves)
            target = partial + ((token * heads + row) * splits + split) * _HEAD_DIM + place
            pairs = gl.permute(gl.reshape(acc, [PARTS, BLOCK_H, 2, HALF]), (0, 1, 3, 2))
            first_half, second_half = gl.split(pairs)
            gl.store(target, gl.convert_layout(first_half, halves), mask=exists)
            gl.store(target + HALF, gl.convert_layout(second_half, halves), mask=exists)
