"""What accesses take of memory, by hand, and in a kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulator.traffic import sectors, wavefronts
from ptx_text import execute

LANE = np.arange(32)
ALL = np.ones((1, 32), bool)


@pytest.mark.parametrize(
    ("addresses", "size", "expected"),
    [
        (4 * LANE, 4, (1, 1)),
        (8 * LANE, 8, (2, 2)),
        (16 * LANE, 16, (4, 4)),
        # One word for all is given once.
        (0 * LANE, 4, (1, 1)),
        # Every second word: two threads a bank. The words would fit into one wavefront.
        (8 * LANE, 4, (2, 1)),
        # A column of a matrix with rows of 128 bytes, and the same with a word between the rows.
        (128 * LANE, 4, (32, 1)),
        (132 * LANE, 4, (1, 1)),
        # Bytes of one word do not conflict.
        (LANE, 1, (1, 1)),
        # Rows of 32 bytes, of which each thread takes 16: half of the banks.
        (32 * LANE, 16, (8, 4)),
        # Eight rows of 16 bytes a quarter of the warp, 144 bytes apart: every bank once.
        (144 * LANE, 16, (4, 4)),
    ],
)
def test_wavefronts(addresses, size, expected):
    assert wavefronts(addresses[None, :], ALL, size) == expected
    twice = np.stack([addresses, addresses + 4096])
    assert wavefronts(twice, np.ones((2, 32), bool), size) == tuple(2 * n for n in expected)


def test_threads_that_are_switched_off_take_nothing():
    on = (LANE < 4)[None, :]
    assert wavefronts(128 * LANE[None, :], on, 4) == (4, 1)
    assert wavefronts(128 * LANE[None, :], on & False, 4) == (0, 0)
    assert sectors(128 * LANE[None, :], on, 4) == (4, 1)
    assert sectors(128 * LANE[None, :], on & False, 4) == (0, 0)


@pytest.mark.parametrize(
    ("addresses", "size", "expected"),
    [
        (4 * LANE, 4, (4, 4)),
        # Four bytes off, they reach into a fifth sector.
        (4 * LANE + 4, 4, (5, 4)),
        (16 * LANE, 16, (16, 16)),
        (0 * LANE, 4, (1, 1)),
        (64 * LANE, 4, (32, 4)),
    ],
)
def test_sectors(addresses, size, expected):
    assert sectors(addresses[None, :], ALL, size) == expected


def test_a_kernel():
    """A thread stores its 4 bytes 128 bytes after its neighbour's, then loads 16 in a row."""
    out = torch.zeros(32 * 4, dtype=torch.int32)
    text = """
    shl.b32 %r1, %r99, 7;
    mov.b32 %r2, memory;
    add.s32 %r3, %r2, %r1;
    st.shared.b32 [%r3], %r99;
    st.shared.b32 [%r3+4], %r99;
    st.shared.b32 [%r3+8], %r99;
    st.shared.b32 [%r3+12], %r99;
    ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3];
    mad.lo.s64 %rd1, %rd99, 16, %rd90;
    st.global.v4.b32 [ %rd1 + 0 ], { %r4, %r5, %r6, %r7 };
    """
    counts = execute(text, out, shared_bytes=4096, traffic=True)
    found = {key[2]: (t.taken, t.least) for key, t in counts.traffic.items()}
    assert found == {
        "st.shared.b32": (4 * 32, 4),
        # A quarter of the warp has eight rows of 128 bytes: the same four banks.
        "ld.shared.v4.b32": (32, 4),
        "st.global.v4.b32": (16, 16),
    }
    assert execute(text, out, shared_bytes=4096).traffic == {}
