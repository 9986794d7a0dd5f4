"""Launch parameters of the MXFP4 experts: a static table by target and rows an expert.

Nothing is tuned while serving. On SM12x a block has at most 101,376 bytes of shared memory and a
thread 255 registers; every row there compiles without spills inside both. How they were chosen is
in ``benchmarks/mxfp4_experts/README.md``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """How one block of a product works.

    Attributes:
        block_n: Weight rows a block. A warp takes 16 of them at least.
        block_k: Columns a step, a multiple of 32.
        num_warps: Warps a block.
        num_stages: Stages of the software pipeline.
        maxnreg: Most registers a thread, or None.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class Row:
    """How a call works.

    Attributes:
        block_m: Pairs a tile, a power of two of at least 8.
        most_pairs: Power of two. Not 0: programs find their tile among so many pairs, and there is
            no routing before.
        first: The product with gate and up.
        second: The product with the activation.
        dependent: Launch the second product and the sum so that each starts before the kernel
            before it ends, and waits for that end itself.
        lines: How many lines of 128 bytes of each weight row the second product asks for before
            it waits: 0 or a power of two.
        halves: bfloat16 activations come to the products in halves, the values of even index before
            those of odd index. That takes a kernel more.
    """

    block_m: int
    most_pairs: int
    first: Product
    second: Product
    dependent: bool = False
    lines: int = 0
    halves: bool = False


@dataclass(frozen=True)
class Sum:
    """How the weighted sum works.

    Attributes:
        block: Columns a block, a power of two.
        num_warps: Warps a block.
    """

    block: int
    num_warps: int


# Where programs find their tiles themselves: up to 42 tokens of 6 experts.
MOST_PAIRS = 256

# The most rows that an expert has on average, and the kind of tile for them.
_KINDS = ((8, "16"), (24, "32"), (float("inf"), "64"))

# An expert seldom gets more than 8 of so few. Two blocks a multiprocessor of SM12x.
_FEW = Row(8, MOST_PAIRS, Product(64, 256, 4, 4), Product(64, 256, 4, 4))
_16 = Row(16, 0, Product(64, 256, 4, 3), Product(64, 256, 4, 3))
_32 = Row(32, 0, Product(128, 128, 4, 3), Product(128, 128, 4, 3))
# With 168 registers, three blocks a multiprocessor, it is an eighth faster on an H200, but spills.
_64 = Row(64, 0, Product(128, 64, 4, 3), Product(128, 64, 4, 3), halves=True)
_ROWS = {"few": _FEW, "16": _16, "32": _32, "64": _64}

_FLOAT8_ROWS = {
    "16": Row(16, 0, Product(128, 128, 4, 4), Product(128, 128, 4, 4)),
    "32": Row(32, 0, Product(128, 128, 4, 4), Product(128, 128, 4, 4)),
    "64": Row(64, 0, Product(128, 128, 4, 3), Product(128, 128, 4, 3)),
}

# Target (as `vllm_sm12x.lowering.target_key` names it) -> kind -> configuration.
TABLE: dict[str, dict[str, Row]] = {"sm_120": _ROWS, "sm_121": _ROWS, "sm_90": _ROWS}

# The same for e4m3 activations, whose steps have 128 columns.
FLOAT8_TABLE: dict[str, dict[str, Row]] = {
    "sm_120": _FLOAT8_ROWS,
    "sm_121": _FLOAT8_ROWS,
    "sm_90": _FLOAT8_ROWS,
}

# The weighted sum, by target.
_SUM = Sum(1024, 4)
SUM: dict[str, Sum] = {"sm_120": _SUM, "sm_121": _SUM, "sm_90": _SUM}


def row(target: str, pairs: int, experts: int, float8: bool = False) -> Row:
    """The configuration for a number of pairs of a token and an expert.

    Args:
        float8: Whether e4m3 activations are asked for. Up to ``MOST_PAIRS`` pairs take bfloat16
            all the same: they are bound by the weights' bytes.

    Raises:
        ValueError: The table has no such target; the message says which there are.
    """
    if target not in TABLE:
        raise ValueError(f"target: {target!r}, allowed: {', '.join(TABLE)}")
    if pairs <= MOST_PAIRS:
        return TABLE[target]["few"]
    kind = next(name for most, name in _KINDS if pairs <= most * experts)
    return (FLOAT8_TABLE if float8 else TABLE)[target][kind]
