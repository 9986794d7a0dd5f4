"""The MXFP4 experts' products with bfloat16 activations, exact: a tile's sums.

A byte holds two neighbours of a weight row: the low nibbles of a tile meet the activations of even
index, the high nibbles those of odd index. That makes two products, and no value changes its place.
The activations come as 32-bit words of two neighbours and are taken apart likewise.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Packed bytes to a scale.
GROUP_BYTES = tl.constexpr(16)

# Four packed bytes ($4) become four values of their low nibbles ($0, $1) and four of their high
# ones ($2, $3), two a register. A nibble's exponent and mantissa, put where bfloat16's lowest
# exponent bits and highest mantissa bit are, read 2**-126 of the value, 0.5 as a subnormal number.
# The multiplication by 2**126 mends that; the one by the scale ($5, $6) follows apart, because the
# product of the two factors need not be a bfloat16. Both are exact.
_UNPACK = tl.constexpr("""
{
.reg .b32 halves, sign, value, mend;
mov.b32 mend, 0x7E807E80;
prmt.b32 halves, $4, 0, 0x1404;
shl.b32 sign, halves, 4;
and.b32 sign, sign, 0x80008000;
shr.u32 value, halves, 2;
and.b32 value, value, 0x01C001C0;
or.b32 value, value, sign;
mul.rn.bf16x2 value, value, mend;
mul.rn.bf16x2 $0, value, $5;
and.b32 sign, halves, 0x80008000;
shr.u32 value, halves, 6;
and.b32 value, value, 0x01C001C0;
or.b32 value, value, sign;
mul.rn.bf16x2 value, value, mend;
mul.rn.bf16x2 $2, value, $5;
prmt.b32 halves, $4, 0, 0x3424;
shl.b32 sign, halves, 4;
and.b32 sign, sign, 0x80008000;
shr.u32 value, halves, 2;
and.b32 value, value, 0x01C001C0;
or.b32 value, value, sign;
mul.rn.bf16x2 value, value, mend;
mul.rn.bf16x2 $1, value, $6;
and.b32 sign, halves, 0x80008000;
shr.u32 value, halves, 6;
and.b32 value, value, 0x01C001C0;
or.b32 value, value, sign;
mul.rn.bf16x2 value, value, mend;
mul.rn.bf16x2 $3, value, $6;
}
""")


@triton.jit
def unpack(packed, scale):
    """The values of the low nibbles, and those of the high nibbles, each of the shape of packed.

    Args:
        packed: uint8 ``[N, B]``.
        scale: UE8M0 as integers, ``[N, B / 16]`` or that cut into ``[N, W, B / 16 / W]``.

    Returns:
        Two of bfloat16 ``[N, B]``: the values of even and of odd index. Exact, but for what is 2
        and more times 2**127, which becomes infinite; the scale 255 makes NaN.
    """
    # A bfloat16 of that exponent; 2**-127 is subnormal, and 255 would be infinity.
    bits = tl.where(scale == 255, 0x7FC0, tl.where(scale == 0, 0x0040, scale.to(tl.int32) << 7))
    factor = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    # One step from the scale's own shape, so that the few scales change their layout, and not the
    # many factors.
    factor = tl.broadcast_to(tl.expand_dims(factor, -1), factor.shape + [GROUP_BYTES])
    factor = tl.reshape(factor, packed.shape)
    return tl.inline_asm_elementwise(
        _UNPACK,
        "=r,=r,=r,=r,r,r,r",
        [packed, factor],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _scales_of_words(words_at, step, GROUPS: tl.constexpr):
    """The ``GROUPS`` scales of a step, ``[rows, words, GROUPS / words]``, from words of four."""
    WORDS: tl.constexpr = (GROUPS + 3) // 4
    first = step * GROUPS
    scale = tl.load(words_at + (first // 4 + tl.arange(0, WORDS))[None, :])
    # Joined, and not shifted by a range, with which the products' operands take another way.
    scale = scale >> (first % 4 * 8) if GROUPS == 2 else tl.join(scale, scale >> 16)
    return tl.join(scale, scale >> 8) & 0xFF


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

    Args:
        x_at: Pointers to rows of int32, ``[BLOCK_M, 1]``; ``live`` says which are read.
        weight_at: Pointers to rows of uint8, ``[BLOCK_N, 1]``.
        scale_at: Pointers to rows of their scales, uint8 or int32, ``[BLOCK_N, 1]``.
    """
    BYTES: tl.constexpr = COLUMNS // 2
    GROUPS: tl.constexpr = COLUMNS // 32
    BLOCK_BYTES: tl.constexpr = BLOCK_K // 2
    BLOCK_GROUPS: tl.constexpr = BLOCK_K // 32
    EVEN: tl.constexpr = COLUMNS % BLOCK_K == 0
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(0, (COLUMNS + BLOCK_K - 1) // BLOCK_K):
        byte = step * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
        group = step * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
        if EVEN:
            words = tl.load(x_at + byte[None, :], mask=live[:, None], other=0)
            packed = tl.load(weight_at + byte[None, :])
            if SCALE_WORDS:
                scale = _scales_of_words(scale_at, step, BLOCK_GROUPS)
            else:
                scale = tl.load(scale_at + group[None, :])
        else:
            tl.static_assert(not SCALE_WORDS)
            there = byte < BYTES
            byte = tl.where(there, byte, 0)[None, :]
            words = tl.load(x_at + byte, mask=live[:, None] & there[None, :], other=0)
            packed = tl.load(weight_at + byte, mask=there[None, :], other=0)
            there = group < GROUPS
            group = tl.where(there, group, 0)[None, :]
            scale = tl.load(scale_at + group, mask=there[None, :], other=0)
        even = tl.trans(words.to(tl.int16).to(tl.bfloat16, bitcast=True))
        odd = tl.trans((words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True))
        low, high = unpack(packed, scale)
        acc = tl.dot(low, even, acc)
        acc = tl.dot(high, odd, acc)
    return acc
