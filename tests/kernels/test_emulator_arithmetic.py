"""Each instruction of one thread, on drawn and on awkward numbers, against Python's own numbers."""

from __future__ import annotations

import math
import random
import struct
from fractions import Fraction

import pytest
import torch
from emulator.errors import PtxError
from ptx_text import execute

THREADS = 256


def signed(value: int, bits: int) -> int:
    value %= 2**bits
    return value - 2**bits if value >> (bits - 1) else value


def to_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def to_bits(value: float) -> int:
    """The nearest float32's."""
    try:
        return struct.unpack("<I", struct.pack("<f", value))[0]
    except OverflowError:
        return 0x7F800000 if value > 0 else 0xFF800000


AWKWARD = {
    16: [0, 1, 0x7FFF, 0x8000, 0xFFFF],
    32: [0, 1, 31, 32, 33, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x3F800000, 0xBF800000,
         0x7F800000, 0xFF800000, 0x00000001, 0x80000001, 0x00800000, 0x7F7FFFFF],
    64: [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1],
}  # fmt: skip
TORCH = {16: torch.int16, 32: torch.int32, 64: torch.int64}
CLASS = {16: "rs", 32: "r", 64: "rd"}


def draw(bits: int, rng: random.Random, floats: bool = False) -> list[int]:
    """Numbers as bits, half of them awkward. Floats are of moderate size, or awkward and no NaN."""
    if floats:
        common = [to_bits(rng.uniform(-8, 8)) for _ in range(THREADS)]
    else:
        common = [rng.getrandbits(bits) for _ in range(THREADS)]
    awkward = [v for v in AWKWARD[bits] if not floats or not math.isnan(to_float(v))]
    return [rng.choice(awkward) if rng.random() < 0.5 else v for v in common]


def tensor(values: list[int], bits: int) -> torch.Tensor:
    return torch.tensor([signed(v, bits) for v in values], dtype=TORCH[bits])


def apply(text: str, widths: list[int], inputs: list[list[int]], result: int) -> list[int]:
    """Results of an instruction of operands ``a``, ``b``, ``c`` and target ``d``."""
    lines = []
    for index, bits in enumerate(widths):
        name = f"%{CLASS[bits]}{index + 1}"
        text = text.replace(f" {'abc'[index]}", f" {name}")
        lines += [
            f"mad.lo.s64 %rd80, %rd99, {bits // 8}, %rd{90 + index};",
            f"ld.global.b{bits} {{ {name} }}, [ %rd80 + 0 ];",
        ]
    target = f"%{CLASS[result]}50"
    lines += [
        text.replace(" d", f" {target}"),
        f"mad.lo.s64 %rd81, %rd99, {result // 8}, %rd{90 + len(widths)};",
        f"st.global.b{result} [ %rd81 + 0 ], {{ {target} }};",
    ]
    out = torch.zeros(THREADS, dtype=TORCH[result])
    given = [tensor(values, bits) for values, bits in zip(inputs, widths, strict=True)]
    execute("\n".join(lines), *given, out, threads=THREADS)
    return [v % 2**result for v in out.tolist()]


