"""The compressor in plain PyTorch, float32: the definition, a step a line."""

from __future__ import annotations

import torch

from vllm_sm12x.ops.fp8_ds_mla import HEAD_DIM, NOPE_DIM, ROPE_DIM
from vllm_sm12x.ops.fp8_ds_mla.reference import quantize_to_slots


def compress_to_cache(
    state_cache: torch.Tensor,
    token_to_request: torch.Tensor,
    positions: torch.Tensor,
    state_slots: torch.Tensor,
    block_table: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cos_sin_cache: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    compress_ratio: int,
    overlap: bool,
) -> None:
    """As :func:`vllm_sm12x.ops.compressor.compress_to_cache`. Synchronises with the host."""
    tokens = min(len(token_to_request), len(positions), len(state_slots), len(slots))
    position, slot = positions[:tokens], slots[:tokens]
    counts = (state_slots[:tokens] >= 0) & (slot >= 0) & ((position + 1) % compress_ratio == 0)
    (token,) = counts.nonzero(as_tuple=True)
    if len(token) == 0:
        return
    position = position[token]
    vectors, scores = _windows(
        state_cache, block_table[token_to_request[token].long()], position, compress_ratio, overlap
    )
    entry = (torch.softmax(scores, 1) * vectors).sum(1)
    normed = entry * torch.rsqrt(entry.square().mean(1, keepdim=True) + eps) * norm_weight.float()
    cos, sin = cos_sin_cache[position // compress_ratio * compress_ratio].chunk(2, 1)
    even, odd = normed[:, NOPE_DIM:].unflatten(1, (ROPE_DIM // 2, 2)).unbind(2)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], 2).flatten(1)
    quantize_to_slots(torch.cat([normed[:, :NOPE_DIM], turned], 1), cache, slot[token])


def _windows(
    state_cache: torch.Tensor,
    tables: torch.Tensor,
    position: torch.Tensor,
    compress_ratio: int,
    overlap: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors and scores, float32 ``[tokens, window, 512]``; absent ones are 0 and ``-inf``."""
    _, block_size, columns = state_cache.shape
    window = compress_ratio * (2 if overlap else 1)
    row = torch.arange(window, device=position.device)
    at = position[:, None] - window + 1 + row
    present = at >= 0
    at = at.clamp_min(0)
    states = state_cache[tables.gather(1, at // block_size).long(), at % block_size]
    # Tokens of the newer group, and all where there is one group alone, in the row's last channels.
    first = (row >= compress_ratio).long() * HEAD_DIM
    channel = first[None, :, None] + torch.arange(HEAD_DIM, device=position.device)
    channel = channel.expand(len(position), -1, -1)
    vectors = states.gather(2, channel).masked_fill(~present[:, :, None], 0.0)
    scores = states.gather(2, channel + columns // 2)
    return vectors, scores.masked_fill(~present[:, :, None], -torch.inf)
