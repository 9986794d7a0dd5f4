"""The values of a weight, from the seed and its name alone."""

from __future__ import annotations

import hashlib
import math

import torch

from tests.checkpoint.formats import (
    FP8_BLOCK,
    MXFP4_GROUP,
    quantize_fp8_blocks,
    quantize_mxfp4,
)
from tests.checkpoint.layout import Weight
from tests.engine.drawing import distinct_experts, draw

# The magnitudes of blocks differ by powers of two with this standard deviation of their logarithm,
# so that a scale that is lost, or taken from another block, changes results.
SPREAD = 0.75

_PLAIN = {"bf16": torch.bfloat16, "f32": torch.float32}


def make(
    weight: Weight, experts: int, seed: int, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """The tensors of one weight, by name, on ``device``.

    CPU and CUDA draw other numbers from the same seed. The MTP layer's copies of the embedding and
    the head are copies.

    Args:
        experts: How many a routing table chooses from.
    """
    name = {"mtp.0.emb.tok_emb.weight": "embed.weight", "mtp.0.head.weight": "head.weight"}.get(
        weight.name, weight.name
    )
    generator = torch.Generator(device=device)
    generator.manual_seed(_seed(seed, name))
    if weight.kind is None:
        table = distinct_experts(*weight.shape, experts, generator, device)
        return {weight.name: table}
    drawn = draw(weight.kind, weight.shape, generator, device)
    if weight.format in _PLAIN:
        return {weight.name: drawn.to(_PLAIN[weight.format])}
    if weight.format == "fp8":
        values, scales = quantize_fp8_blocks(_spread(drawn, FP8_BLOCK, FP8_BLOCK, generator))
    else:
        values, scales = quantize_mxfp4(_spread(drawn, 1, MXFP4_GROUP, generator))
    return {weight.name: values, weight.scale_name: scales}


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


def _spread(
    drawn: torch.Tensor, rows: int, columns: int, generator: torch.Generator
) -> torch.Tensor:
    """Blocks of other magnitudes, and the same variance on the whole."""
    shape = (drawn.shape[0] // rows, drawn.shape[1] // columns)
    power = torch.randn(shape, generator=generator, device=drawn.device) * SPREAD
    # The mean of 4 ** power.
    variance = math.exp(2 * (SPREAD * math.log(2)) ** 2)
    factor = torch.exp2(power) / math.sqrt(variance)
    blocks = drawn.view(shape[0], rows, shape[1], columns)
    return (blocks * factor[:, None, :, None]).view(drawn.shape)
