"""Launch parameters of the decode kernels: static, by target and shape class, never tuned.

The tilings are those that compile without spills within 101,376 bytes of shared memory (see
``benchmarks/sparse_mla/decode-compile.md``); which of them a class takes was measured on an H200.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from vllm_sm12x.ops.integers import cdiv, next_power_of_2

TARGETS = ("sm_120", "sm_121", "sm_90")

HEADS = (8, 16, 32, 64, 128)

# Upper ends of the classes, both ends inclusive. A launch has 65,535 programs in a row of tokens.
TOKENS = {"one": 1, "few": 4, "some": 16, "many": 65_535}
_FEW = ("one", "few")
KEYS = {"window": 128, "short": 640, "long": 2_304, "longest": 16_384}

MOST_SPLITS = 64


@dataclass(frozen=True)
class Row:
    """Launch parameters of the split kernel.

    Attributes:
        block_h: Heads a program; 16 or more (a matrix instruction has 16 rows), also for 8 heads.
        block_n: Keys a tile; 16 in the Gluon kernel.
        num_warps: 8; in the Triton kernel each has one of the 8 chunks of 64 columns.
        num_stages: Of Triton's own pipeline; 1, because the kernel loads ahead itself.
        programs: Programs a multiprocessor that the number of splits aims at.
        maxnreg: Bound on the registers a thread; None for no bound.
        parts: Parts of the columns in the Gluon kernel; 0: the Triton kernel.
    """

    block_h: int
    block_n: int
    num_warps: int = 8
    num_stages: int = 1
    programs: int = 1
    maxnreg: int | None = None
    parts: int = 0


@dataclass(frozen=True)
class CombineRow:
    """Launch parameters of the combine kernel: most splits, and columns a program."""

    split_slots: int
    block_d: int
    num_warps: int


# The Triton kernel.
_TRITON_16 = Row(block_h=16, block_n=32)
_TRITON_32 = Row(block_h=32, block_n=32)

# The Gluon kernel. A program of 16 heads has little to read and to write, and four times as many
# of them share the keys of few tokens; one of 64 makes a key bfloat16 once for all heads, which
# pays where there are many keys to each: for a few tokens from some thousand keys on.
_GLUON_16 = Row(block_h=16, block_n=16, parts=4)
_GLUON_32 = Row(block_h=32, block_n=16, parts=4)
_GLUON_64 = Row(block_h=64, block_n=16, parts=4)


def _triton(heads: int, tokens: str) -> Row:
    return _TRITON_32 if heads >= 32 and tokens not in _FEW else _TRITON_16


def _few(heads: int, keys: str, tokens: str) -> Row:
    if keys == "longest" and heads >= 64:
        return _GLUON_32 if tokens == "one" else _GLUON_64
    if tokens == "few" and (keys == "longest" or (keys == "long" and heads >= 64)):
        return _GLUON_32
    return _GLUON_16


def _gluon(heads: int, keys: str, tokens: str) -> Row:
    if heads <= 16:
        return _GLUON_16
    if tokens in _FEW:
        return _few(heads, keys, tokens)
    if tokens == "some" and keys in ("window", "short"):
        return _GLUON_16 if (heads, keys) == (32, "short") else _GLUON_32
    return _GLUON_32 if heads == 32 else _GLUON_64


_SHAPES = tuple(itertools.product(HEADS, KEYS, TOKENS))

# Target (as `vllm_sm12x.lowering.target_key` names it) -> (heads, keys, tokens) -> row. Those of
# the Triton kernel stand beside, to compare with.
TABLE: dict[str, dict[tuple[int, str, str], Row]] = {
    **{target: {shape: _gluon(*shape) for shape in _SHAPES} for target in TARGETS},
    "triton": {shape: _triton(shape[0], shape[2]) for shape in _SHAPES},
}

# Splits, rounded up to a power of two -> row; the same for every target. One warp a program, which
# adds up without shared memory or barriers. Few splits come with many tokens, whose programs fill
# the GPU; with many splits more programs share the columns.
COMBINE = {
    **{slots: CombineRow(slots, block_d=128, num_warps=1) for slots in (2, 4, 8)},
    **{slots: CombineRow(slots, block_d=32, num_warps=1) for slots in (16, 32, 64)},
}


def row(tokens: int, heads: int, keys: int, target: str) -> Row:
    """The split kernel's row for a call.

    Args:
        tokens: ``T``.
        heads: ``H``.
        keys: ``W + E``, the widths of both index tensors together.
        target: A key of :data:`TABLE`.

    Raises:
        ValueError: The table has no row for the shape or the target.
    """
    if target not in TABLE:
        raise ValueError(f"target: {target!r}, allowed: {', '.join(TABLE)}")
    keys_class = _class_of("swa_indices, extra_indices", "keys", keys, KEYS)
    tokens_class = _class_of("q", "tokens", tokens, TOKENS)
    try:
        return TABLE[target][heads, keys_class, tokens_class]
    except KeyError:
        allowed = ", ".join(map(str, HEADS))
        raise ValueError(
            f"q: {heads} heads, allowed in the Triton decode kernel: {allowed}"
        ) from None


def splits(row: Row, tokens: int, heads: int, keys: int, multiprocessors: int) -> int:
    """Programs that share a token's keys: as many as fill the GPU, no more than there are tiles."""
    programs = tokens * cdiv(heads, row.block_h)
    wanted = multiprocessors * row.programs // programs
    return max(1, min(wanted, cdiv(keys, row.block_n), MOST_SPLITS))


def combine_row(splits: int) -> CombineRow:
    """The combine kernel's row for 2 to :data:`MOST_SPLITS` splits."""
    return COMBINE[next_power_of_2(splits)]


def _class_of(argument: str, what: str, size: int, classes: dict[str, int]) -> str:
    for name, most in classes.items():
        if size <= most:
            return name
    raise ValueError(
        f"{argument}: {size} {what}, allowed in the Triton decode kernel: up to"
        f" {max(classes.values())}"
    )
