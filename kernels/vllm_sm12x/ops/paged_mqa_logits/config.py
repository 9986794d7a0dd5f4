"""Launch parameters of the decode logits: static, by target, heads and rows, never tuned.

On SM12x a block has at most 101,376 bytes of shared memory and a thread 255 registers; every row
there compiles without spills inside both. What is known of them: ``benchmarks/paged_mqa_logits``.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sm12x.ops.integers import cdiv

HEADS = (32, 64)

# Upper ends of the classes of rows (query tokens of a call), both ends inclusive.
ROWS = {"few": 4, "many": 2**31 - 1}


@dataclass(frozen=True)
class Row:
    """How one program of the kernel works.

    Attributes:
        pages: Pages of 64 keys in a tile, 1 or 2.
        num_warps: Warps a block; two for each page, so that a warp has all heads of its 32 keys and
            sums over them without another warp's help. Hopper's own instructions take four warps.
        num_stages: Of the software pipeline. Half of them go to the page numbers, which the keys
            wait for: with 5, two tiles of keys are in shared memory or on the way there.
        programs: Programs a multiprocessor that the number of splits aims at; no more than fit.
        maxnreg: Bound on the registers a thread; None for no bound.
    """

    pages: int
    num_warps: int
    num_stages: int
    programs: int
    maxnreg: int | None = None


# Two blocks fit: 43 KiB of shared memory each.
_SM12X = Row(pages=2, num_warps=4, num_stages=5, programs=2)
_HOPPER = Row(pages=2, num_warps=4, num_stages=5, programs=3)


def _all_shapes(row: Row) -> dict[tuple[int, str], Row]:
    return {(heads, rows): row for heads in HEADS for rows in ROWS}


# Target (as `vllm_sm12x.lowering.target_key` names it) -> (heads, rows) -> row.
TABLE: dict[str, dict[tuple[int, str], Row]] = {
    "sm_120": _all_shapes(_SM12X),
    "sm_121": _all_shapes(_SM12X),
    "sm_90": _all_shapes(_HOPPER),
}


def row(rows: int, heads: int, target: str) -> Row:
    """The row for a call.

    Args:
        rows: Query tokens, ``B * next_n``.
        heads: Number of heads.
        target: A key of :data:`TABLE`.

    Raises:
        ValueError: The table has no row for the number of heads or the target.
    """
    if target not in TABLE:
        raise ValueError(f"target: {target!r}, allowed: {', '.join(TABLE)}")
    if heads not in HEADS:
        allowed = ", ".join(map(str, HEADS))
        raise ValueError(f"q: {heads} heads, allowed in the Triton paged logits kernel: {allowed}")
    rows_class = next(name for name, most in ROWS.items() if rows <= most)
    return TABLE[target][heads, rows_class]


def splits(row: Row, rows: int, tiles: int, multiprocessors: int) -> int:
    """Programs that share the keys of a query token.

    As many as are at work at a time, so that all end together where lengths are equal. With so many
    query tokens that this would be few, twice as many: lengths differ, and the long ones would be
    waited for.

    Args:
        row: What :func:`row` gave.
        rows: Query tokens.
        tiles: Most tiles of keys that a query token can have.
        multiprocessors: Of the GPU.
    """
    room = multiprocessors * row.programs
    wanted = room // rows if 8 * rows <= room else cdiv(2 * room, rows)
    return max(1, min(wanted, tiles))
