"""Launch parameters of the compressor: static, by target and tokens of a window, never tuned.

What is known of the rows is in ``benchmarks/compressor``.
"""

from __future__ import annotations

from dataclasses import dataclass

# Threads with four channels each hold a row: a warp more would share it.
WARPS_A_ROW = 4


@dataclass(frozen=True)
class Row:
    """How one program, of one token, goes through a window.

    Attributes:
        step: Tokens that a thread loads at a time, all in its registers.
        groups: Parts of the block that go through tokens of their own; their results are put
            together at the end. A power of two.
    """

    step: int
    groups: int

    @property
    def num_warps(self) -> int:
        """Warps a block."""
        return WARPS_A_ROW * self.groups


_ROWS = {
    8: Row(step=8, groups=1),
    128: Row(step=16, groups=2),
}

# Target (as `vllm_sm12x.lowering.target_key` names it) -> tokens of a window -> row.
TABLE: dict[str, dict[int, Row]] = {target: dict(_ROWS) for target in ("sm_120", "sm_121", "sm_90")}


def row(window: int, target: str) -> Row:
    """The row for a call.

    Raises:
        ValueError: The table has no row for the window or the target.
    """
    if target not in TABLE:
        raise ValueError(f"target: {target!r}, allowed: {', '.join(TABLE)}")
    rows = TABLE[target]
    if window not in rows:
        allowed = ", ".join(map(str, rows))
        raise ValueError(
            f"compress_ratio: a window of {window} tokens, allowed in the Triton compressor:"
            f" {allowed}"
        )
    return rows[window]
