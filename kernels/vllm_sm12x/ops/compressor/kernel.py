"""The compressor in Triton: a program a token, which goes through the window in steps.

vLLM's Triton kernel holds the whole window at once, 128 rows of 512 scores and as many vectors, and
spills all of them. Here a softmax that is corrected as larger scores come (an online softmax, each
channel its own) needs a few rows at a time. A row lies across four warps, so that the sum over rows
stays inside a thread; other warps of the block go through other rows. Their sums are put together
once, at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sm12x import lowering
from vllm_sm12x.ops.compressor import config
from vllm_sm12x.ops.fp8_ds_mla import layout
from vllm_sm12x.ops.fp8_ds_mla.reference import E4M3_MAX, SMALLEST_AMAX
from vllm_sm12x.ops.launch_cache import launch
from vllm_sm12x.ops.launching import capability_of

_NOPE = tl.constexpr(layout.NOPE_DIM)
_ROPE = tl.constexpr(layout.ROPE_DIM)
_HEAD = tl.constexpr(layout.HEAD_DIM)
_QUANT_BLOCK = tl.constexpr(layout.QUANT_BLOCK)
_DATA_BYTES = tl.constexpr(layout.DATA_BYTES)
_SCALE_BYTES = tl.constexpr(layout.SCALE_BYTES)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_SMALLEST_AMAX = tl.constexpr(SMALLEST_AMAX)

# These are views of what changes from step to step: a kernel for each of their kinds would be
# compiled while serving.
_VARIABLE = ["token_to_request", "positions", "state_slots", "slots", "block_table_stride"]


@triton.jit
def _finite(largest):
    """A softmax's largest score, or 0 where there was none yet: differences from it are numbers."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit(do_not_specialize=_VARIABLE)
