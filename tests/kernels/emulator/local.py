"""Memory of each thread's own (``.local``), where compilers put what registers cannot index."""

from __future__ import annotations

import numpy as np

from emulator.errors import KernelFault


class LocalMemory:
    """Of threads, at addresses that begin at 0 in each.

    Args:
        lanes: How many threads.
        size: Bytes of each.
    """

    def __init__(self, lanes: int, size: int) -> None:
        # What was never written is no number in any format.
        self._bytes = np.full((lanes, size), 0xFF, np.uint8)

    def load(self, lanes: np.ndarray, at: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        """``count`` neighbouring words of ``size`` bytes, from each thread's address.

        Raises:
            KernelFault: An address is outside, or not aligned.
        """
        words = self._words(at, size, count)
        taken = self._bytes[lanes[:, None], words]
        kind = np.dtype(f"u{size}")
        return [np.ascontiguousarray(one)[:, 0] for one in taken.view(kind).T[:, :, None]]

    def store(self, lanes: np.ndarray, at: np.ndarray, words: list[np.ndarray]) -> None:
        """Neighbouring words to each thread's address.

        Raises:
            KernelFault: An address is outside, or not aligned.
        """
        place = self._words(at, words[0].itemsize, len(words))
        self._bytes[lanes[:, None], place] = np.stack(words, axis=1).view(np.uint8)

    def _words(self, at: np.ndarray, size: int, count: int) -> np.ndarray:
        """Each byte that an access touches, ``[accesses, bytes]``."""
        at, length = at.astype(np.int64), size * count
        if (at % length).any():
            raise KernelFault(f"a local address is no multiple of {length}, the access's size")
        if (at < 0).any() or (at + length > self._bytes.shape[1]).any():
            raise KernelFault(
                f"a local address is outside: {int(at.min())} to {int(at.max()) + length} of"
                f" {self._bytes.shape[1]}"
            )
        return at[:, None] + np.arange(length)
