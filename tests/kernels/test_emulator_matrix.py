"""Matrix instructions and exchanges between threads, by the tables of the PTX ISA."""

from __future__ import annotations

import pytest
import torch
from emulator.errors import KernelFault, PtxError
from ptx_text import execute

WARP = 32


def fragment(matrix: torch.Tensor, place) -> torch.Tensor:
    """``[threads, elements]``: of each thread, the elements at ``place(thread, element)``."""
    return torch.stack(
        [
            torch.stack([matrix[place(thread, element)] for element in range(place.elements)])
            for thread in range(WARP)
        ]
    )


def at(elements):
    """Says how many elements a thread holds of what a function places."""

    def mark(function):
        function.elements = elements
        return function

    return mark


# mma.m16n8k16 with 16-bit operands. A: a0 a1 | a2 a3 | a4 a5 | a6 a7 in four registers.
@at(8)
def a16(thread, i):
    row = thread // 4 + (8 if i in (2, 3, 6, 7) else 0)
    return row, thread % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


@at(4)
def b16(thread, i):
    return thread % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), thread // 4


# mma.m16n8k32 with 8-bit operands: 16 elements of A, 8 of B.
@at(16)
def a8(thread, i):
    row = thread // 4 + (8 if 4 <= i < 8 or i >= 12 else 0)
    return row, thread % 4 * 4 + (i & 3) + (16 if i >= 8 else 0)


@at(8)
def b8(thread, i):
    return thread % 4 * 4 + (i & 3) + (16 if i >= 4 else 0), thread // 4


@at(4)
def c(thread, i):
    return thread // 4 + (8 if i >= 2 else 0), thread % 4 * 2 + (i & 1)


def load(names: str, tensor: int, registers: int) -> str:
    """Each thread loads its registers, which lie one behind the other."""
    numbers = [f"%r{names}{i}" for i in range(registers)]
    lines = [f"mad.lo.s64 %rd80, %rd99, {4 * registers}, %rd{90 + tensor};"]
    for i, number in enumerate(numbers):
        lines.append(f"ld.global.b32 {{ {number} }}, [ %rd80 + {4 * i} ];")
    return "\n".join(lines)


MULTIPLY = """
{a}
{b}
{c}
mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{ %r40, %r41, %r42, %r43 }},
    {{ %r10, %r11, %r12, %r13 }}, {{ %r20, %r21 }}, {{ %r30, %r31, %r32, %r33 }};
mad.lo.s64 %rd81, %rd99, 16, %rd93;
st.global.v4.b32 [ %rd81 + 0 ], {{ %r40, %r41, %r42, %r43 }};
"""


@pytest.mark.parametrize(
    ("shape", "kind", "dtype", "depth", "places"),
    [
        ("m16n8k16", "bf16", torch.bfloat16, 16, (a16, b16)),
        ("m16n8k32", "e4m3", torch.float8_e4m3fn, 32, (a8, b8)),
    ],
)
def test_mma(shape, kind, dtype, depth, places):
    """Two warps, each with matrices of its own."""
    rng = torch.Generator().manual_seed(depth)
    warps = []
    for _ in range(2):
        a, b = (torch.randn(*s, generator=rng).to(dtype) for s in ((16, depth), (depth, 8)))
        start = torch.randn(16, 8, generator=rng)
        warps.append((a, b, start))
    bits = torch.int16 if dtype is torch.bfloat16 else torch.uint8
    operands = [
        torch.cat([fragment(w[n].view(bits), place) for w in warps]).contiguous()
        for n, place in enumerate(places)
    ]
    start = torch.cat([fragment(w[2], c) for w in warps]).contiguous()
    out = torch.full((2 * WARP, 4), torch.nan)
    text = MULTIPLY.format(
        a=load("1", 0, 4), b=load("2", 1, 2), c=load("3", 2, 4), shape=shape, kind=kind
    )
    execute(text, *operands, start, out, threads=2 * WARP)
    for number, (a, b, begin) in enumerate(warps):
        expected = a.to(torch.float64) @ b.to(torch.float64) + begin
        found = out[WARP * number : WARP * number + WARP]
        assert torch.equal(found, fragment(expected.to(torch.float32), c))


def test_mma_of_another_kind_is_an_error():
    text = MULTIPLY.format(a="", b="", c="", shape="m16n8k8", kind="tf32")
    with pytest.raises(PtxError, match="not known: mma.*tf32"):
        execute(text)


