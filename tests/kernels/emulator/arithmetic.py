"""Instructions whose result follows from the operands of the same thread alone.

As the PTX ISA defines them. Where it allows an error (``ex2.approx``, ``rsqrt.approx``,
``div.full``) the result here is the nearest number. A fused multiply-add is rounded once to float64
and once to float32, which may differ from the GPU's by one place in rare cases.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emulator import types
from emulator.errors import PtxError

Function = Callable[..., np.ndarray]

_WIDER = {np.int32: np.int64, np.uint32: np.uint64, np.int16: np.int32, np.uint16: np.uint32}


def shift(value: np.ndarray, amount: np.ndarray, left: bool) -> np.ndarray:
    """Shift by an unsigned amount; one past the width shifts everything out."""
    bits = 8 * value.itemsize
    inside = np.minimum(amount, np.uint32(bits - 1)).astype(value.dtype)
    moved = value << inside if left else value >> inside
    if (amount < bits).all():
        return moved
    rest = np.zeros_like(moved) if left else value >> value.dtype.type(bits - 1)
    if not left and value.dtype.kind == "u":
        rest = np.zeros_like(moved)
    return np.where(amount < bits, moved, rest)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integer division toward zero."""
    found = a // b
    if a.dtype.kind == "i":
        found = found + ((found < 0) & (found * b != a)).astype(a.dtype)
    return found


