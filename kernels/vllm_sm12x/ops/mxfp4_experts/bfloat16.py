"""The MXFP4 experts' products with bfloat16 activations, exact: a tile's sums.

A byte holds two neighbours of a weight row: the low nibbles of a tile meet the activations of even
index, the high nibbles those of odd index. That makes two products, and no value changes its place.
Few activations come as 32-bit words of two neighbours and are taken apart likewise. Many come in
halves, the values of even index before those of odd index: then they need no registers before they
are multiplied, and lie in shared memory as a matrix instruction reads them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Packed bytes to a scale.
GROUP_BYTES = tl.constexpr(16)

# Four packed bytes ($4) become four values of their low nibbles ($0, $1) and four of their high
# ones ($2, $3), two a register. A nibble's exponent and mantissa, put where bfloat16's lowest
# exponent bits and highest mantissa bit are, read 2**-126 of the value, 0.5 as a subnormal number.
# The factor ($5, $6) mends that and has the scale, up to 2**127. Each byte comes twice into a half
# of a register. A multiplication moves copies of a low nibble to both of its places: it takes
# another way through the multiprocessor than logic does, of which there is most.
_UNPACK = tl.constexpr("""
{
.reg .b32 halves, sign, value;
prmt.b32 halves, $4, 0, 0x1100;
and.b32 value, halves, 0x000F000F;
mul.lo.u32 value, value, 0x1040;
and.b32 value, value, 0x81C081C0;
mul.rn.bf16x2 $0, value, $5;
and.b32 sign, halves, 0x80008000;
shl.b32 value, halves, 2;
and.b32 value, value, 0x01C001C0;
or.b32 value, value, sign;
mul.rn.bf16x2 $2, value, $5;
prmt.b32 halves, $4, 0, 0x3322;
and.b32 value, halves, 0x000F000F;
mul.lo.u32 value, value, 0x1040;
and.b32 value, value, 0x81C081C0;
mul.rn.bf16x2 $1, value, $6;
and.b32 sign, halves, 0x80008000;
shl.b32 value, halves, 2;
and.b32 value, value, 0x01C001C0;
or.b32 value, value, sign;
mul.rn.bf16x2 $3, value, $6;
}
""")

# The same with any scale: the two factors apart, for their product need not be a bfloat16.
_UNPACK_ANY = tl.constexpr("""
{
.reg .b32 halves, sign, value, mend;
mov.b32 mend, 0x7E807E80;
prmt.b32 halves, $4, 0, 0x1100;
and.b32 value, halves, 0x000F000F;
mul.lo.u32 value, value, 0x1040;
and.b32 value, value, 0x81C081C0;
mul.rn.bf16x2 value, value, mend;
mul.rn.bf16x2 $0, value, $5;
and.b32 sign, halves, 0x80008000;
shl.b32 value, halves, 2;
and.b32 value, value, 0x01C001C0;
or.b32 value, value, sign;
mul.rn.bf16x2 value, value, mend;
mul.rn.bf16x2 $2, value, $5;
prmt.b32 halves, $4, 0, 0x3322;
and.b32 value, halves, 0x000F000F;
mul.lo.u32 value, value, 0x1040;
and.b32 value, value, 0x81C081C0;
mul.rn.bf16x2 value, value, mend;
mul.rn.bf16x2 $1, value, $6;
and.b32 sign, halves, 0x80008000;
shl.b32 value, halves, 2;
and.b32 value, value, 0x01C001C0;
or.b32 value, value, sign;
mul.rn.bf16x2 value, value, mend;
mul.rn.bf16x2 $3, value, $6;
}
""")


@triton.jit
def unpack(packed, scale, ANY: tl.constexpr):
    """The values of the low nibbles, and those of the high nibbles, each of the shape of packed.

    Args:
        packed: uint8 ``[N, B]``.
        scale: UE8M0 as integers, ``[N, B / 16]`` or that cut into ``[N, W, B / 16 / W]``.
        ANY: Scales may be above 128.

    Returns:
        Two of bfloat16 ``[N, B]``: the values of even and of odd index. Exact, but for what is 2
        and more times 2**127, which becomes infinite; the scale 255 makes NaN.
    """
    scale = scale.to(tl.int32)
    if ANY:
        # A bfloat16 of that exponent; 2**-127 is subnormal, and 255 would be infinity.
        bits = tl.where(scale == 255, 0x7FC0, tl.where(scale == 0, 0x0040, scale << 7))
    else:
        bits = (scale + 126) << 7
    factor = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    # One step from the scale's own shape, so that the few scales change their layout, and not the
    # many factors.
    factor = tl.broadcast_to(tl.expand_dims(factor, -1), factor.shape + [GROUP_BYTES])
    factor = tl.reshape(factor, packed.shape)
    return tl.inline_asm_elementwise(
        _UNPACK_ANY if ANY else _UNPACK,
        "=r,=r,=r,=r,r,r,r",
        [packed, factor],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def halve_kernel(x_ptr, x_stride, out_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program: its values of even index, then those of odd index.

    Args:
        x_ptr: bfloat16 ``[rows, COLUMNS]``.
        out_ptr: bfloat16 ``[rows, COLUMNS]``.
        BLOCK: Power of two of at least ``COLUMNS``.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    x = tl.load(x_ptr + row * x_stride + tl.where(inside, column, 0), mask=inside, other=0.0)
    even, odd = tl.split(tl.reshape(x, [BLOCK // 2, 2]))
    column = tl.arange(0, BLOCK // 2)
    inside = column < COLUMNS // 2
    out_at = out_ptr + row * COLUMNS + tl.where(inside, column, 0)
    tl.store(out_at, even, mask=inside)
    tl.store(out_at + COLUMNS // 2, odd, mask=inside)


@triton.jit
def _of_words(word, step, GROUPS: tl.constexpr):
    """The ``GROUPS`` scales of a step, ``[rows, words, GROUPS / words]``, from words of four."""
    # Joined, and not shifted by a range, with which the products' operands take another way.
    word = word >> (step * GROUPS % 4 * 8) if GROUPS == 2 else tl.join(word, word >> 16)
    return tl.join(word, word >> 8) & 0xFF


@triton.jit
def _sums(
    x_at,
    live,
    weight_at,
    scale_at,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ANY: tl.constexpr,
):
    """As :func:`tile_sums`, and all scales joined by or; those above 128 count where ``ANY``."""
    BYTES: tl.constexpr = COLUMNS // 2
    GROUPS: tl.constexpr = COLUMNS // 32
    BLOCK_BYTES: tl.constexpr = BLOCK_K // 2
    BLOCK_GROUPS: tl.constexpr = BLOCK_K // 32
    WORDS: tl.constexpr = (BLOCK_GROUPS + 3) // 4
    EVEN: tl.constexpr = COLUMNS % BLOCK_K == 0
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    seen = tl.zeros([BLOCK_N, WORDS if SCALE_WORDS else BLOCK_GROUPS], tl.int32)
    for step in tl.range(0, (COLUMNS + BLOCK_K - 1) // BLOCK_K, num_stages=1 if ANY else None):
        byte = step * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
        group = step * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
        there = byte < BYTES
        if EVEN:
            packed = tl.load(weight_at + byte[None, :])
            if SCALE_WORDS:
                word = step * BLOCK_GROUPS // 4 + tl.arange(0, WORDS)
                scale = tl.load(scale_at + word[None, :])
            else:
                scale = tl.load(scale_at + group[None, :])
        else:
            tl.static_assert(not SCALE_WORDS)
            byte = tl.where(there, byte, 0)
            packed = tl.load(weight_at + byte[None, :], mask=there[None, :], other=0)
            group_there = group < GROUPS
            group = tl.where(group_there, group, 0)
            scale = tl.load(scale_at + group[None, :], mask=group_there[None, :], other=0)
        seen |= scale.to(tl.int32)
        if SCALE_WORDS:
            scale = _of_words(scale, step, BLOCK_GROUPS)
        low, high = unpack(packed, scale, ANY)
        at = x_at + byte[None, :]
        mask = live[:, None] if EVEN else live[:, None] & there[None, :]
        if x_at.dtype.element_ty == tl.bfloat16:
            even = tl.load(at, mask=mask, other=0.0)
            odd = tl.load(at + BYTES, mask=mask, other=0.0)
        else:
            words = tl.load(at, mask=mask, other=0)
            even = words.to(tl.int16).to(tl.bfloat16, bitcast=True)
            odd = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        acc = tl.dot(low, tl.trans(even), acc)
        acc = tl.dot(high, tl.trans(odd), acc)
    return acc, seen


@triton.jit
def tile_sums(
    x_at,
    live,
    weight_at,
    scale_at,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
):
    """float32 ``[BLOCK_N, BLOCK_M]``: weight rows by rows of activations.

    A tile with a scale of 2 or more is summed twice: weights so large are not to be expected.

    Args:
        x_at: Pointers to rows, ``[BLOCK_M, 1]``; ``live`` says which are read. Of int32,
            two neighbours each, or of bfloat16 in halves, as :func:`halve_kernel` writes them.
        weight_at: Pointers to rows of uint8, ``[BLOCK_N, 1]``.
        scale_at: Pointers to rows of their scales, uint8 or int32, ``[BLOCK_N, 1]``.
    """
    acc, seen = _sums(
        x_at, live, weight_at, scale_at, COLUMNS, BLOCK_M, BLOCK_N, BLOCK_K, SCALE_WORDS, False
    )
    # The highest bit of each scale.
    if tl.max(tl.max(tl.where((seen & -0x7F7F7F80) != 0, 1, 0), 1), 0) != 0:
        acc, seen = _sums(
            x_at, live, weight_at, scale_at, COLUMNS, BLOCK_M, BLOCK_N, BLOCK_K, SCALE_WORDS, True
        )
    return acc
