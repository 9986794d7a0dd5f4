"""How much memory moves: what an access of a warp takes, beside the least that its bytes need.

As NVIDIA's programming guides describe it. Shared memory has 32 banks of 4 bytes and serves them
all once a cycle, which is a wavefront; an access of 8 bytes a thread goes by halves of the warp,
one of 16 bytes by quarters. Global memory moves in sectors of 32 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from emulator.matrix import WARP
from emulator.parse import Address, Instruction, Register, Vector

if TYPE_CHECKING:
    from emulator.machine import Machine, Mask

_BANKS = 32
_WORD = 4
_SECTOR = 32


@dataclass
class Traffic:
    """Of accesses of one sort: what they take, and the least that as many bytes would take."""

    taken: int = 0
    least: int = 0

    def add(self, taken: int, least: int) -> None:
        """Count more of them."""
        self.taken += taken
        self.least += least


def observe(
    machine: Machine, instruction: Instruction, on: Mask
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Memory (``"shared"``, ``"global"``) and what an instruction takes of it, and the least."""
    opcode = instruction.opcode
    if opcode.startswith(("cp.async.cg", "cp.async.ca")):
        target, source, size, *given = instruction.operands
        reads = on
        if given:
            some = machine.read_all(given[0], np.uint32) > 0
            reads = some if on is None else on & some
        yield "shared", wavefronts(*_rows(machine, target, on), size.value)
        yield "global", sectors(*_rows(machine, source, reads), size.value)
    elif opcode.startswith(("ldmatrix", "stmatrix")):
        address, vector = _address_and_vector(instruction)
        addresses, there = _rows(machine, address, on)
        gives = np.arange(WARP) < 8 * len(vector.parts)
        yield "shared", wavefronts(addresses, there & gives, 16)
    elif opcode.startswith(("ld.shared", "st.shared", "ld.global", "st.global")):
        address, vector = _address_and_vector(instruction)
        size = int(opcode.rpartition(".")[2][1:]) // 8 * len(vector.parts)
        count = wavefronts if ".shared" in opcode else sectors
        yield opcode.split(".")[1], count(*_rows(machine, address, on), size)


def _address_and_vector(instruction: Instruction) -> tuple[Address, Vector]:
    first, second = instruction.operands
    address, other = (first, second) if isinstance(first, Address) else (second, first)
    return address, other if isinstance(other, Vector) else Vector((other,))


def _rows(machine: Machine, address: Address, on: Mask) -> tuple[np.ndarray, np.ndarray]:
    """The address of each thread, and whether it executes, a row a warp."""
    wide = isinstance(address.base, Register) and address.base.kind == "b64"
    base = machine.read_all(address.base, np.uint64 if wide else np.uint32)
    on = np.ones(machine.lanes, bool) if on is None else on
    return (base.astype(np.int64) + address.offset).reshape(-1, WARP), on.reshape(-1, WARP)


def wavefronts(addresses: np.ndarray, on: np.ndarray, size: int) -> tuple[int, int]:
    """Wavefronts of shared memory that warps take, and the least.

    Args:
        addresses: ``[warps, 32]``, in bytes.
        on: Which threads execute, ``[warps, 32]``.
        size: Bytes a thread, a power of two up to 16.
    """
    together = WARP // max(1, size // 8 * 2)
    words = max(1, size // _WORD)
    place = (addresses.astype(np.int64) // _WORD)[:, :, None] + np.arange(words)
    place = np.where(on[:, :, None], place, -1).reshape(-1, together * words)
    taken = _distinct_a_bank(place)
    least = -(-_distinct(place.reshape(addresses.shape[0], -1)) // _BANKS)
    return int(taken.sum()), int(least.sum())


def sectors(addresses: np.ndarray, on: np.ndarray, size: int) -> tuple[int, int]:
    """Sectors of global memory that warps touch, and the least that hold their bytes.

    Args:
        addresses: ``[warps, 32]``, in bytes.
        on: Which threads execute, ``[warps, 32]``.
        size: Bytes a thread, a power of two up to 16.
    """
    place = np.where(on, addresses.astype(np.int64), -1)
    sector = np.where(place < 0, -1, place // _SECTOR)
    bytes_used = _distinct(np.where(place < 0, -1, place // size)) * size
    return int(_distinct(sector).sum()), int((-(-bytes_used // _SECTOR)).sum())


def _first_of_each(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in order, and where a number of 0 or more stands for the first time."""
    ordered = np.sort(rows, axis=1)
    first = np.ones(ordered.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return ordered, first & (ordered >= 0)


def _distinct(rows: np.ndarray) -> np.ndarray:
    return _first_of_each(rows)[1].sum(axis=1)


def _distinct_a_bank(rows: np.ndarray) -> np.ndarray:
    """Of each row, the most distinct words that one bank must give."""
    ordered, first = _first_of_each(rows)
    row, column = np.nonzero(first)
    bank = ordered[row, column] % _BANKS
    return (
        np.bincount(row * _BANKS + bank, minlength=len(rows) * _BANKS)
        .reshape(-1, _BANKS)
        .max(axis=1)
    )