def extract(value: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Bit field (``bfe``) of a 32-bit value; signed where the value's type is."""
    start, length = int(start[0]) & 0xFF, int(length[0]) & 0xFF
    if start + length > 32:
        raise PtxError(f"bfe: bits {start} to {start + length}, allowed: to 32")
    left = np.array(32 - start - length, value.dtype)
    return (value << left) >> np.array(32 - length, value.dtype)


def insert(a: np.ndarray, b: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``bfi``: ``b`` with the low bits of ``a`` from ``start`` on."""
    bits, start = 8 * a.itemsize, int(start[0]) & 0xFF
    mask = (2 ** min(int(length[0]) & 0xFF, bits) - 1) << start & (2**bits - 1)
    moved = a << np.array(start, a.dtype) if start < bits else np.zeros_like(a)
    return (moved & np.array(mask, a.dtype)) | (b & np.array(mask ^ (2**bits - 1), a.dtype))


def permute(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    """``prmt.b32``: each byte of the result is one of the eight of ``b:a``, or its sign."""
    eight = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    found = np.uint64(0)
    for byte in range(4):
        selector = (selectors >> np.uint32(4 * byte)) & np.uint32(0xF)
        chosen = (
            eight >> ((selector & np.uint32(7)).astype(np.uint64) * np.uint64(8))
        ) & np.uint64(0xFF)
        signs = selector >> np.uint32(3)
        if signs.any():
            sign = np.where(chosen >> np.uint64(7), np.uint64(0xFF), np.uint64(0))
            chosen = np.where(signs, sign, chosen)
        found = found | (chosen << np.uint64(8 * byte))
    return found.astype(np.uint32)


def multiply_bfloat16(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Products of bfloat16 numbers, rounded once: a product is exact in float32."""
    product = types.bfloat16_to_float32(a) * types.bfloat16_to_float32(b)
    return types.float32_to_bfloat16(product)


def fused_bfloat16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` of bfloat16 numbers, rounded to bfloat16 once."""
    a, b, c = (types.bfloat16_to_float32(value).astype(np.float64) for value in (a, b, c))
    exact = a * b + c
    # On the way through float32, what is lost makes the last place odd: then to the nearest
    # bfloat16 comes out what it does without the detour.
    near = exact.astype(np.float32)
    beyond = np.abs(near) > np.abs(exact)
    cut = np.where(beyond, np.nextafter(near, np.float32(0)), near)
    lost = np.isfinite(exact) & np.isfinite(cut) & (cut != exact)
    odd = cut.view(np.uint32) | lost.astype(np.uint32)
    return types.float32_to_bfloat16(odd.view(np.float32))


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` of float32."""
    exact = a.astype(np.float64) * b.astype(np.float64)
    return (exact + c.astype(np.float64)).astype(np.float32)


def fused_down(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` of float32, rounded toward minus infinity."""
    exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


def wide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Product in the type of twice the width."""
    kind = _WIDER[a.dtype.type]
    return a.astype(kind) * b.astype(kind)


def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Upper half of the product."""
    product = wide(a, b)
    return (product >> product.dtype.type(8 * a.itemsize)).astype(a.dtype)


def smaller_magnitude(minimum: Function) -> Function:
    """``min.xorsign.abs``: the smaller magnitude, negative where one sign is."""

    def apply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        magnitude = minimum(np.abs(a), np.abs(b))
        return np.where(np.signbit(a) ^ np.signbit(b), -magnitude, magnitude)

    return apply


def flushed(value: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers as zeros of their sign (``.ftz``)."""
    small = np.abs(value) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), value), value)


_FLOAT = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mul.rn": np.multiply,
    "div.full": np.divide,
    "div.rn": np.divide,
    "fma.rn": fused,
    "fma.rm": fused_down,
    "max": np.fmax,
    "min": np.fmin,
    "max.NaN": np.maximum,
    "min.NaN": np.minimum,
    "min.xorsign.abs": smaller_magnitude(np.fmin),
    "min.NaN.xorsign.abs": smaller_magnitude(np.minimum),
    "abs": np.abs,
    "neg": np.negative,
    "ex2.approx": np.exp2,
    "rsqrt.approx": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(np.float32),
    "rcp.approx": lambda x: np.divide(np.float32(1), x),
    "rcp.rn": lambda x: np.divide(np.float32(1), x),
    "sqrt.approx": np.sqrt,
    "sqrt.rn": np.sqrt,
    "lg2.approx": np.log2,
}

_INTEGER = {
    "add": np.add,
    "sub": np.subtract,
    "mul.lo": np.multiply,
    "mul.hi": high,
    "mul.wide": wide,
    "mad.lo": lambda a, b, c: a * b + c,
    "div": quotient,
    "rem": lambda a, b: a - quotient(a, b) * b,
    "max": np.maximum,
    "min": np.minimum,
    "min.relu": lambda a, b: np.maximum(np.minimum(a, b), 0).astype(a.dtype),
    "neg": np.negative,
    "abs": np.abs,
}

_BITS = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "mov": lambda a: a,
}

_PAIRS = {
    "add.f32x2": np.add,
    "sub.f32x2": np.subtract,
    "mul.f32x2": np.multiply,
    "mul.rn.f32x2": np.multiply,
    "fma.rn.f32x2": fused,
    "add.s16x2": np.add,
    "mul.bf16x2": multiply_bfloat16,
    "mul.rn.bf16x2": multiply_bfloat16,
    "fma.rn.bf16x2": fused_bfloat16,
    "abs.bf16x2": lambda a: a & np.uint16(0x7FFF),
}


def _as_float32(function: Function) -> Function:
    """Of bfloat16 numbers, as bits in uint16."""
    return lambda *values: types.float32_to_bfloat16(
        function(*map(types.bfloat16_to_float32, values))
    )


# Of numbers in registers of 16 bits.
_BFLOAT16 = {
    "abs.bf16": lambda a: a & np.uint16(0x7FFF),
    "mul.bf16": multiply_bfloat16,
    "max.bf16": _as_float32(np.fmax),
    "min.bf16": _as_float32(np.fmin),
}

_COMPARE = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "neu": np.not_equal,
    # Also true where one is no number.
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}

_DOUBLE = {
    "add.rn": np.add,
    "sub.rn": np.subtract,
    "mul.rn": np.multiply,
    "div.rn": np.divide,
    "max": np.fmax,
    "min": np.fmin,
    "abs": np.abs,
    "neg": np.negative,
}


def simple(opcode: str) -> tuple[tuple[type[np.generic], ...], Function] | None:
    """The type of each operand and the function of them, or None for another sort of opcode.

    The last type is that of all further operands.
    """
    name, _, kind = opcode.rpartition(".")
    if kind in types.PAIRS and opcode in _PAIRS:
        whole, each = types.PAIRS[kind]
        return (whole,), _in_pairs(_PAIRS[opcode], whole, each)
    if opcode in _BFLOAT16:
        return (np.uint16,), _BFLOAT16[opcode]
    if kind not in types.DTYPES:
        return None
    dtype = types.DTYPES[kind]
    if kind == "f32":
        flush = name.endswith(".ftz")
        function = _FLOAT.get(name.removesuffix(".ftz"))
        if function is not None:
            return (dtype,), _flushing(function) if flush else function
    if kind == "f64" and name in _DOUBLE:
        return (dtype,), _DOUBLE[name]
    if kind[0] in "us" and name in _INTEGER:
        return (dtype,), _INTEGER[name]
    if name in _BITS:
        return (dtype,), _BITS[name]
    if name in ("shl", "shr"):
        return (dtype, np.uint32), lambda a, n: shift(a, n, name == "shl")
    if name == "mad.wide":
        wider = _WIDER[dtype]
        return (dtype, dtype, wider), lambda a, b, c: wide(a, b) + c
    if name == "bfi":
        return (dtype, dtype, np.uint32), insert
    if name == "bfe":
        return (dtype, np.uint32), extract
    if opcode == "popc.b32":
        return (dtype,), lambda a: np.bitwise_count(a).astype(dtype)
    if opcode == "prmt.b32":
        return (dtype,), permute
    if name == "selp":
        return (dtype, dtype, np.bool_), lambda a, b, p: np.where(p, a, b)
    if name.startswith("setp.") and name[5:] in _COMPARE:
        return (dtype,), _COMPARE[name[5:]]
    return None


def _in_pairs(function: Function, whole: type[np.generic], each: type[np.generic]) -> Function:
    def apply(*values: np.ndarray) -> np.ndarray:
        size = max(value.size for value in values)
        halves = [np.ascontiguousarray(np.broadcast_to(v, size)).view(each) for v in values]
        return np.ascontiguousarray(function(*halves)).view(whole)

    return apply


def _flushing(function: Function) -> Function:
    return lambda *values: flushed(function(*map(flushed, values)))


def _two_bfloat16(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return _joined(types.float32_to_bfloat16(high), types.float32_to_bfloat16(low))


def _two_e4m3(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    high, low = types.float32_to_e4m3(high), types.float32_to_e4m3(low)
    return (high.astype(np.uint16) << np.uint16(8)) | low


def _float16_of_e4m3(two: np.ndarray) -> np.ndarray:
    def half(bits: np.ndarray) -> np.ndarray:
        return types.e4m3_to_float32(bits).astype(np.float16).view(np.uint16)

    return _joined(half(two >> np.uint16(8)), half(two & np.uint16(0xFF)))


def _joined(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return (high.astype(np.uint32) << np.uint32(16)) | low


def _to_integer(dtype: type[np.generic]) -> Function:
    """Toward zero; beyond the range its end, and 0 for NaN."""
    ends = np.iinfo(dtype)

    def convert(value: np.ndarray) -> np.ndarray:
        whole = np.trunc(np.nan_to_num(value.astype(np.float64), nan=0))
        return np.clip(whole, ends.min, ends.max).astype(dtype)

    return convert


def _two_float16(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return _joined(*(value.astype(np.float16).view(np.uint16) for value in (high, low)))


_CONVERSIONS = {
    "cvt.f32.bf16": (np.uint16, types.bfloat16_to_float32),
    "cvt.f32.f16": (np.uint16, types.float16_to_float32),
    "cvt.rn.f16.f32": (np.float32, lambda a: a.astype(np.float16).view(np.uint16)),
    "cvt.rn.f16x2.f32": (np.float32, _two_float16),
    "cvt.rn.bf16.f32": (np.float32, types.float32_to_bfloat16),
    "cvt.rn.bf16x2.f32": (np.float32, _two_bfloat16),
    "cvt.rn.satfinite.e4m3x2.f32": (np.float32, _two_e4m3),
    "cvt.rn.f16x2.e4m3x2": (np.uint16, _float16_of_e4m3),
    "cvt.f64.f32": (np.float32, lambda a: a.astype(np.float64)),
    "cvt.rn.f32.f64": (np.float64, lambda a: a.astype(np.float32)),
    "cvt.rn.f32.s32": (np.int32, lambda a: a.astype(np.float32)),
    "cvt.rn.f32.u32": (np.uint32, lambda a: a.astype(np.float32)),
    "cvt.rn.f32.u16": (np.uint16, lambda a: a.astype(np.float32)),
    "cvt.rzi.u16.f32": (np.float32, _to_integer(np.uint16)),
    "cvt.rzi.u32.f32": (np.float32, _to_integer(np.uint32)),
    "cvt.rzi.s32.f32": (np.float32, _to_integer(np.int32)),
    "cvt.sat.f32.f32": (np.float32, lambda a: np.nan_to_num(np.clip(a, 0, 1), nan=0)),
    "cvt.rpi.f32.f32": (np.float32, np.ceil),
    "cvt.rpi.ftz.f32.f32": (np.float32, lambda a: np.ceil(flushed(a))),
}


def conversion(opcode: str) -> tuple[type[np.generic], Function] | None:
    """The type of a ``cvt``'s operands and the function of them."""
    if opcode in _CONVERSIONS:
        return _CONVERSIONS[opcode]
    name, *kinds = opcode.split(".")
    if name == "cvt" and len(kinds) == 2 and all(kind[0] in "us" for kind in kinds):
        to, of = (types.DTYPES.get(kind) for kind in kinds)
        if to and of:
            return of, lambda a: a.astype(to)
    return None
