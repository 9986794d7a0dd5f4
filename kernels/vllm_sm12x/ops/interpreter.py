"""What Triton's interpreter (``TRITON_INTERPRET=1``) does wrong, worked around in one place.

Two things of Triton 3.6.0. ``tl.dot`` of bfloat16 operands gives garbage. A conversion from float32
to bfloat16 cuts the low bits off, where the compiled one rounds to nearest even, and makes other
numbers of subnormal ones. Kernels call :func:`dot` and :func:`to_bfloat16` instead.
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
