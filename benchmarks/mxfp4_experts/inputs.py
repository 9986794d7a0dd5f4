"""A layer of experts of DeepSeek V4 Flash's shape, and batches for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 256, 4096, 2048, 6
LIMIT = 10.0


@dataclass(frozen=True)
class Layer:
    """Weights as the checkpoint has them, of about unit gain."""

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor


def layer(intermediate: int = INTERMEDIATE, seed: int = 0) -> Layer:
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(
            low, high, shape, dtype=torch.uint8, device="cuda", generator=generator
        )

    return Layer(
        draw(0, 256, EXPERTS, 2 * intermediate, HIDDEN // 2),
        draw(116, 122, EXPERTS, 2 * intermediate, HIDDEN // 32),
        draw(0, 256, EXPERTS, HIDDEN, intermediate // 2),
        draw(116, 122, EXPERTS, HIDDEN, intermediate // 32),
    )


@dataclass(frozen=True)
class Batch:
    """Tokens, each with ``TOP_K`` different experts, drawn evenly."""

    hidden_states: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    out: torch.Tensor


def batch(tokens: int, seed: int) -> Batch:
    kinds = dict(device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    hidden = torch.randn(tokens, HIDDEN, **kinds).bfloat16()
    ids = torch.rand(tokens, EXPERTS, **kinds).topk(TOP_K).indices.to(torch.int32)
    weights = torch.rand(tokens, TOP_K, **kinds)
    weights *= 1.5 / weights.sum(1, keepdim=True)
    return Batch(hidden, weights, ids, torch.full_like(hidden, torch.nan))


def touched_bytes(batch: Batch, layer: Layer) -> int:
    """Bytes of the weights and scales of the experts that a batch takes, and of its tokens."""
    experts = batch.topk_ids.unique().numel()
    weights = sum(t.nbytes for t in (layer.w13, layer.w13_scale, layer.w2, layer.w2_scale))
    return experts * weights // EXPERTS + batch.hidden_states.nbytes + batch.out.nbytes


def flops(tokens: int, intermediate: int = INTERMEDIATE) -> int:
    """Operations of the three products, without padding."""
    return 2 * 3 * tokens * TOP_K * HIDDEN * intermediate
