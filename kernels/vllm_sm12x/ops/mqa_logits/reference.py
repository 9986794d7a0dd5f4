"""Indexer logits in plain PyTorch, float32 throughout.

The products are float32 matrix products. PyTorch takes TF32 for them only where it is told to
(``torch.set_float32_matmul_precision``; the default is "highest", and vLLM keeps it). This file
relies on that default and changes no global setting.
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
        for first_token in range(0, tokens, token_step):
            rows = slice(first_token, min(first_token + token_step, tokens))
            scores = torch.matmul(q[rows].float().flatten(0, 1), keys_t).relu_()
            scores = scores.view(-1, heads, columns.stop - columns.start)
            summed = torch.bmm(weights[rows].unsqueeze(1), scores).squeeze(1)
            torch.mul(summed, k_scale[columns], out=logits[rows, columns])
            del scores, summed
            if clean_logits:
                column = torch.arange(
                    columns.start, columns.stop, dtype=torch.int32, device=q.device
                )
                outside = (column < ks[rows].unsqueeze(1)) | (column >= ke[rows].unsqueeze(1))
                logits[rows, columns].masked_fill_(outside, -torch.inf)
    return logits


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
