"""Launch parameters of the einsum kernel: a static table by target and number of tokens.

Nothing is tuned while serving, and nothing is keyed on the number of tokens but the class it falls
into. How the rows were chosen is in ``benchmarks/fp8_einsum/README.md``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EinsumConfig:
    """How one block of the einsum kernel works.

    Attributes:
        block_t: Tokens a tile, a power of two.
        block_n: Outputs a tile, a power of two of at most 128 (they share one scale a block of K).
        weights_first: The product is made as ``[outputs, tokens]``. A matrix instruction has 16 or
            64 rows and as few as 8 columns: with few tokens they are the columns.
        num_warps: Warps a block.
        num_stages: Steps of ``parts * 128`` inputs that are being copied or worked on; one fewer is
            held in shared memory where the matrix instruction reads registers (SM12x).
        maxnreg: Bound on the registers a thread; None for no bound.
        parts: Blocks of 128 inputs a step, a power of two. With 1 all warps work on one block. With
            more, each warp has blocks and a sum of its own, and the sums are added at the end; it
            takes ``weights_first``, and no more warps than parts.
        dependent: Launch programmatically dependent: a block asks for its first weights while the
            kernel ahead of it ends.
    """

    block_t: int
    block_n: int
    weights_first: bool
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    parts: int = 1
    dependent: bool = False

    def __post_init__(self) -> None:
        if self.parts > 1 and not (self.weights_first and self.num_warps <= self.parts):
            raise ValueError(
                f"{self}: with parts, allowed: weights_first and at most a warp a part"
            )


# Upper ends of the classes of tokens, inclusive; "chunk" takes every larger number.
TOKENS = {"8": 8, "16": 16, "32": 32, "64": 64, "256": 256}
CHUNK = "chunk"

_FEW = {
    # Bound by memory. A warp a part, and two steps of 512 or 1,024 inputs in flight.
    "8": EinsumConfig(8, 32, True, num_warps=8, num_stages=3, parts=8, dependent=True),
    "16": EinsumConfig(16, 32, True, num_warps=8, num_stages=3, parts=8, dependent=True),
    "32": EinsumConfig(32, 32, True, num_warps=4, num_stages=3, parts=4, dependent=True),
}

_SM12X = {
    **_FEW,
    "64": EinsumConfig(64, 64, weights_first=True, num_warps=4, num_stages=4),
    "256": EinsumConfig(64, 64, weights_first=True, num_warps=4, num_stages=4),
    # Three blocks a multiprocessor, so that others multiply while one scales.
    CHUNK: EinsumConfig(64, 64, weights_first=False, num_warps=4, num_stages=3, maxnreg=168),
}

_HOPPER = {
    # Not by warp groups: their instruction takes no batch.
    **_FEW,
    "64": EinsumConfig(64, 64, weights_first=True, num_warps=4, num_stages=5),
    "256": EinsumConfig(64, 128, weights_first=False, num_warps=4, num_stages=4),
    # Three blocks a multiprocessor.
    CHUNK: EinsumConfig(64, 128, weights_first=False, num_warps=4, num_stages=3, maxnreg=168),
}

# Target (as `vllm_sm12x.lowering.target_key` names it) -> class of tokens -> configuration.
TABLE: dict[str, dict[str, EinsumConfig]] = {
    "sm_120": _SM12X,
    "sm_121": _SM12X,
    "sm_90": _HOPPER,
}


def einsum_config(target: str, tokens: int) -> EinsumConfig:
    """The configuration for a target and a number of tokens.

    Raises:
        ValueError: The table has no such target; the message says which there are.
    """
    if target not in TABLE:
        raise ValueError(f"target: {target!r}, allowed: {', '.join(TABLE)}")
    fits = (name for name, most in TOKENS.items() if tokens <= most)
    return TABLE[target][next(fits, CHUNK)]
