"""Indexer logits in plain PyTorch, float32 throughout.

The products are float32 matrix products. PyTorch takes TF32 for them only where it is told to: with
``torch.set_float32_matmul_precision``, which vLLM calls with VLLM_FLOAT32_MATMUL_PRECISION. The
default of both is "highest". This file relies on it and changes no global setting.
"""

from __future__ import annotations

import torch

# Scores of all heads exist for one tile of tokens and keys at a time, which fits into this.
SCRATCH_BYTES = 256 << 20

# Most keys in a tile.
TILE_KEYS = 8192


def fp8_mqa_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    clean_logits: bool,
) -> torch.Tensor:
    tokens, heads, _ = q.shape
    keys = k.shape[0]
    logits = torch.empty((tokens, keys), dtype=torch.float32, device=q.device)
    token_step, key_step = _tile(tokens, heads, keys)
    for first_key in range(0, keys, key_step):
        columns = slice(first_key, min(first_key + key_step, keys))
        keys_t = k[columns].float().t()
        for first in range(0, tokens, token_step):
            rows = slice(first, min(first + token_step, tokens))
            tile = logits[rows, columns]
            _score(q[rows], keys_t, k_scale[columns], weights[rows], tile)
            if clean_logits:
                _clean(tile, ks[rows] - first_key, ke[rows] - first_key)
        del keys_t  # else it outlives the next allocation
    return logits


def _score(
    q: torch.Tensor,
    keys_t: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    tile: torch.Tensor,
) -> None:
    scores = torch.matmul(q.float().flatten(0, 1), keys_t).relu_()
    scores = scores.view(*weights.shape, keys_t.shape[1])
    summed = torch.bmm(weights.unsqueeze(1), scores).squeeze(1)
    torch.mul(summed, k_scale, out=tile)


def _clean(tile: torch.Tensor, first: torch.Tensor, end: torch.Tensor) -> None:
    """``-inf`` outside ``[first, end)``, both int32 ``[rows]`` and counted from the tile's edge."""
    column = torch.arange(tile.shape[1], dtype=torch.int32, device=tile.device)
    outside = (column < first.unsqueeze(1)) | (column >= end.unsqueeze(1))
    tile.masked_fill_(outside, -torch.inf)


def scratch_bytes(tokens: int, heads: int, keys: int) -> int:
    token_step, key_step = _tile(tokens, heads, keys)
    return token_step * _token_bytes(heads, key_step) + _tile_bytes(key_step)


def _tile(tokens: int, heads: int, keys: int) -> tuple[int, int]:
    """Tokens and keys of a tile."""
    key_step = max(1, min(keys, TILE_KEYS))
    room = SCRATCH_BYTES - _tile_bytes(key_step)
    return max(1, min(tokens, room // _token_bytes(heads, key_step))), key_step


def _token_bytes(heads: int, keys: int) -> int:
    """Scratch of one token: its scores, their sum, its queries in float32, the clean-up's masks."""
    return keys * (4 * heads + 8) + heads * 4 * 128


def _tile_bytes(keys: int) -> int:
    """Scratch that the tokens of a tile share: the keys in float32 and the column numbers."""
    return keys * (4 * 128 + 8)
