"""Paged indexer logits of a decode step in Triton: the keys of a query token split over programs.

A program takes one query token and every ``splits``-th tile of its keys. Its queries
(``[heads, 128]``) stay; page numbers, and then tiles of one or two pages, are copied to shared
memory ahead of their use. How many tiles there are follows from the length
in device memory: a program without a tile ends at once, and nothing is read back to the host.

Scores are ``[keys, heads]``, so that each thread has many heads of few keys: the sum over the
heads is made in registers, and only its last two steps cross threads. Query tokens of one request
read the same keys at about the same time, all but the first from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sm12x import lowering
from vllm_sm12x.ops.integers import cdiv
from vllm_sm12x.ops.launch_cache import launch
from vllm_sm12x.ops.launching import capability_of
from vllm_sm12x.ops.paged_mqa_logits import config
from vllm_sm12x.ops.paged_mqa_logits.layout import (
    BLOCK_SIZE,
    HEAD_DIM,
    SCALE_BYTES,
    TOKEN_BYTES,
)

_HEAD_DIM = tl.constexpr(HEAD_DIM)
_BLOCK_SIZE = tl.constexpr(BLOCK_SIZE)
_SCALE_BYTES = tl.constexpr(SCALE_BYTES)
_KEY_BYTES = tl.constexpr(BLOCK_SIZE * HEAD_DIM)

# These change from call to call, or are 1 in one call and not in the next: a kernel for each of
# their kinds would be compiled while serving.
_VARIABLE = [
    "blocks",
    "lens",
    "lens_request",
    "lens_token",
    "lens_behind",
    "table",
    "table_row",
    "out_row",
    "most_keys",
    "next_n",
    "splits",
]


@triton.jit
def _page(cache, page_bytes, blocks, table, page, length):
    """Where a page of a request lies, and whether it is to be read: if not, where page 0 lies.

    No address outside a tensor is formed, not even one that a mask switches off.
    """
    used = page * _BLOCK_SIZE < length
    number = tl.load(table + tl.where(used, page, 0), mask=used, other=-1)
    valid = (number >= 0) & (number < blocks)
    return cache + tl.where(valid, number, 0).to(tl.int64) * page_bytes, valid


@triton.jit(do_not_specialize=_VARIABLE)
def paged_logits_kernel(
    q,
    cache,
    weights,
    lens,
    table,
    out,
    blocks,
    most_keys,
    next_n,
    splits,
    q_request,
    q_token,
    q_head,
    page_bytes,
    weights_row,
    weights_head,
    lens_request,
    lens_token,
    lens_behind,
    table_row,
    out_row,
    HEADS: tl.constexpr,
    PAGES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Logits of one query token for the tiles ``split``, ``split + splits`` and so on.

    ``B * next_n * splits`` programs. Strides are in elements, of ``cache`` in bytes.

    Args:
        q: float8_e4m3fn ``[B, next_n, HEADS, 128]``.
        cache: uint8, ``blocks`` pages.
        weights: float32 ``[B * next_n, HEADS]``.
        lens: int32 ``[B, next_n]``.
        table: int32 ``[B, pages]``, pages are neighbours.
        out: float32 ``[B * next_n, max_model_len]``, columns are neighbours.
        most_keys: The lesser of ``max_model_len`` and what ``pages`` hold.
        lens_behind: How many keys fewer a query token sees than the next one, where ``lens`` is the
            last one's; else 0.
        PAGES: Of a tile, 1 or 2.
        STAGES: Of the software pipeline.
    """
    BLOCK_N: tl.constexpr = PAGES * _BLOCK_SIZE
    split = tl.program_id(0) % splits
    row = (tl.program_id(0) // splits).to(tl.int64)
    request = row // next_n
    token = row % next_n
    length = tl.load(lens + request * lens_request + token * lens_token)
    length -= ((next_n - 1 - token) * lens_behind).to(tl.int32)
    length = tl.minimum(length, most_keys)
    tiles = tl.cdiv(length, BLOCK_N)  # none for a negative length
    if split < tiles:
        table += request * table_row
        out += row * out_row
        entry = tl.arange(0, BLOCK_N)
        dim = tl.arange(0, _HEAD_DIM)
        head = tl.arange(0, HEADS).to(tl.int64)
        offset = entry % _BLOCK_SIZE
        q += request * q_request + token * q_token
        queries = tl.trans(tl.load(q + head[:, None] * q_head + dim[None, :]))
        factor = tl.load(weights + row * weights_row + head * weights_head)

        # Named here, the stages count for all loads: the page numbers', the keys', the scales'.
        for tile in tl.range(split, tiles, splits, num_stages=STAGES):
            page, valid = _page(cache, page_bytes, blocks, table, tile * PAGES, length)
            valid = valid & (entry >= 0)
            if PAGES == 2:
                next_page = _page(cache, page_bytes, blocks, table, tile * PAGES + 1, length)
                page = tl.where(entry < _BLOCK_SIZE, page, next_page[0])
                valid = tl.where(entry < _BLOCK_SIZE, valid, next_page[1])
            keys = tl.load(
                (page + offset * _HEAD_DIM).to(tl.pointer_type(tl.float8e4nv))[:, None] + dim,
                mask=valid[:, None],
                other=0.0,
            )
            scale = tl.load(
                (page + _KEY_BYTES + offset * _SCALE_BYTES).to(tl.pointer_type(tl.float32)),
                mask=valid,
                other=0.0,
            )
            scores = tl.dot(keys, queries, tl.zeros([BLOCK_N, HEADS], tl.float32))
            scores = tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL) * factor[None, :]
            key = tile * BLOCK_N + entry
            inside = key < length
            tl.store(out + tl.where(inside, key, 0), tl.sum(scores, 1) * scale, mask=inside)


