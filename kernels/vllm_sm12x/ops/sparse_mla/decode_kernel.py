"""Sparse MLA decode in Triton: the keys split over programs, then a combine step.

A program takes one token, ``BLOCK_H`` heads and one split. The token's tiles of ``BLOCK_N`` keys,
first the window's and then the compressed cache's, are dealt out to the splits in contiguous runs.
How many tiles there are follows from the lengths in device memory, so a token with few keys costs
little however wide the index tensors are, and nothing is read back to the host.

The 512 columns are 8 chunks of 64: 7 of e4m3 with one power-of-two scale each, 1 of bfloat16. Both
products are batched over the chunks, ``[8, ...]``. With 8 warps each warp has a chunk to itself:
its part of the queries and of the result stays in that warp's registers, and a key's bytes are read
and made bfloat16 (exactly: e4m3 times a power of two) once for both products.

With one split a program writes the result. With several it writes its unnormalised sum and the
maximum and the sum of its exponentials, in float32, and a second kernel joins them. The sink is
applied once, there or here. Scores are kept in units of log2: ``exp2`` is the cheaper one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_sm12x.lowering import launch_options, multiprocessors, target_key
from vllm_sm12x.ops.fp8_ds_mla import reference as fp8_ds_mla
from vllm_sm12x.ops.fp8_ds_mla.layout import DATA_BYTES, HEAD_DIM, NOPE_DIM, ROPE_DIM
from vllm_sm12x.ops.integers import cdiv
from vllm_sm12x.ops.launch_cache import launch
from vllm_sm12x.ops.sparse_mla import config_decode, decode_gluon
from vllm_sm12x.ops.sparse_mla.reference import KeySet

_DATA_BYTES = tl.constexpr(DATA_BYTES)
_NOPE_BYTES = tl.constexpr(NOPE_DIM)
_HEAD_DIM = tl.constexpr(HEAD_DIM)
_CHUNK = tl.constexpr(ROPE_DIM)
_CHUNKS = tl.constexpr(HEAD_DIM // ROPE_DIM)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)

# Partial results a head: 512 sums, and the maximum and the sum of the exponentials.
_PARTIAL_FLOATS = HEAD_DIM + 2

_CACHES = ("swa_cache", "extra_cache")


def sparse_mla_decode(
    q: torch.Tensor,
    sets: Sequence[KeySet],
    attn_sink: torch.Tensor,
    softmax_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    batch_tokens: int | None = None,
    scratch: torch.Tensor | None = None,
    row: config_decode.Row | None = None,
    splits: int | None = None,
) -> None:
    """As ``reference.sparse_mla_decode``, with checked arguments.

    Args:
        scratch: uint8, contiguous, :func:`scratch_bytes` or more of it, 16-byte aligned; allocated
            here by default.
        row: Launch parameters; by default those of the static table. For tests and benchmarks.
        splits: Likewise.

    Raises:
        ValueError: The table has no row for this shape, a block size is no power of two, pages are
            not where the Gluon kernel can copy them, or ``scratch`` is too small.
    """
    tokens, heads, _ = q.shape
    if tokens == 0:
        return
    shifts = [_shift(name, cache) for name, (cache, _, _) in zip(_CACHES, sets, strict=False)]
    keys = sum(indices.shape[1] for _, indices, _ in sets)
    batch_tokens = batch_tokens or tokens
    if row is None:
        row = config_decode.row(batch_tokens, heads, keys, target_key())
    if row.parts:
        for name, (cache, _, _) in zip(_CACHES, sets, strict=False):
            _check_copies(name, cache)
    if splits is None:
        splits = config_decode.splits(row, batch_tokens, heads, keys, multiprocessors())
    partial = stats = None
    if splits > 1:
        needed = partial_bytes(tokens, heads, splits)
        if scratch is None:
            scratch = torch.empty(needed, dtype=torch.uint8, device=q.device)
        elif scratch.nbytes < needed:
            raise ValueError(f"scratch: {scratch.nbytes} bytes, allowed: {needed} or more")
        floats = scratch.view(torch.float32)
        partial = floats[: tokens * heads * splits * HEAD_DIM]
        stats = floats[partial.numel() :]
    arguments: list[object] = []
    for (cache, indices, lens), shift in zip(sets, shifts, strict=True):
        # The stride of a dimension of size 1 means nothing.
        pitch = cache.stride(0) if cache.shape[0] > 1 else 0
        arguments += [cache, pitch, shift, fp8_ds_mla.capacity(cache)]
        arguments += [indices, indices.stride(0), indices.shape[1], lens, lens.stride(0)]
    if len(sets) == 1:
        arguments += [None, 0, 0, 0, None, 0, 0, None, 0]
    result = [out, out.stride(0), out.stride(1)]
    result += [None, 0, 0] if lse is None else [lse, lse.stride(0), lse.stride(1)]
    sink = [attn_sink, attn_sink.stride(0)]
    split_kernel, parts = _split_kernel, {}
    if row.parts:
        split_kernel, parts = decode_gluon.split_kernel, {"PARTS": row.parts}
    launch(
        split_kernel,
        (cdiv(heads, row.block_h), splits, tokens),
        q,
        q.stride(0),
        q.stride(1),
        *arguments,
        *sink,
        softmax_scale,
        *result,
        partial,
        stats,
        heads,
        splits,
        HAS_EXTRA=len(sets) > 1,
        HAS_LSE=lse is not None,
        ONE_SPLIT=splits == 1,
        BLOCK_H=row.block_h,
        BLOCK_N=row.block_n,
        **parts,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
        **({} if row.maxnreg is None else {"maxnreg": row.maxnreg}),
        **launch_options(),
    )
    if splits == 1:
        return
    combine = config_decode.combine_row(splits)
    launch(
        _combine_kernel,
        (heads, HEAD_DIM // combine.block_d, tokens),
        partial,
        stats,
        *sink,
        *result,
        heads,
        splits,
        HAS_LSE=lse is not None,
        SPLIT_SLOTS=combine.split_slots,
        BLOCK_D=combine.block_d,
        num_warps=combine.num_warps,
        num_stages=1,
        **launch_options(),
    )


def scratch_bytes(tokens: int, heads: int, keys: int, target: str, multiprocessors: int) -> int:
    """Most memory, in bytes, for partial results of one call with up to ``tokens`` tokens.

    Fewer tokens can need more of it: their keys are split over more programs.
    """
    config_decode.row(tokens, heads, keys, target)  # raises where there is no kernel
    programs = max(row.programs for row in config_decode.TABLE[target].values())
    most = 0
    # From here on, one split of each token fills the GPU.
    for count in range(1, min(tokens, multiprocessors * programs) + 1):
        row = config_decode.row(count, heads, keys, target)
        splits = config_decode.splits(row, count, heads, keys, multiprocessors)
        most = max(most, partial_bytes(count, heads, splits))
    return most


def partial_bytes(tokens: int, heads: int, splits: int) -> int:
    """Memory for the partial results of one call; none where one split does all."""
    return 4 * tokens * heads * splits * _PARTIAL_FLOATS if splits > 1 else 0


def _shift(name: str, cache: torch.Tensor) -> int:
    block_size = cache.shape[1]
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"{name}: block size {block_size}, allowed: a power of two")
    return block_size.bit_length() - 1


def _check_copies(name: str, cache: torch.Tensor) -> None:
    """Asynchronous copies take 16 bytes at a time; Triton must see that they are aligned."""
    pitch = cache.stride(0) if cache.shape[0] > 1 else 0
    if cache.data_ptr() % 16 or pitch % 16:
        raise ValueError(
            f"{name}: address {cache.data_ptr():#x}, pages {pitch} bytes apart, allowed in the"
            " Gluon decode kernel: multiples of 16"
        )


# Arguments whose alignment and value the launcher shall not make variants of: no load gets wider.
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


@triton.jit
def _load_slots(
    tile,
    last,
    swa_tiles,
    swa_indices,
    swa_count,
    swa_capacity,
    extra_indices,
    extra_count,
    extra_capacity,
    HAS_EXTRA: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Slots that a tile names, int32 ``[BLOCK_N]``; -1 for none, and for all from ``last`` on."""
    indices, count, capacity, start = swa_indices, swa_count, swa_capacity, tile * BLOCK_N
    if HAS_EXTRA:  # noqa: SIM102 (one is known when compiling, one is not)
        if tile >= swa_tiles:
            indices, count, capacity = extra_indices, extra_count, extra_capacity
            start = (tile - swa_tiles) * BLOCK_N
    entry = start + tl.arange(0, BLOCK_N)
    inside = (entry < count) & (tile < last)
    slot = tl.load(indices + tl.where(inside, entry, 0), mask=inside, other=-1)
    return tl.where((slot >= 0) & (slot < capacity), slot, -1)


