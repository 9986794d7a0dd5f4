"""What other compilers than Triton's use of PTX, and other kernels than ours."""

from __future__ import annotations

import pytest
import torch
from emulator.errors import KernelFault, PtxError
from emulator.library import Library
from emulator.parse import parse
from ptx_text import execute

KEEP = """
mad.lo.s64 %rd1, %rd99, 4, %rd90;
st.global.b32 [%rd1], %r1;
"""


def kept(body: str, threads: int = 64, **options) -> list[int]:
    """``%r1`` of each thread."""
    out = torch.full((threads,), -1, dtype=torch.int32)
    execute(body + KEEP, out, threads=threads, **options)
    return out.tolist()


def test_memory_of_a_threads_own():
    text = """
    .local .align 16 .b8 depot[32];
    .local .align 16 .b8 other[16];
    mov.u64 %rd2, depot;
    mul.lo.s32 %r2, %r99, 3;
    mul.lo.s32 %r3, %r99, 5;
    mul.lo.s32 %r4, %r99, 7;
    st.local.v2.u32 [%rd2+8], {%r2, %r3};
    mov.u64 %rd3, other;
    st.local.u32 [%rd3+4], %r4;
    and.b32 %r5, %r99, 1;
    mul.wide.u32 %rd4, %r5, 4;
    add.s64 %rd5, %rd2, %rd4;
    """
    either = "ld.local.u32 %r1, [%rd5+8];"
    assert kept(text + either) == [t * (5 if t % 2 else 3) for t in range(64)]
    assert kept(text + "ld.local.u32 %r1, [other+4];") == [7 * t for t in range(64)]
    # The upper half of the number, alone.
    short = "ld.local.u16 %rs1, [%rd2+10]; cvt.u32.u16 %r1, %rs1;"
    assert kept(text + short) == [3 * t >> 16 for t in range(64)]
    # What was never written is no number.
    assert kept(text + "ld.local.u32 %r1, [%rd2];") == [-1] * 64
    for wrong, message in (
        ("ld.local.u32 %r1, [%rd2+48];", "outside: 48 to 52 of 48"),
        ("ld.local.u32 %r1, [%rd2+10];", "no multiple of 4"),
        ("st.local.u64 [%rd2+-8], %rd1;", "outside: -8 to 0 of 48"),
    ):
        with pytest.raises(KernelFault, match=message):
            kept(text + wrong)


def test_shared_memory_by_name_lies_before_what_a_launch_adds():
    text = """
    .shared .align 4 .b8 first[4];
    .shared .align 16 .b8 second[16];
    mov.u32 %r2, first;
    mov.u32 %r3, second;
    mov.u32 %r4, memory;
    sub.s32 %r5, %r3, %r2;
    sub.s32 %r6, %r4, %r2;
    shl.b32 %r7, %r6, 8;
    or.b32 %r1, %r5, %r7;
    """
    assert set(kept(text, shared_bytes=64)) == {16 | 1024 << 8}
    write = "st.shared.b32 [second+12], 5; bar.sync 0; ld.shared.b32 %r1, [second+12];"
    assert set(kept(text + write, threads=32, shared_bytes=64)) == {5}


MODULE = """
.shared .align 4 .u32 count;
.shared .align 16 .b8 mine[32];
.shared .align 8 .b8 nobodys[512];
.extern .shared .align 16 .b8 one_name[];
.extern .shared .align 16 .b8 another[];
.entry silent() { mov.u32 %r1, mine; mov.u32 %r2, count; ret; }
"""


def test_arrays_before_the_kernels_are_those_that_a_kernel_names():
    kernel = parse(MODULE, "silent", 32)
    assert kernel.arrays == {"count": ("shared", 0), "mine": ("shared", 16)}
    assert kernel.array_bytes == {"shared": 48, "local": 0}
    # Names of what a launch adds, all of them for the same memory.
    assert kernel.shared_symbols == ("one_name", "another")


