"""What an SM12x multiprocessor holds, and how many blocks of a kernel fit into it at a time."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sm12x.lowering import SHARED_MEMORY_LIMIT

# Source: the compute-capability tables of CUDA's programming guide, and its cuda_occupancy.h.
WARPS = 48
BLOCKS = 24
REGISTERS = 65_536
SHARED_MEMORY = 102_400

_THREADS_PER_WARP = 32
# A multiprocessor has four parts, each with a quarter of the registers and warps of its own.
_PARTS = 4
_REGISTER_UNIT = 256
_SHARED_MEMORY_UNIT = 128
# What the driver takes of every block.
_SHARED_MEMORY_RESERVED = 1024


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps of one kernel on a multiprocessor at a time, and what allows no more.

    ``limit`` names every limit that is reached: registers, shared memory, warps, blocks.
    """

    blocks: int
    warps: int
    limit: str

    @property
    def share(self) -> float:
        """Part of the 48 warps."""
        return self.warps / WARPS


def occupancy(registers: int, num_warps: int, shared_bytes: int) -> Occupancy:
    """How many blocks run on one SM12x multiprocessor at a time; none where a block does not fit.

    Args:
        registers: A thread, as the assembler reports them.
        num_warps: A block.
        shared_bytes: A block, without what the driver reserves.

    Raises:
        ValueError: ``registers`` or ``num_warps`` is not positive, or ``shared_bytes`` negative.
    """
    for name, value, least in (
        ("registers", registers, 1),
        ("num_warps", num_warps, 1),
        ("shared_bytes", shared_bytes, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: {value}, allowed: from {least} on")
    registers_per_warp = _round_up(registers * _THREADS_PER_WARP, _REGISTER_UNIT)
    warps_per_part = REGISTERS // _PARTS // registers_per_warp
    shared = _round_up(shared_bytes + _SHARED_MEMORY_RESERVED, _SHARED_MEMORY_UNIT)
    limits = {
        "registers": _PARTS * warps_per_part // num_warps,
        "shared memory": SHARED_MEMORY // shared if shared_bytes <= SHARED_MEMORY_LIMIT else 0,
        "warps": WARPS // num_warps,
        "blocks": BLOCKS,
    }
    blocks = min(limits.values())
    reached = ", ".join(name for name, most in limits.items() if most == blocks)
    return Occupancy(blocks, blocks * num_warps, reached)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
