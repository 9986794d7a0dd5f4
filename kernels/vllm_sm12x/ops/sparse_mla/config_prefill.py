"""Launch parameters of the prefill kernel: a static table by target and number of heads.

Nothing is tuned while serving. On SM12x a block has at most 101,376 bytes of shared memory and a
thread 255 registers; every row there compiles without spills inside both. How they were chosen is
in ``benchmarks/sparse_mla/prefill-compile.md``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrefillConfig:
    """How one block of the prefill kernel works.

    Attributes:
        block_h: Heads a block, a power of two of at least 16. Heads beyond the tensor's are masked.
        block_n: Keys a tile, a power of two of at least 16.
        keys_first: Scores are made as ``[keys, heads]`` instead of ``[heads, keys]``. Triton gives
            all warps of a block to the longer side. Heads split over the warps need no second copy
            of the queries, keys split over them no second read of the tile.
        num_warps: Warps a block.
        num_stages: 2: one tile in shared memory, the next is copied when the work on it is done. 3:
            two tiles, the copy runs beside the work. In the Gluon kernel: tiles in shared memory.
        parts: Parts of the columns in the Gluon kernel; 0: the Triton kernel.
    """

    block_h: int
    block_n: int
    keys_first: bool
    num_warps: int
    num_stages: int
    parts: int = 0


# The Triton kernel. Two blocks a multiprocessor (50,176 bytes each) hide each other's copies.
_TRITON_16 = PrefillConfig(16, 32, keys_first=False, num_warps=4, num_stages=2)
_TRITON_32 = PrefillConfig(32, 16, keys_first=True, num_warps=4, num_stages=2)
# One block a multiprocessor; 64 KiB of queries leave room for two tiles of 16 keys.
_TRITON_64 = PrefillConfig(64, 16, keys_first=True, num_warps=8, num_stages=3)

# The Gluon kernel: two blocks a multiprocessor, queries in registers.
_PAIR_32 = PrefillConfig(32, 16, keys_first=True, num_warps=4, num_stages=2, parts=4)

_SM12X = {8: _TRITON_16, 16: _TRITON_16, 32: _PAIR_32, 64: _PAIR_32, 128: _PAIR_32}

# Target (as `vllm_sm12x.lowering.target_key` names it) -> heads -> configuration. Those of
# the Triton kernel stand beside, to compare with.
PREFILL_TABLE: dict[str, dict[int, PrefillConfig]] = {
    "sm_120": _SM12X,
    "sm_121": _SM12X,
    # Not by warp groups, whose instruction takes 64 rows: Triton's code for them takes longer.
    "sm_90": _SM12X,
    "triton": {
        8: _TRITON_16,
        16: _TRITON_16,
        32: _TRITON_32,
        64: _TRITON_64,
        128: _TRITON_64,
    },
}


def prefill_config(target: str, heads: int) -> PrefillConfig:
    """The configuration for a target and a number of heads.

    Raises:
        ValueError: The table has no such entry; the message says which there are.
    """
    if target not in PREFILL_TABLE:
        raise ValueError(f"target: {target!r}, allowed: {', '.join(PREFILL_TABLE)}")
    rows = PREFILL_TABLE[target]
    if heads not in rows:
        allowed = ", ".join(map(str, rows))
        raise ValueError(
            f"q: {heads} heads, allowed in the Triton prefill kernel on {target}: {allowed}"
        )
    return rows[heads]