@triton.jit
def _load_keys(
    slot,
    tile,
    swa_tiles,
    swa_cache,
    swa_page_bytes,
    swa_shift,
    extra_cache,
    extra_page_bytes,
    extra_shift,
    HAS_EXTRA: tl.constexpr,
):
    """Bytes of the keys in ``slot`` (``[n]``, -1: none), zeros for none.

    Returns e4m3 codes uint8 ``[8, n, 64]`` (the last chunk zeros), the rotated part bfloat16
    ``[n, 64]`` and the seven exponents of each key with the unused byte as an int64 ``[n]``.
    """
    cache, page_bytes, shift = swa_cache, swa_page_bytes, swa_shift
    if HAS_EXTRA:  # noqa: SIM102 (one is known when compiling, one is not)
        if tile >= swa_tiles:
            cache, page_bytes, shift = extra_cache, extra_page_bytes, extra_shift
    valid = slot >= 0
    slot = tl.where(valid, slot, 0)
    page = cache + (slot >> shift).to(tl.int64) * page_bytes
    offset = slot & ((1 << shift) - 1)
    data = page + offset * _DATA_BYTES
    words = page + ((_DATA_BYTES << shift) + offset * 8)
    chunk = tl.arange(0, _CHUNKS)[:, None, None]
    within = tl.arange(0, _CHUNK)
    codes = tl.load(
        data[None, :, None] + (chunk * _CHUNK + within[None, None, :]),
        mask=valid[None, :, None] & (chunk < _CHUNKS - 1),
        other=0,
    )
    rotated = tl.load(
        (data + _NOPE_BYTES).to(tl.pointer_type(tl.bfloat16))[:, None] + within[None, :],
        mask=valid[:, None],
        other=0.0,
    )
    exponents = tl.load(words.to(tl.pointer_type(tl.int64)), mask=valid, other=0)
    return codes, rotated, exponents