MATRICES = """
shl.b32 %r1, %r99, 4;
mov.b32 %r2, memory;
add.s32 %r3, %r2, %r1;
mad.lo.s64 %rd1, %rd99, 16, %rd90;
ld.global.v4.b32 {{ %r4, %r5, %r6, %r7 }}, [ %rd1 + 0 ];
{before}
{access}
{after}
mad.lo.s64 %rd2, %rd99, 16, %rd91;
st.global.v4.b32 [ %rd2 + 0 ], {{ %r10, %r11, %r12, %r13 }};
"""


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("direction", ["ld", "st"])
def test_four_matrices(direction, transposed):
    """A thread holds two neighbours of row ``thread // 4``, or of a column where transposed."""
    matrices = torch.randperm(4 * 64).to(torch.int16).reshape(4, 8, 8)
    held = torch.empty(WARP, 4, 2, dtype=torch.int16)
    for thread in range(WARP):
        for number in range(4):
            for i in range(2):
                row, column = thread // 4, thread % 4 * 2 + i
                place = (column, row) if transposed else (row, column)
                held[thread, number, i] = matrices[(number, *place)]
    rows, held = matrices.reshape(WARP, 8).contiguous(), held.reshape(WARP, 8).contiguous()
    name = "m8n8.x4" + (".trans" if transposed else "") + ".shared.b16"
    if direction == "ld":
        given, expected = rows, held
        text = MATRICES.format(
            before="st.shared.v4.b32 [%r3], {%r4, %r5, %r6, %r7};\nbar.sync 0;",
            access=f"ldmatrix.sync.aligned.{name} {{%r10, %r11, %r12, %r13}}, [%r3];",
            after="",
        )
    else:
        given, expected = held, rows
        text = MATRICES.format(
            before="",
            access=f"stmatrix.sync.aligned.{name} [%r3], {{%r4, %r5, %r6, %r7}};",
            after="bar.sync 0;\nld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r3];",
        )
    out = torch.zeros(WARP, 8, dtype=torch.int16)
    execute(text, given, out, shared_bytes=512)
    assert torch.equal(out, expected)


def test_a_part_of_a_warp_is_a_fault():
    text = """
    setp.lt.s32 %p1, %r99, 16;
    @%p1 bra $LOWER;
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [memory];
    $LOWER:
    """
    with pytest.raises(KernelFault, match="only some threads of a warp are here: ldmatrix"):
        execute(text, shared_bytes=512)


@pytest.mark.parametrize(
    ("mode", "operand", "bounds", "expected"),
    [
        ("bfly", 4, 31, lambda t: t ^ 4),
        ("up", 3, 0, lambda t: t - 3 if t >= 3 else t),
        ("idx", 7, 31, lambda t: 7),
        # Segments of 8: the upper bits of a thread's number stay.
        ("idx", 7, 0x181F, lambda t: t & 24 | 7),
        # A thread of the last place in the own segment or before it is read, else the own value.
        ("bfly", 9, 0x181F, lambda t: t ^ 9 if t ^ 9 <= t & 24 | 7 else t),
    ],
)
def test_shuffles(mode, operand, bounds, expected):
    out = torch.zeros(64, dtype=torch.int32)
    text = f"""
    add.s32 %r1, %r99, 1000;
    shfl.sync.{mode}.b32 %r2, %r1, {operand}, {bounds}, -1;
    mad.lo.s64 %rd1, %rd99, 4, %rd90;
    st.global.b32 [ %rd1 + 0 ], {{ %r2 }};
    """
    execute(text, out, threads=64)
    assert out.tolist() == [1000 + t // 32 * 32 + expected(t % 32) for t in range(64)]


@pytest.mark.parametrize(("name", "function"), [("add", sum), ("max", max), ("min", min)])
def test_redux(name, function):
    values = torch.randint(-(2**20), 2**20, (64,), dtype=torch.int32)
    out = torch.zeros(64, dtype=torch.int32)
    text = f"""
    mad.lo.s64 %rd1, %rd99, 4, %rd90;
    ld.global.b32 {{ %r1 }}, [ %rd1 + 0 ];
    redux.sync.{name}.s32 %r2, %r1, -1;
    mad.lo.s64 %rd2, %rd99, 4, %rd91;
    st.global.b32 [ %rd2 + 0 ], {{ %r2 }};
    """
    execute(text, values, out, threads=64)
    assert out.tolist() == [
        function(values[start : start + 32].tolist()) for start in (0, 32) for _ in range(32)
    ]
