"""Sparse MLA in plain PyTorch, float32 throughout; only the result is rounded, to bfloat16.

The products are float32 matrix products. PyTorch takes TF32 for them only where it is told to: with
``torch.set_float32_matmul_precision``, which vLLM calls with VLLM_FLOAT32_MATMUL_PRECISION. The
default of both is "highest". This file relies on it and changes no global setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    width = sum(indices.shape[1] for _, indices, _ in sets)
    for part in _parts(tokens, _token_bytes(heads, width, DECODE_BYTES_PER_KEY)):
        chunk = [(cache, indices[part], lens[part]) for cache, indices, lens in sets]
        keys, valid = _read_sets(chunk)
        _attend(q, keys, valid, attn_sink, softmax_scale, out, lse, part)
        del keys, valid  # else they outlive the next chunk's allocation


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
    width = indices.shape[1]
    for part in _parts(tokens, _token_bytes(heads, width, PREFILL_BYTES_PER_KEY)):
        keys, valid = _read_rows(kv, indices[part], lens[part])
        _attend(q, keys, valid, attn_sink, softmax_scale, out, lse, part)
        del keys, valid  # else they outlive the next chunk's allocation


def decode_scratch_bytes(tokens: int, heads: int, keys: int) -> int:
    return _scratch_bytes(tokens, _token_bytes(heads, keys, DECODE_BYTES_PER_KEY))


def prefill_scratch_bytes(tokens: int, heads: int, keys: int) -> int:
    return _scratch_bytes(tokens, _token_bytes(heads, keys, PREFILL_BYTES_PER_KEY))


def _scratch_bytes(tokens: int, token_bytes: int) -> int:
    return min(tokens, _chunk(token_bytes)) * token_bytes


def _chunk(token_bytes: int) -> int:
    return max(1, SCRATCH_BYTES // token_bytes)


def _parts(tokens: int, token_bytes: int) -> Iterator[slice]:
    step = _chunk(token_bytes)
    for first in range(0, tokens, step):
        yield slice(first, min(first + step, tokens))


def _token_bytes(heads: int, keys: int, bytes_per_key: int) -> int:
    """Scratch of one token: its keys, its scores, and queries, results and sums in float32."""
    return keys * (4 * HEAD_DIM + bytes_per_key + 4 * heads) + heads * (8 * HEAD_DIM + 64)


def _named(indices: torch.Tensor, lens: torch.Tensor, capacity: int) -> torch.Tensor:
    """Which entries name a key: inside the length and inside the cache. ``[T, W]`` bool."""
    column = torch.arange(indices.shape[1], dtype=torch.int32, device=indices.device)
    return (column < lens.unsqueeze(1)) & (indices >= 0) & (indices < capacity)


def _read_sets(sets: Sequence[KeySet]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys float32 ``[t, W + E, 512]``, zeros where none is named, and which are ``[t, W + E]``."""
    tokens, device = sets[0][1].shape[0], sets[0][1].device
    width = sum(indices.shape[1] for _, indices, _ in sets)
    keys = torch.empty((tokens, width, HEAD_DIM), dtype=torch.float32, device=device)
    valid = torch.empty((tokens, width), dtype=torch.bool, device=device)
    column = 0
    for cache, indices, lens in sets:
        columns = slice(column, column + indices.shape[1])
        named = _named(indices, lens, fp8_ds_mla.capacity(cache))
        valid[:, columns] = named
        fp8_ds_mla.dequantize_slots(cache, indices, named, keys[:, columns])
        column = columns.stop
    return keys, valid


def _read_rows(
    kv: torch.Tensor, indices: torch.Tensor, lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`_read_sets`, from gathered rows."""
    valid = _named(indices, lens, kv.shape[0])
    if kv.shape[0] == 0:
        return kv.new_zeros((*indices.shape, HEAD_DIM), dtype=torch.float32), valid
    row = indices.masked_fill(~valid, 0).flatten().long()
    found = kv.index_select(0, row).view(*indices.shape, HEAD_DIM)
    # Rows read in place of absent keys may hold NaN, and 0 * NaN is NaN.
    return found.masked_fill_(~valid.unsqueeze(-1), 0).float(), valid


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
