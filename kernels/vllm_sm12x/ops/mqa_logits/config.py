"""Launch parameters of the prefill logits: static, by target and number of heads, never tuned.

On SM12x a block has at most 101,376 bytes of shared memory and a thread 255 registers; every row
there compiles without spills inside both. What is known of them: ``benchmarks/mqa_logits``.
"""

from __future__ import annotations

from dataclasses import dataclass

# Most tokens that one program goes through; their ranges of keys are looked at together.
MOST_TOKENS = 256
_LEAST_TOKENS = 16

# Programs a multiprocessor that a call is cut into, so that the last ones leave few of them idle.
_PROGRAMS = 16


@dataclass(frozen=True)
class Row:
    """How one program of the kernel works.

    Attributes:
        block_n: Keys, 32 for each warp, so that a warp has all heads of its keys and sums over
            them without another warp's help. On Hopper 16 of each 64 keys go to a warp.
        block_q: Tokens that are scored at a time.
        num_warps: Warps a block.
        num_stages: Tiles of queries in shared memory, and one more for Hopper's own instructions.
        maxnreg: Bound on the registers a thread; None for no bound.
    """

    block_n: int
    block_q: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


_SM12X = {
    32: Row(block_n=128, block_q=1, num_warps=4, num_stages=3),
    64: Row(block_n=128, block_q=1, num_warps=4, num_stages=3),
}

# Target (as `vllm_sm12x.lowering.target_key` names it) -> heads -> row.
TABLE: dict[str, dict[int, Row]] = {
    "sm_120": _SM12X,
    "sm_121": _SM12X,
    "sm_90": {
        32: Row(block_n=128, block_q=2, num_warps=4, num_stages=3),
        64: Row(block_n=128, block_q=1, num_warps=4, num_stages=3),
    },
}


def row(heads: int, target: str) -> Row:
    """The row for a call.

    Raises:
        ValueError: The table has no row for the number of heads or the target.
    """
    if target not in TABLE:
        raise ValueError(f"target: {target!r}, allowed: {', '.join(TABLE)}")
    rows = TABLE[target]
    if heads not in rows:
        allowed = ", ".join(map(str, rows))
        raise ValueError(f"q: {heads} heads, allowed in the Triton logits kernel: {allowed}")
    return rows[heads]


def tokens_per_program(tokens: int, key_tiles: int, multiprocessors: int) -> int:
    """Tokens that a program goes through: few where there are few keys to fill the GPU with."""
    wanted = tokens * key_tiles // (multiprocessors * _PROGRAMS)
    return max(_LEAST_TOKENS, min(MOST_TOKENS, wanted))
