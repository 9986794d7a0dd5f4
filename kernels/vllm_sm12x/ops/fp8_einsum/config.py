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
        num_stages: Tiles of 128 inputs that are being copied or worked on; one fewer is held in
            shared memory where the matrix instruction reads registers (SM12x).
        maxnreg: Bound on the registers a thread; None for no bound.
    """

    block_t: int
    block_n: int
    weights_first: bool
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


# Upper ends of the classes of tokens, inclusive; "chunk" takes every larger number.
TOKENS = {"8": 8, "16": 16, "32": 32, "64": 64, "256": 256}
CHUNK = "chunk"

_SM12X = {
    # 8 KiB or less of weights a tile, many of them in flight: bound by memory.
    "8": EinsumConfig(8, 32, weights_first=True, num_warps=2, num_stages=6),
    "16": EinsumConfig(16, 32, weights_first=True, num_warps=2, num_stages=6),
    "32": EinsumConfig(32, 32, weights_first=True, num_warps=2, num_stages=5),
    "64": EinsumConfig(64, 64, weights_first=True, num_warps=4, num_stages=4),
    "256": EinsumConfig(64, 64, weights_first=True, num_warps=4, num_stages=4),
    # Two blocks a multiprocessor, so that one scales while the other multiplies.
    CHUNK: EinsumConfig(64, 128, weights_first=False, num_warps=4, num_stages=3),
}

_HOPPER = {
    # A warp-group instruction takes 64 rows of weights, and Triton gives it 16 columns or more.
    "8": EinsumConfig(16, 64, weights_first=True, num_warps=4, num_stages=6),
    "16": EinsumConfig(16, 64, weights_first=True, num_warps=4, num_stages=6),
    "32": EinsumConfig(32, 64, weights_first=True, num_warps=4, num_stages=6),
    "64": EinsumConfig(64, 64, weights_first=True, num_warps=4, num_stages=5),
    "256": EinsumConfig(64, 128, weights_first=False, num_warps=4, num_stages=4),
    CHUNK: EinsumConfig(64, 128, weights_first=False, num_warps=4, num_stages=4),
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