def fp8_paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    max_model_len: int,
    clean_logits: bool,
    row: config.Row | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """As :func:`vllm_sm12x.ops.paged_mqa_logits.fp8_paged_mqa_logits`, whose checks came before.

    Allocates its result alone and does not synchronise with the host.

    Args:
        row: Launch parameters; by default those of the static table. For tests and benchmarks.
        splits: Likewise.

    Raises:
        ValueError: The table has no row for the number of heads, or the tensors are on no GPU.
    """
    requests, next_n, heads, _ = q.shape
    rows = requests * next_n
    capability = capability_of("q", q, "Triton paged logits kernel")
    if row is None:
        row = config.row(rows, heads, lowering.target_key(capability))
    shape = (rows, max_model_len)
    if clean_logits:
        logits = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    else:
        logits = torch.empty(shape, dtype=torch.float32, device=q.device)
    most_keys = min(max_model_len, BLOCK_SIZE * block_tables.shape[1])
    if rows == 0 or most_keys == 0:
        return logits
    if splits is None:
        tiles = cdiv(most_keys, BLOCK_SIZE * row.pages)
        splits = config.splits(row, rows, tiles, lowering.multiprocessors())
    per_token = context_lens.dim() == 2
    # The stride of a dimension of size 1 means nothing.
    page_bytes = kv_cache.stride(0) if kv_cache.shape[0] > 1 else BLOCK_SIZE * TOKEN_BYTES
    launch(
        paged_logits_kernel,
        (rows * splits, 1, 1),
        q,
        kv_cache,
        weights,
        context_lens,
        block_tables,
        logits,
        kv_cache.shape[0],
        most_keys,
        next_n,
        splits,
        q.stride(0),
        q.stride(1),
        q.stride(2),
        page_bytes,
        weights.stride(0),
        weights.stride(1),
        context_lens.stride(0),
        context_lens.stride(1) if per_token else 0,
        0 if per_token else 1,
        block_tables.stride(0),
        logits.stride(0),
        HEADS=heads,
        PAGES=row.pages,
        STAGES=row.num_stages,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
        **({} if row.maxnreg is None else {"maxnreg": row.maxnreg}),
        **lowering.launch_options(capability),
    )
    return logits