@triton.jit
def _make_keys(codes, rotated, exponents):
    """Keys bfloat16 ``[8, n, 64]`` from what :func:`_load_keys` read."""
    chunk = tl.arange(0, _CHUNKS)[:, None, None]
    exponent = ((exponents[None, :, None] >> (8 * chunk)) & 255).to(tl.int32)
    # E8M0: the float32 with these exponent bits, save 2**-127, which is subnormal, and NaN.
    bits = tl.where(exponent == 0, 0x0040_0000, exponent << 23)
    bits = tl.where(exponent == 255, 0x7FC0_0000, bits)
    scaled = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * bits.to(
        tl.float32, bitcast=True
    )
    return tl.where(chunk == _CHUNKS - 1, rotated[None, :, :], scaled.to(tl.bfloat16))


@triton.jit(do_not_specialize=_PLAIN)
def _split_kernel(
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
    HAS_EXTRA: tl.constexpr,
    HAS_LSE: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    split = tl.program_id(1)
    token = tl.program_id(2).to(tl.int64)
    head_inside = head < heads

    swa_count = tl.minimum(tl.load(swa_lens + token * swa_lens_stride), swa_width)
    swa_tiles = tl.cdiv(tl.maximum(swa_count, 0), BLOCK_N)
    swa_indices += token * swa_row
    tiles = swa_tiles
    extra_count = 0
    if HAS_EXTRA:
        extra_indices += token * extra_row
        extra_count = tl.minimum(tl.load(extra_lens + token * extra_lens_stride), extra_width)
        tiles += tl.cdiv(tl.maximum(extra_count, 0), BLOCK_N)
    tiles_per_split = tl.cdiv(tiles, splits)
    first = tl.minimum(split * tiles_per_split, tiles)
    last = tl.minimum(first + tiles_per_split, tiles)
    chosen = (
        swa_tiles,
        swa_indices,
        swa_count,
        swa_capacity,
        extra_indices,
        extra_count,
        extra_capacity,
    )
    caches = (
        swa_tiles,
        swa_cache,
        swa_page_bytes,
        swa_shift,
        extra_cache,
        extra_page_bytes,
        extra_shift,
    )

    chunk = tl.arange(0, _CHUNKS)[:, None, None]
    column = chunk * _CHUNK + tl.arange(0, _CHUNK)[None, None, :]
    # Lanes that are masked off get an address inside too.
    head = tl.where(head_inside, head, 0)
    row = head.to(tl.int64)[None, :, None]
    queries = tl.load(
        q + token * q_token + row * q_head + column, mask=head_inside[None, :, None], other=0.0
    )
    factor = scale * _LOG2_E
    largest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([_CHUNKS, BLOCK_H, _CHUNK], tl.float32)

    # Two loads behind one another, the slots' and the keys', each issued a tile ahead of its use.
    # (That the bytes come through the loop's arguments also hides from the compiler that they were
    # loads of 8 bits, for which it would choose operand layouts that ldmatrix cannot load.)
    slot = _load_slots(first, last, *chosen, HAS_EXTRA, BLOCK_N)
    codes, rotated, exponents = _load_keys(slot, first, *caches, HAS_EXTRA)
    valid = slot >= 0
    slot = _load_slots(first + 1, last, *chosen, HAS_EXTRA, BLOCK_N)
    for tile in range(first, last):
        keys = _make_keys(codes, rotated, exponents)
        now_valid = valid
        codes, rotated, exponents = _load_keys(slot, tile + 1, *caches, HAS_EXTRA)
        valid = slot >= 0
        slot = _load_slots(tile + 2, last, *chosen, HAS_EXTRA, BLOCK_N)
        by_chunk = tl.dot(
            queries,
            tl.permute(keys, (0, 2, 1)),
            tl.zeros([_CHUNKS, BLOCK_H, BLOCK_N], tl.float32),
        )
        scores = tl.where(now_valid[None, :], tl.sum(by_chunk, 0) * factor, float("-inf"))
        now_largest = tl.maximum(largest, tl.max(scores, 1))
        # Before the first key, exp2(-inf - 0) is 0 where exp2(-inf - -inf) would be NaN.
        base = tl.where(now_largest == float("-inf"), 0.0, now_largest)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        spread = tl.broadcast_to(weights.to(tl.bfloat16)[None, :, :], [_CHUNKS, BLOCK_H, BLOCK_N])
        acc = tl.dot(spread, keys, acc * shrink[None, :, None])
        largest = now_largest

    if ONE_SPLIT:
        sink_score = tl.load(sink + head * sink_stride, mask=head_inside, other=0.0) * _LOG2_E
        # Overflows to infinity for a large sink: its share of the result is then 0, rightly.
        # (Without a key, -inf takes the place of NaN; the result is 0 by the line after.)
        base = tl.where(total == 0.0, 0.0, largest)
        share = tl.where(total == 0.0, 0.0, 1.0 / (total + tl.exp2(sink_score - base)))
        tl.store(
            out + token * out_token + row * out_head + column,
            (acc * share[None, :, None]).to(tl.bfloat16),
            mask=head_inside[None, :, None],
        )
        if HAS_LSE:
            tl.store(
                lse + token * lse_token + head * lse_head,
                (largest + tl.log2(total)) * _LN_2,
                mask=head_inside,
            )
    else:
        place = (token * heads + head) * splits + split
        tl.store(stats + place * 2, largest, mask=head_inside)
        tl.store(stats + place * 2 + 1, total, mask=head_inside)
        # A split without a key leaves its sum unwritten; the combine step does not read it.
        if first < last:
            tl.store(
                partial + place[None, :, None] * _HEAD_DIM + column,
                acc,
                mask=head_inside[None, :, None],
            )


@triton.jit(do_not_specialize=_PLAIN)
def _combine_kernel(
    partial,
    stats,
    sink,
    sink_stride,
    out,
    out_token,
    out_head,
    lse,
    lse_token,
    lse_head,
    heads,
    splits,
    HAS_LSE: tl.constexpr,
    SPLIT_SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0)
    part = tl.program_id(1)
    token = tl.program_id(2).to(tl.int64)
    column = part * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.arange(0, SPLIT_SLOTS)
    inside = split < splits
    place = (token * heads + head) * splits + tl.where(inside, split, 0)
    largest = tl.load(stats + place * 2, mask=inside, other=float("-inf"))
    total = tl.load(stats + place * 2 + 1, mask=inside, other=0.0)
    # A split whose sum is 0 saw no key. NaN is not 0 and goes on to the result.
    seen = inside & (total != 0.0)
    acc = tl.load(
        partial + place[:, None] * _HEAD_DIM + column[None, :], mask=seen[:, None], other=0.0
    )
    all_largest = tl.max(largest, 0)
    base = tl.where(all_largest == float("-inf"), 0.0, all_largest)
    weight = tl.where(seen, tl.exp2(largest - base), 0.0)
    # The choice keeps the product out of the sum's first addition: fused with it, a product would
    # be rounded in one thread and not in its neighbour, and their sums would differ.
    all_total = tl.sum(tl.where(seen, total * weight, 0.0), 0)
    sink_score = tl.load(sink + head * sink_stride) * _LOG2_E
    share = tl.where(all_total == 0.0, 0.0, 1.0 / (all_total + tl.exp2(sink_score - base)))
    joined = tl.sum(acc * weight[:, None], 0) * share
    tl.store(out + token * out_token + head * out_head + column, joined.to(tl.bfloat16))
    if HAS_LSE:  # noqa: SIM102
        if part == 0:
            tl.store(
                lse + token * lse_token + head * lse_head,
                (all_largest + tl.log2(all_total)) * _LN_2,
            )
