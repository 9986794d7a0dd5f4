"""Copies from global to shared memory that are under way (``cp.async``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from emulator.machine import Machine, Mask


class Copies:
    """Of some blocks that run together.

    What is copied lands where a thread waits for the group it is in, and not before.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._groups = np.zeros(machine.lanes, np.int64)
        self._open: list[tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]] = []

    def begin(self, lanes: np.ndarray, place: np.ndarray, words: list[np.ndarray]) -> None:
        """Lanes copy words to a place that :meth:`SharedMemory.begin_copy` gave."""
        self._open.append((lanes, self._groups[lanes], place, words))

    def commit(self, on: Mask) -> None:
        """A lane's copies since it did so last become a group."""
        self._groups[self._machine.selected(on)] += 1

    def wait(self, on: Mask, allowed: int) -> None:
        """A lane's groups land, but for the last ``allowed`` ones."""
        machine, still = self._machine, []
        here = np.ones(machine.lanes, bool) if on is None else on
        for lanes, groups, place, words in self._open:
            done = here[lanes] & (groups < self._groups[lanes] - allowed)
            if done.any():
                ended = lanes[done]
                machine.shared.end_copy(
                    machine.block[ended], machine.warp[ended], place[done], [w[done] for w in words]
                )
            if not done.all():
                rest = ~done
                still.append((lanes[rest], groups[rest], place[rest], [w[rest] for w in words]))
        self._open = still
