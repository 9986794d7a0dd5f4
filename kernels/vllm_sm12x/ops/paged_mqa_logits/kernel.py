"""Paged indexer logits of a decode step in Triton: the keys of a query token split over programs.

A program takes one query token and every ``splits``-th tile of its keys. Its queries
(``[heads, 128]``) stay; page numbers, and then tiles of ``BLOCK_N`` keys, are copied to shared
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
from vllm_sm12x.ops.interpreter import INTERPRETED, dot
from vllm_sm12x.ops.paged_mqa_logits import config
from vllm_sm12x.ops.paged_mqa_logits.layout import BLOCK_SIZE, HEAD_DIM, TOKEN_BYTES

_HEAD_DIM = tl.constexpr(HEAD_DIM)
_BLOCK_SIZE = tl.constexpr(BLOCK_SIZE)
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
def _load_pages(table, key, length, blocks):
    """Page of each of these keys, int32 ``[BLOCK_N]``; -1 beyond the length and for no page."""
    inside = key < length
    page = tl.load(table + tl.where(inside, key, 0) // _BLOCK_SIZE, mask=inside, other=-1)
    return tl.where((page >= 0) & (page < blocks), page, -1)


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
    BLOCK_N: tl.constexpr,
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
        STAGES: Of the software pipeline.
    """
    split = tl.program_id(0) % splits
    row = (tl.program_id(0) // splits).to(tl.int64)
    request = row // next_n
    token = row % next_n
    length = tl.load(lens + request * lens_request + token * lens_token)
    length -= ((next_n - 1 - token) * lens_behind).to(tl.int32)
    length = tl.minimum(length, most_keys)
    tiles = tl.cdiv(tl.maximum(length, 0), BLOCK_N)
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
            key = tile * BLOCK_N + entry
            page_number = _load_pages(table, key, length, blocks)
            valid = page_number >= 0
            # No address outside a tensor is formed, not even by lanes that a mask switches off.
            page = cache + tl.where(valid, page_number, 0).to(tl.int64) * page_bytes
            keys = tl.load(
                page.to(tl.pointer_type(tl.float8e4nv))[:, None]
                + (offset[:, None] * _HEAD_DIM + dim[None, :]),
                mask=valid[:, None],
                other=0.0,
            )
            scale = tl.load(
                (page + _KEY_BYTES).to(tl.pointer_type(tl.float32)) + offset, mask=valid, other=0.0
            )
            scores = dot(keys, queries, tl.zeros([BLOCK_N, HEADS], tl.float32))
            scores = tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL) * factor[None, :]
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
    if not q.is_cuda and not INTERPRETED.value:
        raise ValueError(f"q: device {q.device}, allowed in the Triton paged logits kernel: cuda")
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    target = lowering.target_key(capability)
    if row is None:
        row = config.row(rows, heads, target)
    shape = (rows, max_model_len)
    if clean_logits:
        logits = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    else:
        logits = torch.empty(shape, dtype=torch.float32, device=q.device)
    most_keys = min(max_model_len, BLOCK_SIZE * block_tables.shape[1])
    if rows == 0 or most_keys == 0:
        return logits
    if splits is None:
        splits = config.splits(row, rows, triton.cdiv(most_keys, row.block_n), target)
    per_token = context_lens.dim() == 2
    # The stride of a dimension of size 1 means nothing.
    page_bytes = kv_cache.stride(0) if kv_cache.shape[0] > 1 else BLOCK_SIZE * TOKEN_BYTES
    paged_logits_kernel[(rows * splits,)](
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
        BLOCK_N=row.block_n,
        STAGES=row.num_stages,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
        **({} if row.maxnreg is None else {"maxnreg": row.maxnreg}),
        **lowering.launch_options(capability),
    )
    return logits
