"""Paged indexer logits in plain PyTorch, float32 throughout.

The products are float32 matrix products. PyTorch takes TF32 for them only where it is told to
(``torch.set_float32_matmul_precision``; the default is "highest", and vLLM keeps it). This file
relies on that default and changes no global setting.

Lengths are not known on the host, so every page that the block table has room for is scored. What
bounds the work is the smaller of the table's width and ``max_model_len``.
"""

from __future__ import annotations

import torch

from vllm_sm12x.ops.paged_mqa_logits.layout import BLOCK_SIZE, HEAD_DIM, TOKEN_BYTES

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
        row_weights = weights[rows].unsqueeze(1)
        for first_page in range(0, pages, page_step):
            run = slice(first_page, min(first_page + page_step, pages))
            columns = slice(run.start * BLOCK_SIZE, min(run.stop * BLOCK_SIZE, max_model_len))
            keys, scales = _read_pages(kv_cache, block_tables[part, run], lens[part], run)
            scores = torch.bmm(queries, keys.transpose(1, 2)).relu_()
            scores = scores.view(-1, heads, keys.shape[1])
            summed = torch.bmm(row_weights, scores).view(-1, next_n, keys.shape[1])
            summed.mul_(scales.unsqueeze(1))
            logits[rows, columns] = summed.flatten(0, 1)[:, : columns.stop - columns.start]
    if clean_logits:
        column = torch.arange(max_model_len, dtype=torch.int32, device=q.device)
        for first in range(0, requests, request_step):
            part = slice(first, min(first + request_step, requests))
            outside = column >= lens[part].reshape(-1, 1)
            logits[part.start * next_n : part.stop * next_n].masked_fill_(outside, -torch.inf)
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


def _read_pages(
    kv_cache: torch.Tensor, table: torch.Tensor, lens: torch.Tensor, run: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``[b, pages * 64, 128]`` and scales ``[b, pages * 64]`` of pages ``run``, float32.

    Pages that no length reaches are read as page 0. Their logits are undefined anyway, and a key
    touches its own column alone, so that what the page holds does not matter.
    """
    blocks, start = kv_cache.shape[0], kv_cache.storage_offset()
    # The stride of a dimension of size 1 means nothing.
    stride = kv_cache.stride(0) if blocks > 1 else BLOCK_SIZE * TOKEN_BYTES
    first_key = torch.arange(run.start, run.stop, dtype=torch.int32, device=table.device)
    first_key *= BLOCK_SIZE
    used = (first_key < lens.amax(1, keepdim=True)) & (table >= 0) & (table < blocks)
    page = table.masked_fill(~used, 0).long()
    values = kv_cache.as_strided((blocks, BLOCK_SIZE * HEAD_DIM), (stride, 1), start)
    scales = kv_cache.as_strided(
        (blocks, BLOCK_SIZE * 4), (stride, 1), start + BLOCK_SIZE * HEAD_DIM
    )
    # Eight bytes at a time: a gather of single bytes would be many times slower.
    keys = values.view(torch.int64)[page].view(torch.float8_e4m3fn).float()
    return (
        keys.view(table.shape[0], -1, HEAD_DIM),
        scales.view(torch.float32)[page].flatten(1),
    )
