"""Paged indexer logits in plain PyTorch, float32 throughout.

The products are float32 matrix products. PyTorch takes TF32 for them only where it is told to: with
``torch.set_float32_matmul_precision``, which vLLM calls with VLLM_FLOAT32_MATMUL_PRECISION. The
default of both is "highest". This file relies on it and changes no global setting.

Lengths are not known on the host, so every page that the block table has room for is scored. What
bounds the work is the smaller of the table's width and ``max_model_len``.
"""

from __future__ import annotations

import torch

from vllm_sm12x.ops.paged_mqa_logits.layout import BLOCK_SIZE, HEAD_DIM, SCALE_BYTES, TOKEN_BYTES

# Requests and pages are taken in chunks that fit into this many bytes; one page at least.
SCRATCH_BYTES = 256 << 20


def fp8_paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    max_model_len: int,
    clean_logits: bool,
) -> torch.Tensor:
    requests, next_n, heads, _ = q.shape
    logits = torch.empty((requests * next_n, max_model_len), dtype=torch.float32, device=q.device)
    lens = _lens_per_token(context_lens, next_n)
    pages = _pages(block_tables.shape[1], max_model_len)
    if kv_cache.shape[0] == 0:
        pages = 0
    request_step, page_step = _chunk(requests, next_n, heads, pages)
    for first in range(0, requests, request_step):
        part = slice(first, min(first + request_step, requests))
        rows = slice(part.start * next_n, part.stop * next_n)
        queries = q[part].float().flatten(1, 2)
        for first_page in range(0, pages, page_step):
            run = slice(first_page, min(first_page + page_step, pages))
            columns = slice(run.start * BLOCK_SIZE, min(run.stop * BLOCK_SIZE, max_model_len))
            page = _used_pages(block_tables[part, run], lens[part], run, kv_cache.shape[0])
            _score(queries, kv_cache, page, weights[rows], logits[rows, columns])
        if clean_logits:
            _clean(logits[rows], lens[part])
    return logits


def scratch_bytes(requests: int, next_n: int, heads: int, pages: int, max_model_len: int) -> int:
    pages = _pages(pages, max_model_len)
    request_step, page_step = _chunk(requests, next_n, heads, pages)
    chunk = page_step * _page_bytes(next_n, heads) + _request_bytes(next_n, heads)
    clean = max_model_len * (next_n + 12)
    return request_step * (chunk + clean)


def _lens_per_token(context_lens: torch.Tensor, next_n: int) -> torch.Tensor:
    """Length of every query token, int32 ``[B, next_n]``."""
    if context_lens.dim() == 2:
        return context_lens
    behind = torch.arange(1 - next_n, 1, dtype=torch.int32, device=context_lens.device)
    return context_lens.unsqueeze(1) + behind


def _pages(table_width: int, max_model_len: int) -> int:
    return min(table_width, -(-max_model_len // BLOCK_SIZE))


def _chunk(requests: int, next_n: int, heads: int, pages: int) -> tuple[int, int]:
    """Requests and pages of a chunk: whole requests where one fits."""
    pairs = max(1, SCRATCH_BYTES // _page_bytes(next_n, heads))
    page_step = max(1, min(pages, pairs))
    return max(1, min(requests, pairs // page_step)), page_step


def _page_bytes(next_n: int, heads: int) -> int:
    """Scratch of one page of one request: bytes and float32 keys, scales, scores, sums, ids."""
    return BLOCK_SIZE * (5 * HEAD_DIM + 8 + next_n * (4 * heads + 8)) + 32


def _request_bytes(next_n: int, heads: int) -> int:
    """Scratch of one request: its queries in float32 and its lengths."""
    return next_n * (heads * 4 * HEAD_DIM + 16)


def _used_pages(table: torch.Tensor, lens: torch.Tensor, run: slice, blocks: int) -> torch.Tensor:
    """Pages to read, int64 ``[b, pages]``: page 0 where no length reaches.

    The logits there are undefined anyway, and a key touches its own column alone, so that what
    page 0 holds does not matter.
    """
    first_key = torch.arange(run.start, run.stop, dtype=torch.int32, device=table.device)
    first_key *= BLOCK_SIZE
    used = (first_key < lens.amax(1, keepdim=True)) & (table >= 0) & (table < blocks)
    return table.masked_fill(~used, 0).long()


def _score(
    queries: torch.Tensor,
    kv_cache: torch.Tensor,
    page: torch.Tensor,
    weights: torch.Tensor,
    tile: torch.Tensor,
) -> None:
    """``queries`` float32 ``[b, next_n * heads, 128]``, ``page`` ``[b, pages]``, into ``tile``."""
    values, scales = _page_views(kv_cache)
    requests, width = page.shape[0], page.shape[1] * BLOCK_SIZE
    # Eight bytes at a time: a gather of single bytes would be many times slower.
    keys = values.view(torch.int64)[page].view(torch.float8_e4m3fn).float()
    keys = keys.view(requests, width, HEAD_DIM)
    scores = torch.bmm(queries, keys.transpose(1, 2)).relu_()
    scores = scores.view(*weights.shape, width)
    summed = torch.bmm(weights.unsqueeze(1), scores).view(requests, -1, width)
    summed.mul_(scales.view(torch.float32)[page].view(requests, 1, width))
    tile.copy_(summed.flatten(0, 1)[:, : tile.shape[1]])


def _page_views(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts of every page, uint8: keys ``[blocks, 8192]`` and scales ``[blocks, 256]``."""
    blocks, start = kv_cache.shape[0], kv_cache.storage_offset()
    # The stride of a dimension of size 1 means nothing.
    stride = kv_cache.stride(0) if blocks > 1 else BLOCK_SIZE * TOKEN_BYTES
    key_bytes = BLOCK_SIZE * HEAD_DIM
    keys = kv_cache.as_strided((blocks, key_bytes), (stride, 1), start)
    scales = kv_cache.as_strided((blocks, BLOCK_SIZE * SCALE_BYTES), (stride, 1), start + key_bytes)
    return keys, scales


def _clean(rows: torch.Tensor, lens: torch.Tensor) -> None:
    """``-inf`` from each row's length on; ``lens`` int32 ``[b, next_n]``."""
    column = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device)
    rows.masked_fill_(column >= lens.reshape(-1, 1), -torch.inf)