@pytest.mark.parametrize(
    ("operation", "start", "end"),
    [
        ("add.u32", 3, 3 + sum(range(64))),
        ("add.s32", -3, -3 + sum(range(64))),
        ("min.s32", 7, 0),
        ("min.u32", -1, 0),
        ("max.s32", -5, 63),
        ("max.u32", -5, -5),
        ("or.b32", 64, 127),
        ("and.b32", -1, 0),
    ],
)
def test_atomics(operation, start, end):
    """Each thread sees what was there before it; together they see all that ever was."""
    for given in (f"atom.global.{operation} %r1, [%rd91], %r99;", None):
        memory = torch.tensor([start], dtype=torch.int32)
        out = torch.full((64,), -1, dtype=torch.int32)
        silent = f"red.relaxed.gpu.global.{operation} [%rd91], %r99; mov.b32 %r1, 0;"
        execute((given or silent) + KEEP, out, memory, threads=64)
        assert memory.item() == end
        if given:
            assert out[0] == start and (given != "add.u32" or out.unique().numel() == 64)


def test_exchange_and_compare():
    out, memory = torch.full((64,), -1, dtype=torch.int32), torch.tensor([-7], dtype=torch.int32)
    execute("atom.global.exch.b32 %r1, [%rd91], %r99;" + KEEP, out, memory, threads=64)
    # Each is found by the next; the last one stays.
    assert sorted([*out.tolist(), memory.item()]) == [-7, *range(64)]
    memory.fill_(0)
    text = "add.s32 %r2, %r99, 1; atom.global.cas.b32 %r1, [%rd91], %r99, %r2;" + KEEP
    execute(text, out, memory, threads=64)
    # Thread by thread the number that is expected is there.
    assert memory.item() == 64 and out.tolist() == list(range(64))
    execute("atom.global.cas.b32 %r1, [%rd91], 5, 6;" + KEEP, out, memory, threads=64)
    assert memory.item() == 64 and set(out.tolist()) == {64}


def test_atomics_of_some_threads_and_of_shared_memory():
    body = """
    st.shared.b32 [memory], 0;
    bar.sync 0;
    setp.lt.u32 %p1, %r99, 10;
    @%p1 atom.shared.add.u32 %r2, [memory], 1;
    bar.sync 0;
    ld.shared.b32 %r1, [memory];
    """
    assert set(kept(body, threads=32, shared_bytes=16)) == {10}
    with pytest.raises(PtxError, match="not known: atom.global.xor.b32"):
        kept("atom.global.xor.b32 %r1, [%rd90], %r99;")


def test_a_shuffle_says_whether_it_had_a_partner():
    body = """
    shfl.sync.up.b32 %r2|%p1, %r99, 3, 0, -1;
    selp.b32 %r1, %r2, -5, %p1;
    """
    assert kept(body, threads=32) == [-5] * 3 + list(range(29))


def test_barriers_of_some_warps():
    """Two warps of four come to each of two barriers, at different times."""
    body = """
    .shared .align 16 .b8 place[512];
    shl.b32 %r2, %r99, 2;
    mov.u32 %r3, place;
    add.s32 %r4, %r3, %r2;
    shr.u32 %r5, %r99, 6;
    add.s32 %r6, %r5, 1;
    setp.ge.u32 %p1, %r99, 96;
    mov.u32 %r9, 40;
    $SPIN:
    @!%p1 bra $READY;
    sub.s32 %r9, %r9, 1;
    setp.gt.s32 %p1, %r9, 0;
    bra $SPIN;
    $READY:
    st.shared.b32 [%r4], %r99;
    bar.sync %r6, 64;
    xor.b32 %r7, %r2, 252;
    add.s32 %r8, %r3, %r7;
    ld.shared.b32 %r1, [%r8];
    """
    expected = [t ^ 63 for t in range(128)]
    assert kept(body, threads=128, strict=False) == expected
    # Alone, a barrier of all that two warps come to is never left by them.
    with pytest.raises(KernelFault, match="wait at a barrier that others never reach"):
        kept(body.replace("bar.sync %r6, 64", "bar.sync %r6, 96"), threads=128, strict=False)


