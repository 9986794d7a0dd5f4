"""What a GPU forbids or leaves to chance is found; the same kernel without the fault runs."""

from __future__ import annotations

import pytest
import torch
from emulator.errors import KernelFault
from ptx_text import execute

# A thread stores its number where it has its place in shared memory.
STORE = """
shl.b32 %r1, %r99, 2;
mov.b32 %r2, memory;
add.s32 %r3, %r2, %r1;
st.shared.b32 [%r3], %r99;
"""
# The place of the thread that stands as far from the end as this one from the beginning.
OTHER = """
xor.b32 %r4, %r1, 252;
add.s32 %r5, %r2, %r4;
"""
LOAD = "ld.shared.b32 %r6, [%r5];"
BARRIER = "bar.sync 0;"
KEEP = """
mad.lo.s64 %rd1, %rd99, 4, %rd90;
st.global.b32 [ %rd1 + 0 ], { %r6 };
"""


def shared(*lines: str, threads: int = 64, tensors=None, shared_bytes: int = 256) -> torch.Tensor:
    out = torch.full((threads,), -1, dtype=torch.int32)
    tensors = (out,) if tensors is None else (*tensors, out)
    execute("\n".join(lines), *tensors, threads=threads, shared_bytes=shared_bytes)
    return out


def test_a_missing_barrier_before_a_read():
    assert shared(STORE, OTHER, BARRIER, LOAD, KEEP).tolist() == [63 - t for t in range(64)]
    with pytest.raises(KernelFault, match="reads .* another warp wrote since the last barrier"):
        shared(STORE, OTHER, LOAD, KEEP)


def test_a_missing_barrier_before_a_write():
    again = "st.shared.b32 [%r3], %r6;"
    shared(STORE, OTHER, BARRIER, LOAD, BARRIER, again, KEEP)
    with pytest.raises(KernelFault, match="writes .* another warp read since the last barrier"):
        shared(STORE, OTHER, BARRIER, LOAD, again, KEEP)


def test_several_readers_of_one_address():
    """Also those that are not the last to read it."""
    read = "ld.shared.b32 %r6, [memory];"
    write = "setp.lt.u32 %p1, %r99, 32; @!%p1 bra $END; st.shared.b32 [memory], %r99; $END:"
    one_warp = write.replace("%r99; $END", "1; $END")
    shared(STORE, BARRIER, read, BARRIER, one_warp, KEEP)
    for writer in (one_warp, one_warp.replace("lt", "ge")):
        with pytest.raises(KernelFault, match="another warp read"):
            shared(STORE, BARRIER, read, writer, KEEP)


def test_two_warps_write_one_address():
    """The same value is let pass, another is not."""
    same = "st.shared.b32 [memory], 7;"
    assert shared(same, BARRIER, "ld.shared.b32 %r6, [memory];", KEEP).tolist() == [7] * 64
    with pytest.raises(KernelFault, match="different values to one shared address"):
        shared("st.shared.b32 [memory], %r99;")
    text = """
    setp.lt.u32 %p1, %r99, 32;
    @%p1 bra $LOWER;
    st.shared.b32 [memory], 1;
    bra $END;
    $LOWER:
    st.shared.b32 [memory], 2;
    $END:
    """
    with pytest.raises(KernelFault, match="another warp wrote something else"):
        shared(text)


def test_memory_that_was_never_written():
    with pytest.raises(KernelFault, match="never written: ld.shared.b32 %r6"):
        shared("ld.shared.b32 %r6, [memory+64];")


@pytest.mark.parametrize("offset", [256, 253])
def test_shared_addresses_outside(offset):
    with pytest.raises(KernelFault, match="outside|no multiple of 4"):
        shared(f"st.shared.b32 [memory+{offset}], %r99;", threads=32)