def compress_kernel(
    state_cache,
    state_block,
    state_row,
    block_size,
    token_to_request,
    positions,
    state_slots,
    block_table,
    block_table_stride,
    norm_weight,
    eps,
    cos_sin_cache,
    cos_sin_stride,
    cache,
    page_stride,
    page_size,
    slots,
    RATIO: tl.constexpr,
    OVERLAP: tl.constexpr,
    STEP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The entry of one token. Grid: tokens.

    Args:
        state_cache: float32; ``state_block`` and ``state_row`` are its strides, in elements.
        block_size: Tokens of a block of states.
        cache: uint8; pages are ``page_stride`` bytes apart and hold ``page_size`` entries.
        STEP: Tokens that a thread loads at a time.
        GROUPS: Parts of the block with tokens of their own.
    """
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    position = tl.load(positions + token)
    # All of a kind: one program in RATIO has work.
    if (tl.load(state_slots + token) < 0) | (slot < 0) | ((position + 1) % RATIO != 0):
        return
    WINDOW: tl.constexpr = RATIO * (1 + OVERLAP)
    STEPS: tl.constexpr = WINDOW // (STEP * GROUPS)
    tl.static_assert(STEPS * STEP * GROUPS == WINDOW)
    COLUMNS: tl.constexpr = _HEAD * (1 + OVERLAP)

    table = block_table + tl.load(token_to_request + token).to(tl.int64) * block_table_stride
    channel = tl.arange(0, _HEAD)
    largest = tl.full([GROUPS, _HEAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUPS, _HEAD], tl.float32)
    summed = tl.zeros([GROUPS, _HEAD], tl.float32)
    for step in range(STEPS):
        row = tl.arange(0, STEP)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
        row += step * STEP * GROUPS
        at = position - (WINDOW - 1) + row
        present = at >= 0
        at = tl.where(present, at, 0)
        block = tl.load(table + at // block_size).to(tl.int64)
        place = block * state_block + (at % block_size) * state_row
        if OVERLAP:
            # The newer group is in the row's last channels.
            place += tl.where(row >= RATIO, _HEAD, 0)
        place = state_cache + place[:, :, None] + channel[None, None, :]
        score = tl.load(place + COLUMNS, mask=present[:, :, None], other=float("-inf"))
        vector = tl.load(place, mask=present[:, :, None], other=0.0)
        new = tl.maximum(largest, tl.max(score, 0))
        subtracted = _finite(new)
        weight = tl.exp(score - subtracted[None, :, :])
        kept = tl.exp(largest - subtracted)
        total = total * kept + tl.sum(weight, 0)
        summed = summed * kept + tl.sum(weight * vector, 0)
        largest = new

    # The groups' sums, each brought to the largest score of all.
    kept = tl.exp(largest - tl.max(largest, 0)[None, :])
    entry = tl.sum(summed * kept, 0) / tl.sum(total * kept, 0)

    mean_square = tl.sum(entry * entry, 0) / _HEAD
    weight = tl.load(norm_weight + channel).to(tl.float32)
    normed = entry * tl.rsqrt(mean_square + eps) * weight

    page = cache + (slot // page_size) * page_stride
    offset = slot % page_size
    data = page + offset * _DATA_BYTES
    scales = page + page_size * _DATA_BYTES + offset * _SCALE_BYTES
    _store_nope(data, scales, normed, channel)
    first = position // RATIO * RATIO
    _store_rope(data, normed, channel, cos_sin_cache + first * cos_sin_stride)


@triton.jit
def _store_nope(data, scales, normed, channel):
    """e4m3 values and their scales; the byte behind the scales becomes 0."""
    GROUPS: tl.constexpr = _HEAD // _QUANT_BLOCK
    values = tl.reshape(normed.to(tl.bfloat16).to(tl.float32), (GROUPS, _QUANT_BLOCK))
    amax = tl.maximum(tl.max(tl.abs(values), 1), _SMALLEST_AMAX)
    # 2**ceil(log2(amax / 448)), exactly: the quotient's exponent, one more where it has a fraction.
    bits = tl.div_rn(amax, tl.full(amax.shape, _E4M3_MAX, tl.float32)).to(tl.int32, bitcast=True)
    exponent = tl.minimum((bits >> 23) + ((bits & 0x7F_FFFF) != 0).to(tl.int32), 254)
    # Its inverse; that of 2**127 is a subnormal number.
    inverse = tl.maximum((254 - exponent) << 23, 0x40_0000).to(tl.float32, bitcast=True)
    scaled = values * inverse[:, None]
    scaled = tl.clamp(scaled, -_E4M3_MAX, _E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(data + channel, tl.reshape(codes, (_HEAD,)), mask=channel < _NOPE)
    group = tl.arange(0, GROUPS)
    # As many groups as scale bytes: the last is the rotary part's, whose byte is unused.
    tl.static_assert(GROUPS == _SCALE_BYTES)
    tl.store(scales + group, tl.where(group < _NOPE // _QUANT_BLOCK, exponent, 0).to(tl.uint8))


@triton.jit
def _store_rope(data, normed, channel, cos_sin):
    """The last channels, neighbours turned by the angles at ``cos_sin``, in bfloat16."""
    even, odd = tl.split(tl.reshape(normed, (_HEAD // 2, 2)))
    pair = tl.arange(0, _HEAD // 2) - _NOPE // 2
    turns = pair >= 0
    pair = tl.where(turns, pair, 0)
    cos = tl.load(cos_sin + pair, mask=turns, other=1.0)
    sin = tl.load(cos_sin + _ROPE // 2 + pair, mask=turns, other=0.0)
    turned = tl.interleave(even * cos - odd * sin, odd * cos + even * sin)
    rotary = channel >= _NOPE
    # Lanes that are masked off get an address inside too.
    place = tl.where(rotary, channel - _NOPE, 0)
    place = (data + _NOPE).to(tl.pointer_type(tl.bfloat16)) + place
    tl.store(place, turned.to(tl.bfloat16), mask=rotary)


def compress_to_cache(
    state_cache: torch.Tensor,
    token_to_request: torch.Tensor,
    positions: torch.Tensor,
    state_slots: torch.Tensor,
    block_table: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cos_sin_cache: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    compress_ratio: int,
    overlap: bool,
    row: config.Row | None = None,
) -> None:
    """As :func:`vllm_sm12x.ops.compressor.compress_to_cache`, whose checks came before.

    Allocates nothing and does not synchronise with the host.

    Args:
        row: Launch parameters; by default those of the static table. For tests and benchmarks.

    Raises:
        ValueError: The table has no row for the window, or the tensors are on no GPU.
    """
    capability = capability_of("state_cache", state_cache, "Triton compressor")
    if row is None:
        window = compress_ratio * (2 if overlap else 1)
        row = config.row(window, lowering.target_key(capability))
    tokens = min(len(token_to_request), len(positions), len(state_slots), len(slots))
    if tokens == 0:
        return
    launch(
        compress_kernel,
        (tokens, 1, 1),
        state_cache,
        state_cache.stride(0),
        state_cache.stride(1),
        state_cache.size(1),
        token_to_request,
        positions,
        state_slots,
        block_table,
        block_table.stride(0),
        norm_weight,
        eps,
        cos_sin_cache,
        cos_sin_cache.stride(0),
        cache,
        cache.stride(0),
        cache.size(1),
        slots,
        RATIO=compress_ratio,
        OVERLAP=overlap,
        STEP=row.step,
        GROUPS=row.groups,
        num_warps=row.num_warps,
        num_stages=1,
        **lowering.launch_options(capability),
    )