@pytest.mark.parametrize(
    ("operation", "some", "every", "none"),
    [("or.pred", 1, 1, 0), ("and.pred", 0, 1, 0), ("popc.u32", 9, 64, 0)],
)
def test_votes_of_a_block(operation, some, every, none):
    """Each block for itself, also where its warps come at different times."""
    result = "%r1" if "u32" in operation else "%p2"
    body = f"""
    setp.lt.u32 %p1, %r99, LIMIT;
    setp.lt.u32 %p3, %r99, 32;
    setp.lt.u32 %p3, %r99, 32;
    @%p3 bra $READY;
    mov.b32 %r5, 0;
    $READY:
    bar.red.{operation} {result}, 0, %p1;
    """
    if "u32" not in operation:
        body += "selp.b32 %r1, 1, 0, %p2;"
    for limit, wanted in ((9, some), (64, every), (0, none)):
        assert kept(body.replace("LIMIT", str(limit))) == [wanted] * 64
    # One block of two says yes.
    blocks = f"""
    mov.u32 %r7, %ctaid.x;
    setp.eq.s32 %p1, %r7, 1;
    bar.red.{operation} {result}, 0, %p1;
    {"" if "u32" in operation else "selp.b32 %r1, 1, 0, %p2;"}
    mad.lo.s64 %rd2, %rd99, 4, %rd90;
    mul.wide.u32 %rd3, %r7, 256;
    add.s64 %rd4, %rd2, %rd3;
    st.global.b32 [%rd4], %r1;
    """
    out = torch.full((128,), -1, dtype=torch.int32)
    execute(blocks, out, threads=64, grid=(2, 1, 1))
    assert out.tolist() == [none] * 64 + [every] * 64


def test_threads_in_two_dimensions():
    body = """
    mov.u32 %r2, %tid.x;
    mov.u32 %r3, %tid.y;
    mov.u32 %r4, %ntid.x;
    mov.u32 %r5, %ntid.y;
    mov.u32 %r6, %tid.z;
    mad.lo.s32 %r7, %r3, 100, %r2;
    mad.lo.s32 %r8, %r4, 10000, %r7;
    mad.lo.s32 %r9, %r5, 1000000, %r8;
    add.s32 %r1, %r9, %r6;
    mad.lo.s32 %r10, %r3, %r4, %r2;
    mul.wide.u32 %rd2, %r10, 4;
    add.s64 %rd1, %rd2, %rd90;
    st.global.b32 [%rd1], %r1;
    """
    out = torch.full((64,), -1, dtype=torch.int32)
    execute(body, out, threads=64, width=16)
    assert out.tolist() == [
        4 * 1000000 + 16 * 10000 + y * 100 + x for y in range(4) for x in range(16)
    ]


def test_shuffles_of_a_part_of_a_warp():
    """Each half names its own threads; a partner must be among them."""
    text = """
    setp.lt.u32 %p1, %r99, 16;
    selp.b32 %r2, 0xFFFF, 0xFFFF0000, %p1;
    shfl.sync.bfly.b32 %r1, %r99, DISTANCE, 31, %r2;
    """
    assert kept(text.replace("DISTANCE", "8"), threads=32) == [t ^ 8 for t in range(32)]
    message = "shuffles with one that it does not name, or without itself"
    with pytest.raises(KernelFault, match=message):
        kept(text.replace("DISTANCE", "16"), threads=32)
    with pytest.raises(KernelFault, match=message):
        kept("shfl.sync.idx.b32 %r1, %r99, 0, 31, 0xFFFF;", threads=32)


def test_a_shuffle_from_further_on():
    """In halves; one that has nobody keeps its own."""
    text = "shfl.sync.down.b32 %r2|%p1, %r99, 5, 4127, -1; selp.b32 %r3, 100, 0, %p1;"
    text += "add.s32 %r1, %r2, %r3;"
    expected = [100 + t + 5 if t % 16 < 11 else t for t in range(32)]
    assert kept(text, threads=32) == expected