def test_global_addresses_outside():
    values = torch.arange(32, dtype=torch.int32)
    text = "mad.lo.s64 %rd1, %rd99, 4, %rd90;\nld.global.b32 {{ %r6 }}, [ %rd1 + {offset} ];"
    keep = KEEP.replace("%rd90", "%rd91")
    for view in (values, values[:31], values[1:]):
        run = dict(threads=32, tensors=(view,))
        if view.numel() == 32:
            assert shared(text.format(offset=0), keep, **run).tolist() == [*range(32)]
        else:
            with pytest.raises(KernelFault, match=r"1 of 32 addresses are outside every tensor"):
                shared(text.format(offset=0), keep, **run)
    with pytest.raises(KernelFault, match="no multiple of 4"):
        shared(text.format(offset=2), threads=32, tensors=(values,))


def test_a_thread_that_is_switched_off_may_point_anywhere():
    text = """
    setp.lt.s32 %p1, %r99, 4;
    mov.b32 %r6, 9;
    mad.lo.s64 %rd1, %rd99, 4096, %rd90;
    @%p1 ld.global.b32 { %r6 }, [ %rd1 + 0 ];
    """ + KEEP.replace("%rd90", "%rd91")
    values = torch.arange(4 * 1024, dtype=torch.int32)
    found = shared(text, threads=32, tensors=(values,))
    assert found.tolist() == [0, 1024, 2048, 3072, *[9] * 28]


def test_threads_that_store_different_values_to_one_address():
    with pytest.raises(KernelFault, match="different values to one address"):
        shared("st.global.b32 [ %rd90 + 0 ], { %r99 };")


COPY = """
shl.b32 %r1, %r99, 4;
mov.b32 %r2, memory;
add.s32 %r3, %r2, %r1;
mad.lo.s64 %rd2, %rd99, 16, %rd90;
cp.async.cg.shared.global [ %r3 + 0 ], [ %rd2 + 0 ], 0x10{size};
cp.async.commit_group;
"""
WAIT = "cp.async.wait_group 0;"
READ_OWN = "ld.shared.b32 %r6, [%r3];"
READ_OTHER = "xor.b32 %r4, %r1, 1008; add.s32 %r5, %r2, %r4; ld.shared.b32 %r6, [%r5];"
KEEP_COPIED = KEEP.replace("%rd90", "%rd91")


def copied(*lines: str, size: str = "") -> list[int]:
    values = torch.arange(256, dtype=torch.int32)
    text = (COPY.format(size=size), *lines, KEEP_COPIED)
    return shared(*text, tensors=(values,), shared_bytes=1024).tolist()


def test_a_copy_that_nobody_waited_for():
    assert copied(WAIT, READ_OWN) == [4 * t for t in range(64)]
    with pytest.raises(KernelFault, match="reads .* copy is under way"):
        copied(READ_OWN)
    with pytest.raises(KernelFault, match="reads .* copy is under way"):
        # One group may still be open, and there is one.
        copied("cp.async.wait_group 1;", READ_OWN)
    with pytest.raises(KernelFault, match="writes .* copy is under way"):
        copied("st.shared.b32 [%r3], 1;")


def test_a_wait_is_for_the_thread_alone():
    assert copied(WAIT, BARRIER, READ_OTHER) == [4 * (63 - t) for t in range(64)]
    with pytest.raises(KernelFault, match="another warp wrote"):
        copied(WAIT, READ_OTHER)


def test_a_copy_into_what_another_warp_still_reads():
    again = COPY.format(size="")
    copied(WAIT, BARRIER, READ_OTHER, BARRIER, again)
    with pytest.raises(KernelFault, match="writes .* another warp read"):
        copied(WAIT, BARRIER, READ_OTHER, again)


def test_a_copy_of_fewer_bytes_fills_with_zeros():
    """And reads nothing where it is of none."""
    text = "setp.lt.s32 %p1, %r99, 8; selp.b32 %r20, 16, 0, %p1;"
    values = torch.arange(8 * 4, dtype=torch.int32)
    lines = (text, COPY.format(size=", %r20"), WAIT, READ_OWN, KEEP_COPIED)
    found = shared(*lines, tensors=(values,), shared_bytes=1024).tolist()
    assert found == [4 * t if t < 8 else 0 for t in range(64)]


