"""What Triton's interpreter (``TRITON_INTERPRET=1``) does wrong, worked around in one place.

Three things of Triton 3.6.0. ``tl.dot`` of bfloat16 operands gives garbage. A conversion from
float32 to bfloat16 cuts the low bits off, where the compiled one rounds to nearest even, and makes
other numbers of subnormal ones. One to e4m3 loses the carry into the exponent. Kernels call
:func:`dot`, :func:`to_bfloat16` and :func:`to_e4m3` instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _widen(x):
    """bfloat16 or narrower to float32, exactly; the interpreter's own way fails on subnormals."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def dot(a, b, acc):
    """``a @ b + acc`` with a float32 accumulator; operands of two or three dimensions.

    Compiled, it is ``tl.dot`` and nothing else. In the interpreter the operands are widened to
    float32 first, which is exact: their rounding to the narrower type has already happened.
    """
    if INTERPRETED:
        return tl.dot(_widen(a), _widen(b), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def to_bfloat16(x):
    """float32 ``x`` rounded to bfloat16, to nearest even.

    Compiled, it is ``x.to(tl.bfloat16)`` and nothing else.
    """
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        # Rounding may not turn NaN into something else.
        bits = tl.where(x == x, rounded, bits | 0x0040_0000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def to_e4m3(x):
    """float32 ``x`` of at most 448 rounded to e4m3, to nearest even.

    Compiled, it is ``x.to(tl.float8e4nv)`` and nothing else. The interpreter gets numbers that need
    no rounding.
    """
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        normal = (bits + 0x7_FFFF + ((bits >> 20) & 1)) & -0x10_0000
        # Subnormal numbers are multiples of 2**-9, the last place of floats about 1.5 * 2**14.
        subnormal = (x + 24576.0) - 24576.0
        rounded = tl.where(tl.abs(x) < 0.015625, subnormal, normal.to(tl.float32, bitcast=True))
        # NaN of e4m3 has all three bits of the fraction, and these need no rounding.
        nan = ((bits & -0x10_0000) | 0x70_0000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, nan).to(tl.float8e4nv)
    else:
        return x.to(tl.float8e4nv)
