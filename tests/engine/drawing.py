"""How large each kind of weight is drawn, so that activations stay near one and text varies.

Every linear keeps the variance of its input. Both the weights that are made in memory for
``run_engine.py`` and the checkpoints of ``tests/checkpoint`` are drawn by this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

# Standard deviation of the logits: greedy text that does not hang on rounding.
LOGIT_STD = 4.0

# What a checkpoint has beyond the weights in memory, so that each part of attention shows in the
# answers: with keys of unit length, random attention spreads over all keys alike, and a lost key,
# sink or position changes less than rounding does. The softmax's logits get this standard
# deviation, the sinks are as heavy as the keys together, and the output is brought back to one.
KEY_GAIN = 2.5
_SINK_MEAN = 5.0

Kind = Literal[
    "linear",
    "norm",
    "embedding",
    "head",
    "sink",
    "hc_scale",
    "hc_base",
    "router_bias",
    "position_bias",
    "key_norm",
    "attention_output",
    "heavy_sink",
    "heavy_hc_base",
    "heavy_position_bias",
]


_STD = {
    "embedding": 1.0,
    "sink": 1.0,
    "hc_base": 0.5,
    "heavy_hc_base": 1.5,
    "router_bias": 0.02,
    "position_bias": 0.1,
    "heavy_position_bias": 1.0,
}


def draw(
    kind: Kind, shape: Sequence[int], generator: torch.Generator, device: torch.device | str
) -> torch.Tensor:
    """A float32 tensor of ``shape`` on ``device``; a linear sums over its last dimension."""

    def normal(std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device) * std + mean

    fan_in = shape[-1]
    if kind == "linear":
        return normal(1 / math.sqrt(fan_in))
    if kind == "attention_output":
        return normal(1 / (KEY_GAIN * math.sqrt(fan_in)))
    if kind == "key_norm":
        return normal(0.1 * KEY_GAIN, mean=KEY_GAIN)
    if kind == "heavy_sink":
        return normal(1.5, mean=_SINK_MEAN)
    if kind == "head":
        return normal(LOGIT_STD / math.sqrt(fan_in))
    if kind == "norm":
        return normal(0.1, mean=1.0)
    if kind == "hc_scale":
        return torch.ones(*shape, device=device)
    return normal(_STD[kind])


def distinct_experts(
    tokens: int,
    top_k: int,
    experts: int,
    generator: torch.Generator,
    device: torch.device | str,
) -> torch.Tensor:
    """A routing table, int64 ``[tokens, top_k]``: distinct experts for each token id.

    Raises:
        ValueError: ``experts`` is no power of two, or fewer than ``top_k``.
    """
    if experts & (experts - 1) or not 0 < top_k <= experts:
        raise ValueError(f"experts: {experts}, allowed: powers of two, {top_k} and more")
    options = {"generator": generator, "device": device}
    first = torch.randint(0, experts, (tokens, 1), **options)
    # Odd steps visit every expert before they repeat.
    step = 2 * torch.randint(0, max(1, experts // 2), (tokens, 1), **options) + 1
    return (first + step * torch.arange(top_k, device=device)) % experts