def test_groups_end_in_order():
    """With one group left open, the first is there and the second is not."""
    second = COPY.format(size="").replace("%r1;", "%r1; add.s32 %r3, %r3, 1024;")
    lines = (COPY.format(size=""), second, "cp.async.wait_group 1;")
    values = torch.arange(256, dtype=torch.int32)
    read_first = "add.s32 %r5, %r2, %r1; ld.shared.b32 %r6, [%r5];"
    run = dict(tensors=(values,), shared_bytes=2048)
    found = shared(*lines, read_first, KEEP_COPIED, **run)
    assert found.tolist() == [4 * t for t in range(64)]
    with pytest.raises(KernelFault, match="copy is under way"):
        shared(*lines, READ_OWN, KEEP_COPIED, **run)


def test_a_barrier_that_some_never_reach():
    text = """
    setp.lt.u32 %p1, %r99, 32;
    $AGAIN:
    @%p1 bra $LOWER;
    bar.sync 0;
    bra $END;
    $LOWER:
    bar.sync 0;
    bar.sync 0;
    $END:
    """
    shared(text.replace("bar.sync 0;\n    bar.sync 0;", "bar.sync 0;"))
    # Those that have returned are not waited for, so that this ends as well.
    shared(text)


def test_races_are_told_by_barriers_of_all():
    with pytest.raises(KernelFault, match="a barrier that is not all of the block's"):
        shared("bar.sync 1, 32;")


def test_an_endless_loop(monkeypatch):
    monkeypatch.setattr("emulator.machine._STEPS", 100)
    with pytest.raises(KernelFault, match="has not ended after 100 steps"):
        shared("$AGAIN:\nbra $AGAIN;")


def test_threads_part_and_meet():
    """Each goes round as often as its number says."""
    text = """
    mov.b32 %r6, 0;
    mov.b32 %r7, %r99;
    $AGAIN:
    setp.eq.s32 %p1, %r7, 0;
    @%p1 bra $END;
    add.s32 %r6, %r6, 3;
    sub.s32 %r7, %r7, 1;
    bra $AGAIN;
    $END:
    """
    assert shared(text, KEEP).tolist() == [3 * t for t in range(64)]


def test_a_parameter_read_by_some_threads_is_the_others_no_more():
    """The blocks of a grid run side by side, and part where the code asks which they are."""
    first, second = (torch.full((2,), -1, dtype=torch.int32) for _ in range(2))
    text = """
    mov.u32 %r1, %ctaid.x;
    ld.param.b64 %rd1, [tested_param_0];
    setp.eq.s32 %p1, %r1, 0;
    @%p1 bra $SAME;
    ld.param.b64 %rd1, [tested_param_1];
    $SAME:
    mad.wide.s32 %rd2, %r1, 4, %rd1;
    st.global.b32 [ %rd2 + 0 ], { %r1 };
    """
    execute(text, first, second, grid=(2, 1, 1))
    assert (first.tolist(), second.tolist()) == ([0, -1], [-1, 1])


def test_blocks_know_which_they_are():
    out = torch.full((2 * 3 * 4,), -1, dtype=torch.int32)
    text = """
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ctaid.y;
    mov.u32 %r3, %ctaid.z;
    mad.lo.s32 %r4, %r3, 3, %r2;
    mad.lo.s32 %r4, %r4, 2, %r1;
    mul.lo.s32 %r6, %r4, 10;
    mad.wide.s32 %rd1, %r4, 4, %rd90;
    st.global.b32 [ %rd1 + 0 ], { %r6 };
    """
    execute(text, out, grid=(2, 3, 4))
    assert out.tolist() == [10 * i for i in range(24)]


def test_the_message_says_where():
    with pytest.raises(KernelFault, match=r"^tested, no place: .*: ld\.global\.b32 \{ %r6 \}"):
        shared("ld.global.b32 { %r6 }, [ %rd90 + 4096 ];")
