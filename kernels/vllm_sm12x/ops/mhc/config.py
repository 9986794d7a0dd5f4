"""Launch parameters of the hyper-connection kernels: static, by target and number of tokens.

Nothing is tuned while serving. How the rows were chosen is in ``benchmarks/mhc/README.md``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MixConfig:
    """Launch parameters of the mix kernel.

    Attributes:
        block_t: Tokens a tile, a power of two of at least 16.
        block_h: Columns a step, of each stream; a power of two of at least 16.
        splits: Programs that share a tile's columns, a power of two; fewer where the hidden size
            has fewer steps.
        num_warps: Warps a block.
        num_stages: Of the pipeline of loads.
        halved: A kernel before this one makes bfloat16 numbers of the mapping, once a call.
    """

    block_t: int
    block_h: int
    splits: int
    num_warps: int
    num_stages: int
    halved: bool = False


@dataclass(frozen=True)
class FinishConfig:
    """Launch parameters of the finish kernel: tokens a program that makes mixes, and warps."""

    mix_t: int
    num_warps: int


@dataclass(frozen=True)
class PostConfig:
    """Launch parameters of the kernel of ``mhc_post`` alone: columns a program, and warps."""

    block_h: int
    num_warps: int


# Upper ends of the classes of tokens, inclusive; "chunk" takes every larger number.
TOKENS = {"16": 16, "64": 64, "512": 512}
CHUNK = "chunk"
TARGETS = ("sm_120", "sm_121", "sm_90")

_MIX = {
    # One step a program: what counts is how soon the bytes are there.
    "16": MixConfig(16, 32, 128, num_warps=4, num_stages=1),
    "64": MixConfig(32, 32, 128, num_warps=4, num_stages=1),
    # 16 tokens a warp: the compiler gives all warps to the tokens, and more would do work twice.
    "512": MixConfig(64, 32, 32, num_warps=4, num_stages=3, halved=True),
    CHUNK: MixConfig(64, 32, 8, num_warps=4, num_stages=3, halved=True),
}
# Every warp of a program that makes mixes goes through the whole iteration: 4 are one a scheduler.
_FINISH = {
    "16": FinishConfig(mix_t=1, num_warps=4),
    "64": FinishConfig(mix_t=1, num_warps=4),
    "512": FinishConfig(mix_t=8, num_warps=4),
    CHUNK: FinishConfig(mix_t=32, num_warps=4),
}

# Target (as `vllm_sm12x.lowering.target_key` names it) -> class of tokens -> configuration.
MIX_TABLE: dict[str, dict[str, MixConfig]] = {target: dict(_MIX) for target in TARGETS}
FINISH_TABLE: dict[str, dict[str, FinishConfig]] = {target: dict(_FINISH) for target in TARGETS}

# The same for every number of tokens.
POST_TABLE = {target: PostConfig(block_h=1024, num_warps=4) for target in TARGETS}


def configs(target: str, tokens: int) -> tuple[MixConfig, FinishConfig]:
    """The configurations of the two kernels for a target and a number of tokens.

    Raises:
        ValueError: The tables have no such target; the message says which there are.
    """
    if target not in TARGETS:
        raise ValueError(f"target: {target!r}, allowed: {', '.join(TARGETS)}")
    name = next((name for name, most in TOKENS.items() if tokens <= most), CHUNK)
    return MIX_TABLE[target][name], FINISH_TABLE[target][name]
