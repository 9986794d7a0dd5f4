"""The MXFP4 experts' products with FP8 activations: quantisation, and a tile's sums.

A row of activations is e4m3 times one power of two, of each 128 values the evenly numbered before
the oddly numbered. Weights become e4m3 in registers: the powers of two of a row's groups, relative
to the largest of the row, go into the exponents of its values. That is exact for groups up to 2**11
apart; the values of smaller groups become 0. What is left, a factor a weight row and one a row of
activations, multiplies the float32 sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Four packed bytes ($2) become the e4m3 values of their low nibbles ($0) and of their high ones
# ($1), times a power of two: each byte of $3 is 8 times its exponent, from 0 on, or has the highest
# bit, for values that are to be 0. PRMT looks four magnitudes up at a time. With the fourth bit of
# a selector it gives the byte's highest bit, eight times, which marks negative values.
_UNPACK = tl.constexpr("""
{
.reg .b32 packed, low, high, select, first, second, mark;
prmt.b32 mark, $3, 0, 0xBA98;
not.b32 mark, mark;
and.b32 packed, $2, mark;
and.b32 low, $3, 0xFFFFFF00;
add.u32 low, low, 0x14100800;
add.u32 high, $3, 0x24201C18;
and.b32 select, packed, 0x77777777;
prmt.b32 first, low, high, select;
shr.u32 select, select, 16;
prmt.b32 second, low, high, select;
and.b32 select, packed, 0x88888888;
prmt.b32 mark, 0x80, 0, select;
shl.b32 mark, mark, 1;
and.b32 mark, mark, 0x80808080;
or.b32 first, first, mark;
shr.u32 select, select, 16;
prmt.b32 mark, 0x80, 0, select;
shl.b32 mark, mark, 1;
and.b32 mark, mark, 0x80808080;
or.b32 second, second, mark;
prmt.b32 $0, first, second, 0x6420;
prmt.b32 $1, first, second, 0x7531;
}
""")

# Most by which a group's exponent may be below the largest of its row.
_SPAN = tl.constexpr(11)
# The largest group's values are e2m1 times 2**6: up to 384, where e4m3 ends at 448.
_TOP = tl.constexpr(6)


@triton.jit
def _row_tops(scale_at, COLUMNS: tl.constexpr, WORDS: tl.constexpr):
    """Largest scale of each row, int32 ``[N]``."""
    word = tl.arange(0, WORDS)
    there = word < COLUMNS // 128
    word = tl.load(
        scale_at[:, None] + tl.where(there, word, 0)[None, :], mask=there[None, :], other=0
    )
    largest = tl.maximum(
        tl.maximum(word & 0xFF, (word >> 8) & 0xFF),
        tl.maximum((word >> 16) & 0xFF, (word >> 24) & 0xFF),
    )
    return tl.max(largest, 1)


@triton.jit
def unpack_e4m3(packed, word, top):
    """128 values of each row, those of the low nibbles and those of the high nibbles.

    Args:
        packed: uint8 ``[N, 64]``.
        word: Their four scales, int32 ``[N]``.
        top: The scale that becomes ``2**6``, and no other is larger, int32 ``[N]``.

    Returns:
        Two of e4m3 ``[N, 64]``.
    """
    groups = tl.join(word, word >> 16)
    groups = tl.join(groups, groups >> 8) & 0xFF
    shift = groups - top[:, None, None] + _SPAN
    eights = tl.where(shift < 0, 128, shift * 8).to(tl.uint8)
    eights = tl.broadcast_to(eights[:, :, :, None], [word.shape[0], 2, 2, 16])
    eights = tl.reshape(eights, packed.shape)
    return tl.inline_asm_elementwise(
        _UNPACK,
        "=r,=r,r,r",
        [packed, eights],
        dtype=(tl.float8e4nv, tl.float8e4nv),
        is_pure=True,
        pack=4,
    )


@triton.jit
def quantize_kernel(
    x_ptr, x_stride, out_ptr, scale_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """A row to e4m3 a program.

    Args:
        x_ptr: bfloat16 ``[rows, COLUMNS]``, columns a multiple of 128.
        out_ptr: e4m3 ``[rows, COLUMNS]``; of each 128 the even ones, then the odd ones.
        scale_ptr: float32 ``[rows]``, powers of two; NaN where a value is NaN or infinite.
        BLOCK: Power of two of at least ``COLUMNS``.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    column = tl.where(inside, column, 0)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    # The exponent by which the largest becomes at most 448, which is 1.75 * 2**8. Magnitudes of
    # floats are ordered as their bits are, with NaN the largest.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFF_FFFF, 0)
    exponent = (largest >> 23) - 127 - 8 + tl.where((largest & 0x7F_FFFF) > 0x60_0000, 1, 0)
    finite = largest < 0x7F80_0000
    exponent = tl.where(finite, tl.maximum(exponent, -120), 0)
    values = (x * ((127 - exponent) << 23).to(tl.float32, bitcast=True)).to(tl.float8e4nv)
    turns = tl.permute(tl.reshape(values, [BLOCK // 128, 64, 2]), [0, 2, 1])
    tl.store(out_ptr + row * COLUMNS + column, tl.reshape(turns, [BLOCK]), mask=inside)
    scale = tl.where(finite, (exponent + 127) << 23, 0x7FC0_0000).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + row, scale)


@triton.jit
def tile_sums(
    x_at,
    live,
    x_scale_at,
    weight_at,
    scale_at,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """float32 ``[BLOCK_N, BLOCK_M]``: weight rows by rows of activations.

    Args:
        x_at: Pointers to rows of e4m3, ``[BLOCK_M, 1]``; ``live`` says which are read.
        x_scale_at: Pointers to their factors, float32, ``[BLOCK_M]``.
        weight_at: Pointers to rows of uint8, ``[BLOCK_N, 1]``.
        scale_at: Pointers to rows of their scales, int32 of four each, ``[BLOCK_N]``.
        COLUMNS: A multiple of 128.
        WORDS: Power of two of at least ``COLUMNS / 128``.
    """
    top = _row_tops(scale_at, COLUMNS, WORDS)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    half = tl.arange(0, 64)[None, :]
    for step in range(0, COLUMNS // 128):
        even = tl.load(x_at + (step * 128 + half), mask=live[:, None], other=0.0)
        odd = tl.load(x_at + (step * 128 + 64 + half), mask=live[:, None], other=0.0)
        packed = tl.load(weight_at + (step * 64 + half))
        low, high = unpack_e4m3(packed, tl.load(scale_at + step), top)
        acc = tl.dot(low, tl.trans(even), acc)
        acc = tl.dot(high, tl.trans(odd), acc)
    # 2**(top - 127 - 6); below 2**-126 is as good as 0, and the scale 255 makes NaN.
    bits = tl.where(top == 255, 0x7FC0_0000, tl.maximum(top - _TOP, 1) << 23)
    x_scale = tl.load(x_scale_at, mask=live, other=0.0)
    return acc * bits.to(tl.float32, bitcast=True)[:, None] * x_scale[None, :]