def truncated(a: int, b: int) -> int:
    """Quotient toward zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def permuted(a: int, b: int, selectors: int) -> int:
    eight = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    found = []
    for byte in range(4):
        selector = selectors >> (4 * byte) & 0xF
        value = eight[selector & 7]
        found.append((0xFF if value >> 7 else 0) if selector & 8 else value)
    return int.from_bytes(bytes(found), "little")


def field(value: int, start: int, length: int, sign: bool) -> int:
    found = value >> start & (2**length - 1)
    return signed(found, length) if sign else found


S32, S64 = lambda v: signed(v, 32), lambda v: signed(v, 64)

INTEGERS = {
    "add.s32 d, a, b;": ([32, 32], 32, lambda a, b: a + b),
    "sub.s32 d, a, b;": ([32, 32], 32, lambda a, b: a - b),
    "add.s64 d, a, b;": ([64, 64], 64, lambda a, b: a + b),
    "mul.lo.s32 d, a, b;": ([32, 32], 32, lambda a, b: a * b),
    "mul.lo.s64 d, a, b;": ([64, 64], 64, lambda a, b: a * b),
    "mul.hi.s32 d, a, b;": ([32, 32], 32, lambda a, b: S32(a) * S32(b) >> 32),
    "mul.hi.u16 d, a, b;": ([16, 16], 16, lambda a, b: a * b >> 16),
    "sub.s16 d, a, b;": ([16, 16], 16, lambda a, b: a - b),
    "mul.wide.s32 d, a, b;": ([32, 32], 64, lambda a, b: S32(a) * S32(b)),
    "mul.wide.u32 d, a, b;": ([32, 32], 64, lambda a, b: a * b),
    "mad.lo.s32 d, a, b, c;": ([32, 32, 32], 32, lambda a, b, c: a * b + c),
    "mad.wide.s32 d, a, b, c;": ([32, 32, 64], 64, lambda a, b, c: S32(a) * S32(b) + c),
    "mad.wide.u32 d, a, b, c;": ([32, 32, 64], 64, lambda a, b, c: a * b + c),
    "min.s32 d, a, b;": ([32, 32], 32, lambda a, b: min(S32(a), S32(b))),
    "min.u32 d, a, b;": ([32, 32], 32, min),
    "max.s32 d, a, b;": ([32, 32], 32, lambda a, b: max(S32(a), S32(b))),
    "max.s64 d, a, b;": ([64, 64], 64, lambda a, b: max(S64(a), S64(b))),
    "min.relu.s32 d, a, b;": ([32, 32], 32, lambda a, b: max(0, min(S32(a), S32(b)))),
    "neg.s32 d, a;": ([32], 32, lambda a: -a),
    "and.b32 d, a, b;": ([32, 32], 32, lambda a, b: a & b),
    "or.b64 d, a, b;": ([64, 64], 64, lambda a, b: a | b),
    "xor.b32 d, a, b;": ([32, 32], 32, lambda a, b: a ^ b),
    "not.b32 d, a;": ([32], 32, lambda a: ~a),
    "and.b16 d, a, b;": ([16, 16], 16, lambda a, b: a & b),
    "shl.b32 d, a, b;": ([32, 32], 32, lambda a, b: a << b if b < 32 else 0),
    "shr.u32 d, a, b;": ([32, 32], 32, lambda a, b: a >> b if b < 32 else 0),
    "shr.s32 d, a, b;": ([32, 32], 32, lambda a, b: S32(a) >> min(b, 31)),
    "shl.b64 d, a, 7;": ([64], 64, lambda a: a << 7),
    "shr.s64 d, a, 33;": ([64], 64, lambda a: S64(a) >> 33),
    "shl.b16 d, a, 9;": ([16], 16, lambda a: a << 9),
    "shr.s16 d, a, 8;": ([16], 16, lambda a: signed(a, 16) >> 8),
    "bfe.u32 d, a, 5, 3;": ([32], 32, lambda a: field(a, 5, 3, False)),
    "bfe.s32 d, a, 4, 1;": ([32], 32, lambda a: field(a, 4, 1, True)),
    "bfe.s32 d, a, 28, 4;": ([32], 32, lambda a: field(a, 28, 4, True)),
    "bfi.b32 d, a, b, 4, 28;": ([32, 32], 32, lambda a, b: a << 4 | b & 0xF),
    "bfi.b32 d, a, b, 30, 8;": ([32, 32], 32, lambda a, b: a << 30 | b & 2**30 - 1),
    "bfi.b64 d, a, b, 8, 3;": ([64, 64], 64, lambda a, b: (a & 7) << 8 | b & ~(7 << 8)),
    "prmt.b32 d, a, b, c;": ([32, 32, 32], 32, permuted),
    "prmt.b32 d, a, b, 0xBA98U;": ([32, 32], 32, lambda a, b: permuted(a, b, 0xBA98)),
    "add.s16x2 d, a, b;": (
        [32, 32],
        32,
        lambda a, b: ((a & 0xFFFF) + (b & 0xFFFF) & 0xFFFF) | ((a >> 16) + (b >> 16) << 16),
    ),
    "popc.b32 d, a;": ([32], 32, lambda a: a.bit_count()),
    "cvt.u16.u32 d, a;": ([32], 16, lambda a: a),
    "cvt.u32.u16 d, a;": ([16], 32, lambda a: a),
    "cvt.s64.s32 d, a;": ([32], 64, S32),
    "cvt.u64.u32 d, a;": ([32], 64, lambda a: a),
    "cvt.u32.u64 d, a;": ([64], 32, lambda a: a),
    "mov.b32 d, -8388608;": ([], 32, lambda: 0xFF800000),
}


@pytest.mark.parametrize("text", INTEGERS)
def test_integers(text):
    widths, result, function = INTEGERS[text]
    rng = random.Random(text)
    inputs = [draw(bits, rng) for bits in widths]
    if text.startswith("sh") and len(widths) == 2:
        inputs[1] = [rng.choice([0, 1, 5, 31, 32, 33, 100, 2**31]) for _ in inputs[1]]
    rows = list(zip(*inputs, strict=True)) if inputs else [()] * THREADS
    expected = [function(*row) % 2**result for row in rows]
    assert apply(text, widths, inputs, result) == expected


@pytest.mark.parametrize(("name", "bits"), [("s32", 32), ("u32", 32), ("s64", 64)])
@pytest.mark.parametrize("what", ["div", "rem"])
def test_division_is_toward_zero(name, bits, what):
    rng = random.Random(name)
    a, b = draw(bits, rng), [v or 3 for v in draw(bits, rng)]
    # The most negative number by -1 is undefined.
    b = [7 if v == 2**bits - 1 else v for v in b]
    sign = (lambda v: signed(v, bits)) if name[0] == "s" else (lambda v: v)
    quotients = [truncated(sign(x), sign(y)) for x, y in zip(a, b, strict=True)]
    expected = quotients
    if what == "rem":
        rows = zip(a, b, quotients, strict=True)
        expected = [sign(x) - q * sign(y) for x, y, q in rows]
    found = apply(f"{what}.{name} d, a, b;", [bits, bits], [a, b], bits)
    assert found == [v % 2**bits for v in expected]


def plus(a: float, b: float) -> float:
    return math.nan if math.isinf(a) and math.isinf(b) and a != b else a + b


def times(a: float, b: float) -> float:
    return math.nan if {abs(a), abs(b)} == {0.0, math.inf} else a * b


def over(a: float, b: float) -> float:
    if b == 0:
        return math.nan if a == 0 else math.copysign(math.inf, a) * math.copysign(1, b)
    return math.nan if math.isinf(a) and math.isinf(b) else a / b


def nearest_two(x: float) -> float:
    try:
        return 2.0**x
    except OverflowError:
        return math.inf


def smaller(a: float, b: float) -> float:
    return math.copysign(min(abs(a), abs(b)), math.copysign(1, a) * math.copysign(1, b))


def ceiling(x: float) -> float:
    """Of subnormal numbers that of zero; with the sign of the number."""
    if math.isinf(x) or x == 0:
        return x
    return math.copysign(math.ceil(x) if abs(x) >= 2.0**-126 else 0.0, x)


# float64 has more than twice the bits, so that its sums, products and quotients round to the
# float32 that the exact ones round to.
FLOATS = {
    "add.f32 d, a, b;": plus,
    "sub.f32 d, a, b;": lambda a, b: plus(a, -b),
    "mul.f32 d, a, b;": times,
    "div.full.f32 d, a, b;": over,
    "div.rn.f32 d, a, b;": over,
    # Zero is more than minus zero.
    "max.f32 d, a, b;": lambda a, b: max(a, b, key=lambda v: (v, math.copysign(1, v))),
    "min.xorsign.abs.f32 d, a, b;": smaller,
    "min.NaN.xorsign.abs.f32 d, a, b;": smaller,
    "abs.f32 d, a;": abs,
    "neg.f32 d, a;": lambda a: -a,
    "ex2.approx.f32 d, a;": nearest_two,
    "rcp.approx.f32 d, a;": lambda a: over(1.0, a),
    "rcp.rn.f32 d, a;": lambda a: over(1.0, a),
    "sqrt.rn.f32 d, a;": lambda a: a if a == 0 else math.nan if a < 0 else math.sqrt(a),
    "cvt.sat.f32.f32 d, a;": lambda a: min(max(a, 0.0), 1.0),
    "cvt.rpi.f32.f32 d, a;": lambda a: a if math.isinf(a) else math.copysign(math.ceil(a), a),
    "cvt.rpi.ftz.f32.f32 d, a;": ceiling,
}


def same(found: list[int], expected: list[float], places: int) -> None:
    """Equal floats, or neighbours so many places away; any NaN equals any."""
    for bits, wanted in zip(found, expected, strict=True):
        if math.isnan(wanted):
            assert math.isnan(to_float(bits))
        else:
            assert abs(bits - to_bits(wanted)) <= places, (to_float(bits), wanted)


@pytest.mark.parametrize("text", FLOATS)
def test_floats(text):
    function, rng = FLOATS[text], random.Random(text)
    count = 2 if " b" in text else 1
    inputs = [draw(32, rng, floats=True) for _ in range(count)]
    expected = [function(*map(to_float, row)) for row in zip(*inputs, strict=True)]
    found = apply(text, [32] * count, inputs, 32)
    # numpy's exp2 of float32 and Python's of float64 may differ in the last place.
    same(found, expected, places=1 if "ex2" in text else 0)


def test_fused_multiply_add_rounds_once():
    rng = random.Random(3)
    a, b, c = ([to_bits(rng.uniform(-4, 4)) for _ in range(THREADS)] for _ in range(3))
    # (1 + 2^-12)^2 - (1 + 2^-11) is 2^-24: rounded in between, nothing would be left.
    a[0] = b[0] = to_bits(1 + 2**-12)
    c[0] = to_bits(-(1 + 2**-11))
    found = apply("fma.rn.f32 d, a, b, c;", [32] * 3, [a, b, c], 32)
    assert to_float(found[0]) == 2.0**-24
    rows = zip(a, b, c, strict=True)
    same(found, [to_float(x) * to_float(y) + to_float(z) for x, y, z in rows], places=0)


def test_fused_multiply_add_rounded_down():
    rng = random.Random(13)
    a, b, c = ([to_bits(rng.uniform(-4, 4)) for _ in range(THREADS)] for _ in range(3))
    found = apply("fma.rm.f32 d, a, b, c;", [32] * 3, [a, b, c], 32)
    for result, *row in zip(found, a, b, c, strict=True):
        x, y, z = (Fraction(to_float(bits)) for bits in row)
        assert Fraction(to_float(result)) <= x * y + z
        above = torch.nextafter(torch.tensor(to_float(result)), torch.tensor(math.inf))
        assert Fraction(above.item()) > x * y + z


def test_logarithm():
    values = [2.0**n for n in range(-60, 68)] * 2
    found = apply("lg2.approx.f32 d, a;", [32], [[to_bits(v) for v in values]], 32)
    assert [to_float(bits) for bits in found] == [float(n) for n in range(-60, 68)] * 2


def test_reciprocal_square_root():
    rng = random.Random(4)
    values = [to_bits(rng.uniform(1e-3, 1e3)) for _ in range(THREADS)]
    found = apply("rsqrt.approx.ftz.f32 d, a;", [32], [values], 32)
    same(found, [1 / math.sqrt(to_float(v)) for v in values], places=0)


@pytest.mark.parametrize("flush", [False, True])
def test_subnormal_numbers_are_zero_where_asked_for(flush):
    small = to_bits(2.0**-130)
    name = "fma.rn.ftz.f32" if flush else "fma.rn.f32"
    inputs = [[small] * THREADS, [to_bits(-1.0)] * THREADS, [0] * THREADS]
    found = apply(f"{name} d, a, b, c;", [32] * 3, inputs, 32)
    assert set(found) == {0x00000000 if flush else small | 0x80000000}


def test_maxima_and_nan():
    """One form gives the number beside a NaN, the other the NaN."""
    nan = [0x7FC00000] * THREADS
    one = [to_bits(1.0)] * THREADS
    assert set(apply("max.f32 d, a, b;", [32, 32], [nan, one], 32)) == {to_bits(1.0)}
    same(apply("max.NaN.f32 d, a, b;", [32, 32], [nan, one], 32), [math.nan] * THREADS, 0)
    found = apply("min.xorsign.abs.f32 d, a, b;", [32, 32], [nan, one], 32)
    assert set(found) == {to_bits(1.0)}
    found = apply("min.NaN.xorsign.abs.f32 d, a, b;", [32, 32], [nan, one], 32)
    same(found, [math.nan] * THREADS, 0)


def test_pairs_of_floats():
    rng = random.Random(5)
    a, b, c = ([to_bits(rng.uniform(-4, 4)) for _ in range(2 * THREADS)] for _ in range(3))

    def packed(values):
        return [values[i] | values[i + THREADS] << 32 for i in range(THREADS)]

    found = apply("fma.rn.f32x2 d, a, b, c;", [64] * 3, [packed(v) for v in (a, b, c)], 64)
    halves = [v & 0xFFFFFFFF for v in found] + [v >> 32 for v in found]
    rows = zip(a, b, c, strict=True)
    same(halves, [to_float(x) * to_float(y) + to_float(z) for x, y, z in rows], places=0)


def bfloat16(value: float) -> int:
    """Bits of the nearest bfloat16, by torch."""
    return torch.tensor(value).to(torch.bfloat16).view(torch.int16).item() & 0xFFFF


def test_conversions_to_bfloat16():
    rng = random.Random(6)
    a, b = (draw(32, rng, floats=True) for _ in range(2))
    found = apply("cvt.rn.bf16x2.f32 d, a, b;", [32, 32], [a, b], 32)
    rows = zip(a, b, strict=True)
    assert found == [bfloat16(to_float(x)) << 16 | bfloat16(to_float(y)) for x, y in rows]
    assert apply("cvt.rn.bf16.f32 d, a;", [32], [a], 16) == [bfloat16(to_float(x)) for x in a]
    # Half of the way between neighbours goes to the even one.
    assert bfloat16(1 + 2**-8) == bfloat16(1.0) and bfloat16(1 + 3 * 2**-8) == bfloat16(1 + 2**-6)


def test_conversion_to_integers():
    cases = {0.0: 0, 0.99: 0, 1.5: 1, 255.9: 255, -0.5: 0, -7.0: 0, 65535.9: 65535, 1e9: 65535,
             math.inf: 65535, -math.inf: 0, math.nan: 0}  # fmt: skip
    values = [to_bits(v) for v in cases] * 24
    found = apply("cvt.rzi.u16.f32 d, a;", [32], [values[:THREADS]], 16)
    assert found == (list(cases.values()) * 24)[:THREADS]


def test_conversion_of_integers():
    numbers = [0, 1, 255, 4096, 65535] * 52
    found = apply("cvt.rn.f32.u16 d, a;", [16], [numbers[:THREADS]], 32)
    assert [to_float(bits) for bits in found] == numbers[:THREADS]
    # The nearest float, to even: 2**24 + 1 lies between two.
    numbers = [-1, 2**31 - 1, -(2**31), 2**24 + 1] * 64
    found = apply("cvt.rn.f32.s32 d, a;", [32], [[n % 2**32 for n in numbers]], 32)
    assert [to_float(bits) for bits in found] == [-1.0, 2.0**31, -(2.0**31), 2.0**24] * 64


def test_conversion_of_unsigned_integers():
    numbers = [0, 2**31, 2**32 - 1, 2**24 + 1] * 64
    found = apply("cvt.rn.f32.u32 d, a;", [32], [numbers], 32)
    assert [to_float(bits) for bits in found] == [0.0, 2.0**31, 2.0**32, 2.0**24] * 64


def double(value: float) -> int:
    """Bits of a float64."""
    return struct.unpack("<Q", struct.pack("<d", value))[0]


def test_doubles():
    rng = random.Random(11)
    a, b = ([rng.uniform(-8, 8) for _ in range(THREADS)] for _ in range(2))
    bits = [[double(v) for v in values] for values in (a, b)]
    expected = {
        "add.rn.f64": [x + y for x, y in zip(a, b, strict=True)],
        "sub.rn.f64": [x - y for x, y in zip(a, b, strict=True)],
        "mul.rn.f64": [x * y for x, y in zip(a, b, strict=True)],
        "div.rn.f64": [x / y for x, y in zip(a, b, strict=True)],
        "max.f64": [max(x, y) for x, y in zip(a, b, strict=True)],
        "min.f64": [min(x, y) for x, y in zip(a, b, strict=True)],
    }
    for name, wanted in expected.items():
        found = apply(f"{name} d, a, b;", [64, 64], bits, 64)
        assert found == [double(v) for v in wanted], name
    assert apply("neg.f64 d, a;", [64], bits[:1], 64) == [double(-v) for v in a]
    assert apply("abs.f64 d, a;", [64], bits[:1], 64) == [double(abs(v)) for v in a]
    narrow = [to_bits(v) for v in a]
    found = apply("cvt.f64.f32 d, a;", [32], [narrow], 64)
    assert found == [double(to_float(v)) for v in narrow]
    assert apply("cvt.rn.f32.f64 d, a;", [64], bits[:1], 32) == narrow


def test_one_bfloat16():
    rng = random.Random(12)
    a, b = ([rng.uniform(-4, 4) for _ in range(THREADS)] for _ in range(2))
    a, b = ([bfloat16(v) for v in values] for values in (a, b))

    def of(bits: int) -> float:
        return to_float(bits << 16)

    assert apply("abs.bf16 d, a;", [16], [a], 16) == [v & 0x7FFF for v in a]
    rows = list(zip(a, b, strict=True))
    assert apply("max.bf16 d, a, b;", [16, 16], [a, b], 16) == [max(r, key=of) for r in rows]
    assert apply("min.bf16 d, a, b;", [16, 16], [a, b], 16) == [min(r, key=of) for r in rows]
    # The number beside a NaN.
    nan = [0x7FC0] * THREADS
    assert apply("max.bf16 d, a, b;", [16, 16], [nan, b], 16) == b


def test_products_of_bfloat16():
    rng = random.Random(7)
    a, b = ([bfloat16(rng.uniform(-4, 4)) for _ in range(2 * THREADS)] for _ in range(2))

    def packed(values):
        return [values[i] | values[i + THREADS] << 16 for i in range(THREADS)]

    rows = zip(a, b, strict=True)
    exact = [bfloat16(to_float(x << 16) * to_float(y << 16)) for x, y in rows]
    for name in ("mul.rn.bf16x2", "mul.bf16x2"):
        found = apply(f"{name} d, a, b;", [32, 32], [packed(a), packed(b)], 32)
        assert found == packed(exact)


def test_fused_products_of_bfloat16_are_rounded_once():
    rng = random.Random(14)
    a, b, c = ([bfloat16(rng.uniform(-4, 4)) for _ in range(2 * THREADS)] for _ in range(3))
    # The product lies in the middle between two neighbours; float32 does not keep what is added.
    for index, added in enumerate((0.0, 2.0**-30, -(2.0**-30))):
        a[index], b[index], c[index] = (bfloat16(v) for v in (1.5, 1.359375, added))

    def packed(values):
        return [values[i] | values[i + THREADS] << 16 for i in range(THREADS)]

    found = apply("fma.rn.bf16x2 d, a, b, c;", [32] * 3, [packed(v) for v in (a, b, c)], 32)
    halves = [v & 0xFFFF for v in found] + [v >> 16 for v in found]
    for result, *row in zip(halves, a, b, c, strict=True):
        x, y, z = (Fraction(to_float(bits << 16)) for bits in row)
        assert result == nearest_bfloat16(x * y + z)


def nearest_bfloat16(exact: Fraction) -> int:
    """Bits of the nearest bfloat16 of normal size, to even, by whole numbers."""
    if exact == 0:
        return 0
    exponent = math.floor(math.log2(abs(exact)))
    unit = Fraction(2) ** (exponent - 7)
    return to_bits(float(round(exact / unit) * unit)) >> 16


def test_a_product_of_two_bfloat16():
    rng = random.Random(15)
    a, b = ([bfloat16(rng.uniform(-4, 4)) for _ in range(THREADS)] for _ in range(2))
    rows = zip(a, b, strict=True)
    exact = [bfloat16(to_float(x << 16) * to_float(y << 16)) for x, y in rows]
    assert apply("mul.bf16 d, a, b;", [16, 16], [a, b], 16) == exact


def test_float16():
    rng = random.Random(16)
    values = [rng.uniform(-70000, 70000) for _ in range(THREADS)]
    found = apply("cvt.rn.f16.f32 d, a;", [32], [[to_bits(v) for v in values]], 16)
    halves = torch.tensor(values, dtype=torch.float32).to(torch.float16).view(torch.int16)
    assert found == [v & 0xFFFF for v in halves.tolist()]


def test_e4m3():
    """Every code to float16, and numbers between and beyond the codes to a code."""
    codes = list(range(THREADS))
    both = [c | (255 - c) << 8 for c in codes]
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float16)
    halves = [v & 0xFFFF for v in numbers.view(torch.int16).tolist()]
    found = apply("cvt.rn.f16x2.e4m3x2 d, a;", [16], [both], 32)
    for value, code in zip(found, codes, strict=True):
        for half, wanted in ((value & 0xFFFF, code), (value >> 16, 255 - code)):
            assert half == halves[wanted] or wanted & 0x7F == 0x7F
    # By hand: 448 is the largest, 17 lies between 16 and 18, 2**-10 between 0 and 2**-9.
    cases = {1.0: 0x38, 448.0: 0x7E, 1e9: 0x7E, -1e9: 0xFE, 17.0: 0x58, 19.0: 0x5A, 2.0**-10: 0x00,
             3 * 2.0**-10: 0x02, -0.0: 0x80}  # fmt: skip
    values = [to_bits(v) for v in cases] * 30
    text = "cvt.rn.satfinite.e4m3x2.f32 d, a, b;"
    found = apply(text, [32, 32], [values[:THREADS], [0] * THREADS], 16)
    assert found == [code << 8 for code in (list(cases.values()) * 30)[:THREADS]]


def test_packing():
    rng = random.Random(8)
    a, b = draw(32, rng), draw(32, rng)
    found = apply("mov.b64 d, { a, b};", [32, 32], [a, b], 64)
    assert found == [x | y << 32 for x, y in zip(a, b, strict=True)]
    wide = draw(64, rng)
    assert apply("mov.b64 {_, d}, a;", [64], [wide], 32) == [v >> 32 for v in wide]


def test_comparisons_and_choices():
    """`ne` is false where a NaN is, `neu` true."""
    nan, one, two = 0x7FC00000, to_bits(1.0), to_bits(2.0)
    a, b = [one, two, nan, one] * 64, [two, one, one, one] * 64
    expected = {
        "lt.f32": [1, 0, 0, 0], "gt.f32": [0, 1, 0, 0], "eq.f32": [0, 0, 0, 1],
        "ne.f32": [1, 1, 0, 0], "neu.f32": [1, 1, 1, 0], "ge.f32": [0, 1, 0, 1],
        "lt.u32": [1, 0, 0, 0], "ne.b32": [1, 1, 1, 0],
        # Those with a `u` are true where a NaN is.
        "ltu.f32": [1, 0, 1, 0], "leu.f32": [1, 0, 1, 1], "gtu.f32": [0, 1, 1, 0],
        "geu.f32": [0, 1, 1, 1], "num.f32": [1, 1, 0, 1], "nan.f32": [0, 0, 1, 0],
    }  # fmt: skip
    for name, wanted in expected.items():
        text = f"setp.{name} %p1, a, b; selp.b32 d, 1, 0, %p1;"
        assert apply(text, [32, 32], [a, b], 32) == wanted * 64, name


def test_what_is_not_known_is_an_error():
    with pytest.raises(PtxError, match=r"tested: not known: sin\.approx\.f32 %r1, %r2"):
        execute("sin.approx.f32 %r1, %r2;")
    with pytest.raises(PtxError, match="2 entries, allowed: one"):
        from emulator.parse import parse

        parse(".visible .entry a() .reqntid 32 { ret; } .visible .entry b() .reqntid 32 { ret; }")
