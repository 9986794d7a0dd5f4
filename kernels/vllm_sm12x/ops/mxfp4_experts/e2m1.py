"""E2M1 nibbles to bfloat16 inside a Triton kernel, times their groups' scales."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sm12x.ops.interpreter import INTERPRETED, to_bfloat16

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
def _interpreted_value(nibble, scale):
    """As the assembly does it, by the definition of E2M1 and in float32."""
    exponent = (nibble >> 1) & 3
    fraction = (nibble & 1).to(tl.float32) * 0.5
    power = tl.where(exponent == 3, 4.0, tl.where(exponent == 2, 2.0, 1.0))
    value = tl.where(exponent == 0, fraction, (1.0 + fraction) * power)
    return to_bfloat16(value * tl.where((nibble & 8) != 0, -1.0, 1.0) * scale)


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
    if INTERPRETED:
        factor = (bits << 16).to(tl.float32, bitcast=True)
    else:
        factor = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    # One step from the scale's own shape, so that the few scales change their layout, and not the
    # many factors.
    factor = tl.broadcast_to(tl.expand_dims(factor, -1), factor.shape + [GROUP_BYTES])
    factor = tl.reshape(factor, packed.shape)
    if INTERPRETED:
        low = _interpreted_value(packed.to(tl.int32) & 15, factor)
        high = _interpreted_value(packed.to(tl.int32) >> 4, factor)
        return low, high
    else:
        return tl.inline_asm_elementwise(
            _UNPACK,
            "=r,=r,=r,=r,r,r,r",
            [packed, factor],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
