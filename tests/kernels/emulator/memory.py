"""Global memory and a block's shared memory, with what may not be done to them.

Global memory is that of the tensors that a launch was given, at their own addresses. Shared memory
is an array a block. Every access is checked: whether it lies inside, whether it is aligned to its
size, and in shared memory whether it was written, whether a copy to it is still under way, and
whether another warp may touch it at the same time.

That last check is by time, counted in barriers of the block. Two accesses to one byte by two warps,
of which one writes, are a race unless a barrier of the block lies between. Threads of a warp are
taken as in step. Two that write the same value are left alone: Triton lets threads that hold copies
of one element all store it.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterable

import numpy as np

from emulator.errors import KernelFault

# Where shared memory begins in its own address space, on GPUs that keep 1 KiB for the driver.
SHARED_BASE = 1024

# Buffers are read in words of up to 8 bytes. Rounded outward to this, none crosses a page.
_WORD = 16

# A stamp is a time and, in the low bits, a warp. A warp that is none means: several.
_TIME = np.uint32(64)
_SEVERAL = _TIME - np.uint32(1)
_NEVER, _UNDER_WAY = np.uint32(0), np.uint32(0xFFFFFFFF)

_WRITTEN_TWICE = (
    "a thread writes shared memory where another warp wrote something else since the last barrier"
)

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class GlobalMemory:
    """Memory of tensors, by address.

    Args:
        spans: First byte and the one past the last of each tensor; they may overlap.
    """

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        merged: list[list[int]] = []
        for first, end in sorted(span for span in spans if span[0] < span[1]):
            if merged and first < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([first, end])
        self._firsts = [first for first, _ in merged]
        self._spans = [_Span(first, end) for first, end in merged]

    def load(self, addresses: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        """``count`` neighbouring words of ``size`` bytes, from each address.

        Raises:
            KernelFault: An address is outside every tensor, or not aligned.
        """
        found = [np.empty(addresses.size, _UNSIGNED[size]) for _ in range(count)]
        for span, lanes in self._find(addresses, size * count):
            place = span.place(addresses[lanes], size)
            for index, words in enumerate(found):
                words[lanes] = span.words(size)[place + index]
        return found

    def store(self, addresses: np.ndarray, words: list[np.ndarray]) -> None:
        """Neighbouring words to each address.

        Raises:
            KernelFault: An address is outside every tensor, or not aligned, or two threads store
                different values to one.
        """
        size = words[0].itemsize
        for span, lanes in self._find(addresses, size * len(words)):
            place = span.place(addresses[lanes], size)
            for index, word in enumerate(words):
                memory = span.words(size)
                memory[place + index] = word[lanes]
                if not np.array_equal(memory[place + index], word[lanes]):
                    raise KernelFault("threads store different values to one address")

    def _find(self, addresses: np.ndarray, size: int):
        """Each span that is touched, with the positions of the addresses that touch it."""
        _aligned(addresses, size)
        lowest, highest = int(addresses.min()), int(addresses.max())
        at = bisect_right(self._firsts, lowest) - 1
        if at >= 0 and highest + size <= self._spans[at].end:
            yield self._spans[at], slice(None)
            return
        at = np.searchsorted(np.array(self._firsts, np.uint64), addresses, side="right") - 1
        ends = np.array([span.end for span in self._spans], np.uint64)
        outside = (at < 0) | (addresses + np.uint64(size) > ends[at])
        if outside.any():
            raise KernelFault(
                f"{int(outside.sum())} of {addresses.size} addresses are outside every tensor, the"
                f" first {int(addresses[outside][0]):#x}, for {size} bytes"
            )
        for index in np.unique(at):
            yield self._spans[index], np.flatnonzero(at == index)


class _Span:
    """Tensors' memory in one piece, as words."""

    def __init__(self, first: int, end: int) -> None:
        self.end = end
        self._base = first // _WORD * _WORD
        length = -(-(end - self._base) // _WORD) * _WORD
        memory = np.frombuffer((ctypes.c_uint8 * length).from_address(self._base), np.uint8)
        self._words = {size: memory.view(kind) for size, kind in _UNSIGNED.items()}

    def words(self, size: int) -> np.ndarray:
        return self._words[size]

    def place(self, addresses: np.ndarray, size: int) -> np.ndarray:
        return ((addresses - np.uint64(self._base)) >> np.uint64(_shift(size))).view(np.int64)


class SharedMemory:
    """Shared memory of the blocks that run together.

    Args:
        blocks: How many.
        size: Bytes of each.
        grain: A power of two. Every access is of a multiple of so many bytes, and at one.
        strict: Whether it is a fault to read what was never written, which is no number in any
            format, and to touch it in a race.
    """

    def __init__(self, blocks: int, size: int, grain: int, strict: bool = True) -> None:
        self._size = size
        self._stride = -(-size // _WORD) * _WORD
        self._grain_shift = _shift(grain)
        self._strict = strict
        # What was never written is no number in any format.
        memory = np.full(blocks * self._stride, 0xFF, np.uint8)
        self._words = {width: memory.view(kind) for width, kind in _UNSIGNED.items()}
        grains = blocks * self._stride // grain
        # Stamps of the last write, which may be under way, and of the last read.
        self._wrote = np.full(grains, _NEVER)
        self._read = np.full(grains, _NEVER)
        self._time = np.full(blocks, _TIME)

    def barrier(self, block: int) -> None:
        """What a block did until now is done before what it does from now on."""
        self._time[block] += _TIME

    def load(
        self, blocks: np.ndarray, warps: np.ndarray, addresses: np.ndarray, size: int, count: int
    ) -> list[np.ndarray]:
        """``count`` neighbouring words of ``size`` bytes, from each address of a thread.

        Raises:
            KernelFault: See the module.
        """
        place = self._place(blocks, addresses, size * count)
        self._check_load(self._grains(place, size * count), self._now(blocks, warps))
        index = place >> _shift(size)
        return [self._words[size][index + i] for i in range(count)]

    def store(
        self, blocks: np.ndarray, warps: np.ndarray, addresses: np.ndarray, words: list[np.ndarray]
    ) -> None:
        """Neighbouring words to each address of a thread.

        Raises:
            KernelFault: See the module.
        """
        size = words[0].itemsize
        place = self._place(blocks, addresses, size * len(words))
        grains, now = self._grains(place, size * len(words)), self._now(blocks, warps)
        again = self._check_store(grains, now)
        if again.any():
            index = place[again] >> _shift(size)
            if any((self._words[size][index + i] != w[again]).any() for i, w in enumerate(words)):
                raise KernelFault(_WRITTEN_TWICE)
        self._write(place, words, grains, now)

    def begin_copy(
        self, blocks: np.ndarray, warps: np.ndarray, addresses: np.ndarray, size: int
    ) -> np.ndarray:
        """A copy to each address begins; until it ends nobody may touch what it goes to.

        Returns:
            What :meth:`end_copy` takes as ``place``.

        Raises:
            KernelFault: See the module.
        """
        place = self._place(blocks, addresses, size)
        grains = self._grains(place, size)
        if self._check_store(grains, self._now(blocks, warps)).any():
            raise KernelFault(_WRITTEN_TWICE)
        self._wrote[grains] = _UNDER_WAY
        return place

    def end_copy(
        self, blocks: np.ndarray, warps: np.ndarray, place: np.ndarray, words: list[np.ndarray]
    ) -> None:
        """Copies have ended, for the threads that began them."""
        grains = self._grains(place, words[0].itemsize * len(words))
        self._write(place, words, grains, self._now(blocks, warps))

    def _write(self, place, words, grains, now) -> None:
        size = words[0].itemsize
        index = place >> _shift(size)
        memory = self._words[size]
        for i, word in enumerate(words):
            memory[index + i] = word
            if not np.array_equal(memory[index + i], word):
                raise KernelFault("threads store different values to one shared address")
        self._wrote[grains] = now

    def _place(self, blocks: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        """Index of the first byte of each access, in all blocks' memory."""
        _aligned(addresses, size)
        inside = addresses.astype(np.int64) - SHARED_BASE
        outside = (inside < 0) | (inside + size > self._size)
        if outside.any():
            raise KernelFault(
                f"{int(outside.sum())} of {addresses.size} shared addresses are outside, the first"
                f" {int(inside[outside][0])} for {size} bytes of {self._size}"
            )
        return blocks * self._stride + inside

    def _grains(self, place: np.ndarray, size: int) -> np.ndarray:
        """Of each access, ``[accesses, grains of one]``."""
        first, count = (place >> self._grain_shift)[:, None], size >> self._grain_shift
        return first if count == 1 else first + np.arange(count)

    def _now(self, blocks: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """The stamp of each access, ``[accesses, 1]``."""
        return (self._time[blocks] + warps.astype(np.uint32))[:, None]

    def _check_load(self, grains: np.ndarray, now: np.ndarray) -> None:
        wrote, read = self._wrote[grains], self._read[grains]
        if (wrote == _UNDER_WAY).any():
            raise KernelFault("a thread reads shared memory to which a copy is under way")
        if not self._strict:
            return
        if (wrote == _NEVER).any():
            raise KernelFault("a thread reads shared memory that was never written")
        if _by_another(wrote, now).any():
            raise KernelFault(
                "a thread reads shared memory that another warp wrote since the last barrier"
            )
        several = now | _SEVERAL
        stamp = np.where(_by_another(read, now), several, now)
        self._read[grains] = stamp
        # Of several warps that read a byte now, the last one stands there.
        differ = self._read[grains] != stamp
        if differ.any():
            self._read[grains[differ]] = np.broadcast_to(several, grains.shape)[differ]

    def _check_store(self, grains: np.ndarray, now: np.ndarray) -> np.ndarray:
        """Which accesses go where another warp has written since the last barrier."""
        wrote = self._wrote[grains]
        if (wrote == _UNDER_WAY).any():
            raise KernelFault("a thread writes shared memory to which a copy is under way")
        if not self._strict:
            return np.zeros(len(grains), bool)
        if _by_another(self._read[grains], now).any():
            raise KernelFault(
                "a thread writes shared memory that another warp read since the last barrier"
            )
        return _by_another(wrote, now).any(axis=1)


def _by_another(stamps: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Which stamps are of the same time as ``now``, and of another warp."""
    # They differ in the low bits and in no other. What is equal wraps around.
    return (stamps ^ now) - np.uint32(1) < _SEVERAL


def _shift(size: int) -> int:
    """By how many bits to shift, in place of a division by a power of two."""
    return size.bit_length() - 1


def _aligned(addresses: np.ndarray, size: int) -> None:
    if (addresses & np.array(size - 1, addresses.dtype)).any():
        raise KernelFault(f"an address is no multiple of {size}, the size of the access")