def test_blocks_that_wait_for_each_other():
    """Each adds to what the one after it has left, so that the last one must go first."""
    body = """
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %nctaid.x;
    sub.s32 %r4, %r3, 1;
    sub.s32 %r5, %r4, %r2;
    $AGAIN:
    ld.global.acquire.gpu.b32 %r6, [%rd91];
    setp.ne.s32 %p1, %r6, %r5;
    @%p1 bra $AGAIN;
    bar.sync 0;
    ld.global.b32 %r7, [%rd92];
    bar.sync 0;
    mad.lo.s32 %r8, %r7, 3, %r2;
    setp.eq.s32 %p2, %r99, 0;
    @%p2 st.global.b32 [%rd92], %r8;
    fence.acq_rel.gpu;
    @%p2 red.relaxed.gpu.global.add.s32 [%rd91], 1;
    mov.b32 %r1, 0;
    """
    out, lock, value = (torch.zeros(n, dtype=torch.int32) for n in (64, 1, 1))
    execute(body + KEEP, out, lock, value, threads=64, grid=(6, 1, 1))
    expected = 0
    for block in reversed(range(6)):
        expected = 3 * expected + block
    assert (lock.item(), value.item()) == (6, expected)


def test_what_is_loaded_and_not_used_may_be_anything():
    """Of memory that was never written, and in a race; a number that is used is no number."""
    body = "ld.shared.b32 %r1, [memory]; bar.sync 0; st.shared.b32 [memory], 1;"
    assert set(kept(body, shared_bytes=16, strict=False)) == {-1}
    with pytest.raises(KernelFault, match="never written"):
        kept(body, shared_bytes=16)


def test_every_copy_has_landed_after_a_wait_for_all():
    body = """
    shl.b32 %r2, %r99, 2;
    mov.u32 %r3, memory;
    add.s32 %r4, %r3, %r2;
    mad.lo.s64 %rd2, %rd99, 4, %rd91;
    cp.async.ca.shared.global [%r4], [%rd2], 4;
    WAIT
    ld.shared.b32 %r1, [%r4];
    """
    out, source = torch.zeros(32, dtype=torch.int32), torch.arange(32, dtype=torch.int32)
    text = body.replace("WAIT", "cp.async.wait_all;") + KEEP
    execute(text, out, source, threads=32, shared_bytes=128)
    assert out.equal(source)
    # A wait for groups leaves a copy that is of none.
    text = body.replace("WAIT", "cp.async.wait_group 0;") + KEEP
    with pytest.raises(KernelFault, match="a copy is under way"):
        execute(text, out, source, threads=32, shared_bytes=128)


TWO = """
.visible .entry first() .maxntid 64 { ret; }
.weak .entry second(.param .u32 second_param_0) { mov.u32 %tid.x, %tid.x; ret; }
"""


def test_an_entry_by_its_name():
    assert parse(TWO, "first").threads == 64
    assert parse(TWO, "first", 32).threads == 32
    kernel = parse(TWO, "second", 96)
    assert (kernel.threads, kernel.parameters) == (96, ["u32"])
    with pytest.raises(PtxError, match="second: no number of threads"):
        parse(TWO, "second")
    with pytest.raises(PtxError, match="0 entries third, allowed: one"):
        parse(TWO, "third", 32)


def test_a_library_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: no library .*nothing.so"):
        Library(tmp_path / "nothing.so")


def test_a_library_of_many_kernels():
    import marlin

    library = marlin._library("_moe_C.abi3.so")
    with pytest.raises(LookupError, match=r"symbol: \d\d+ entries contain Marlin, allowed: one"):
        library.program("Marlin", 256)
    with pytest.raises(LookupError, match="symbol: 0 entries contain nothing, allowed: one"):
        library.program("nothing", 256)
