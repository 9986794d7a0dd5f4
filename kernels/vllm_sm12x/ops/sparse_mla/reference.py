"""Sparse MLA in plain PyTorch, float32 throughout; only the result is rounded, to bfloat16.

The products are float32 matrix products. PyTorch takes TF32 for them only where it is told to
(``torch.set_float32_matmul_precision``; the default is "highest", and vLLM keeps it). This file
relies on that default and changes no global setting.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_sm12x.ops.fp8_ds_mla import reference as fp8_ds_mla
from vllm_sm12x.ops.fp8_ds_mla.layout import HEAD_DIM

# Tokens are taken in chunks that fit into this many bytes; one token at least.
SCRATCH_BYTES = 256 << 20

# Scratch of one key, besides its 512 float32 values and its scores.
DECODE_BYTES_PER_KEY = 800
PREFILL_BYTES_PER_KEY = 1100

# A cache, the slots to read in it [T, W], and how many of them count [T].
KeySet = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def sparse_mla_decode(
    q: torch.Tensor,
    sets: Sequence[KeySet],
    attn_sink: torch.Tensor,
    softmax_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    tokens, heads, _ = q.shape
    widths = [indices.shape[1] for _, indices, _ in sets]
    step = _chunk(_token_bytes(heads, sum(widths), DECODE_BYTES_PER_KEY))
    for first in range(0, tokens, step):
        part = slice(first, min(first + step, tokens))
        count = part.stop - part.start
        keys = torch.empty((count, sum(widths), HEAD_DIM), dtype=torch.float32, device=q.device)
        valid = torch.empty((count, sum(widths)), dtype=torch.bool, device=q.device)
        column = 0
        for (cache, indices, lens), width in zip(sets, widths, strict=True):
            columns = slice(column, column + width)
            named = _named(indices[part], lens[part], fp8_ds_mla.capacity(cache))
            valid[:, columns] = named
            fp8_ds_mla.dequantize_slots(cache, indices[part], named, keys[:, columns])
            column += width
        _attend(q, keys, valid, attn_sink, softmax_scale, out, lse, part)


def sparse_mla_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lens: torch.Tensor,
    attn_sink: torch.Tensor,
    softmax_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    tokens, heads, _ = q.shape
    rows, width = kv.shape[0], indices.shape[1]
    step = _chunk(_token_bytes(heads, width, PREFILL_BYTES_PER_KEY))
    for first in range(0, tokens, step):
        part = slice(first, min(first + step, tokens))
        count = part.stop - part.start
        valid = _named(indices[part], lens[part], rows)
        if rows == 0:
            keys = torch.zeros((count, width, HEAD_DIM), dtype=torch.float32, device=q.device)
        else:
            row = indices[part].masked_fill(~valid, 0).flatten().long()
            found = kv.index_select(0, row).view(count, width, HEAD_DIM)
            # Rows read in place of absent keys may hold NaN, and 0 * NaN is NaN.
            keys = found.masked_fill_(~valid.unsqueeze(-1), 0).float()
            del row, found
        _attend(q, keys, valid, attn_sink, softmax_scale, out, lse, part)


def decode_scratch_bytes(tokens: int, heads: int, keys: int) -> int:
    return _scratch_bytes(tokens, _token_bytes(heads, keys, DECODE_BYTES_PER_KEY))


def prefill_scratch_bytes(tokens: int, heads: int, keys: int) -> int:
    return _scratch_bytes(tokens, _token_bytes(heads, keys, PREFILL_BYTES_PER_KEY))


def _scratch_bytes(tokens: int, token_bytes: int) -> int:
    return min(tokens, _chunk(token_bytes)) * token_bytes


def _chunk(token_bytes: int) -> int:
    return max(1, SCRATCH_BYTES // token_bytes)


def _token_bytes(heads: int, keys: int, bytes_per_key: int) -> int:
    """Scratch of one token: its keys, its scores, and queries, results and sums in float32."""
    return keys * (4 * HEAD_DIM + bytes_per_key + 4 * heads) + heads * (8 * HEAD_DIM + 64)


def _named(indices: torch.Tensor, lens: torch.Tensor, capacity: int) -> torch.Tensor:
    """Which entries name a key: inside the length and inside the cache. ``[T, W]`` bool."""
    column = torch.arange(indices.shape[1], dtype=torch.int32, device=indices.device)
    return (column < lens.unsqueeze(1)) & (indices >= 0) & (indices < capacity)


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    valid: torch.Tensor,
    attn_sink: torch.Tensor,
    softmax_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    part: slice,
) -> None:
    """One chunk: ``keys`` float32 ``[t, n, 512]``, zeros where not ``valid`` (``[t, n]``)."""
    if keys.shape[1] == 0:
        out[part].zero_()
        if lse is not None:
            lse[part].fill_(-torch.inf)
        return
    scores = torch.bmm(q[part].float(), keys.transpose(1, 2)).mul_(softmax_scale)
    scores.masked_fill_(~valid.unsqueeze(1), -torch.inf)
    largest = scores.amax(2, keepdim=True)
    # A token with no key: exp(-inf - 0) = 0 everywhere, where exp(-inf - -inf) would be NaN.
    weights = scores.sub_(largest.masked_fill(largest == -torch.inf, 0)).exp_()
    total = weights.sum(2, keepdim=True)
    log_total = largest + total.log()
    # Share of the keys against the sink: e^lse / (e^lse + e^sink), without overflow.
    share = torch.sigmoid(log_total - attn_sink[: q.shape[1]].view(1, -1, 1))
    factor = (share / total).masked_fill_(total == 0, 0)
    out[part].copy_(torch.bmm(weights, keys).mul_(factor))
    if lse is not None:
        lse[part].copy_(log_total.squeeze(2))
