"""What the indexer's logits must be, vectorised, for tests of more pairs than plain loops allow."""

from __future__ import annotations

import math

import torch
from pages import E4M3
from tolerance import assert_close_to_reference


def score(q, keys, k_scale, weights):
    """The definition for every pair in float64, and the sum of its terms' magnitudes.

    Args:
        q: float8_e4m3fn ``[m, heads, 128]``.
        keys: float64 ``[n, 128]``.
        k_scale: ``[n]``.
        weights: float32 ``[m, heads]``.

    Returns:
        Both float64 ``[m, n]``.
    """
    queries = E4M3.to(q.device)[q.view(torch.uint8).int()]
    weights, k_scale = weights.double(), k_scale.double()
    logits = torch.einsum("mhd,nd->mhn", queries, keys).relu_()
    logits = torch.einsum("mhn,mh->mn", logits, weights) * k_scale
    magnitude = torch.einsum("mhd,mh->md", queries.abs(), weights.abs())
    return logits, magnitude @ keys.abs().T * k_scale


def e4m3_values(tensor: torch.Tensor) -> torch.Tensor:
    """Values of a float8_e4m3fn tensor, float64."""
    return E4M3.to(tensor.device)[tensor.view(torch.uint8).int()]


def assert_logits(actual, expected, magnitude, inside, heads: int) -> None:
    """Fail unless ``actual`` is ``expected`` inside and ``-inf`` elsewhere, within float32."""
    assert_close_to_reference(
        actual,
        expected.masked_fill(~inside, -math.inf),
        dtype=torch.float32,
        reduction_length=128 + heads + 2,
        scale=magnitude.masked_fill(~inside, 0),
    )


def assert_same_top_k(actual, expected, inside, k: int, error: float) -> None:
    """Fail unless each row's ``k`` largest are the same keys.

    Keys whose expected logits are within ``error`` of the smallest one chosen may stand for each
    other: they are ties, as far as the arithmetic can tell.
    """
    actual = actual.double().masked_fill(~inside, -math.inf)
    expected = expected.masked_fill(~inside, -math.inf)
    k = min(k, expected.shape[1])
    edge = expected.topk(k, dim=1).values[:, -1:]
    chosen = torch.zeros_like(inside).scatter_(1, actual.topk(k, dim=1).indices, True)
    chosen &= inside
    surely = inside & (expected > edge + error)
    surely_not = inside & (expected < edge - error)
    assert (chosen & surely == surely).all(), "a key among the largest is not chosen"
    assert not (chosen & surely_not).any(), "a key that is not among the largest is chosen"
    assert torch.equal(chosen.sum(1), inside.sum(1).clamp(max=k))
