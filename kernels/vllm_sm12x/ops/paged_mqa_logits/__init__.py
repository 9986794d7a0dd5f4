"""Logits of the lightning indexer over a paged FP8 key cache (decode).

For row ``r = b * next_n + j`` and key position ``i`` of request ``b``::

    logits[r, i] = scale_i * sum_h weights[r, h] * relu(dot(q[b, j, h], key_i))

where ``key_i`` is token ``i % 64`` of page ``block_tables[b, i // 64]``. A page is not a table of
132-byte rows::

    64 x 128 bytes   keys, e4m3
    64 x   4 bytes   their scales, float32 (vLLM writes powers of two)
    padding          up to the page stride, ``stride(0)`` (vLLM: a multiple of 576 bytes)

Source: DeepSeek-V3.2, lightning indexer; page layout and argument meanings are those of vLLM's
``fp8_fp4_paged_mqa_logits`` with FP8 queries.

The function does not synchronise with the host, and what it allocates follows from shapes alone,
so it may run under CUDA-graph capture.
"""

from __future__ import annotations

import torch

from vllm_sm12x.implementation import Implementation, choose
from vllm_sm12x.ops import guards
from vllm_sm12x.ops.paged_mqa_logits import reference
from vllm_sm12x.ops.paged_mqa_logits.layout import BLOCK_SIZE, HEAD_DIM, TOKEN_BYTES, page_bytes

__all__ = [
    "BLOCK_SIZE",
    "HEAD_DIM",
    "TOKEN_BYTES",
    "fp8_paged_mqa_logits",
    "page_bytes",
    "scratch_bytes",
]


def fp8_paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    max_model_len: int,
    clean_logits: bool = False,
    implementation: Implementation | None = None,
) -> torch.Tensor:
    """Score the cached keys of every request for its query tokens.

    Args:
        q: float8_e4m3fn ``[B, next_n, heads, 128]``.
        kv_cache: uint8 ``[blocks, 64, 1, 132]``, pages ``stride(0)`` bytes apart.
        weights: float32 ``[B * next_n, heads]``.
        context_lens: int32 ``[B, next_n]``: how many keys each query token sees; or ``[B]``: how
            many the last one sees, each earlier one seeing one fewer. Zero or less: none.
        block_tables: int32 ``[B, pages]``. Only entries that a length reaches are used; the others
            may hold anything. An entry outside the cache gives undefined logits, never a read
            outside it.
        max_model_len: Columns of the result. Lengths are at most
            ``min(max_model_len, 64 * pages)``.
        clean_logits: Write ``-inf`` from a row's length on; otherwise what stands there is
            undefined.
        implementation: ``"reference"``, or ``"triton"``: a kernel that multiplies in e4m3 with
            float32 sums, for the heads that ``config`` lists. None: see
            :mod:`vllm_sm12x.implementation`.

    Returns:
        float32 ``[B * next_n, max_model_len]``, contiguous.

    Raises:
        ValueError: An argument has a wrong dtype, shape, stride or device, or ``implementation`` is
            unknown or has no kernel for the number of heads.
    """
    bound: dict[str, int] = {}
    guards.check_tensor("q", q)
    guards.check_dtype("q", q, torch.float8_e4m3fn)
    guards.check_shape("q", q, ("B", "next_n", "heads", HEAD_DIM), bound)
    guards.check_stride("q", q, 3, 1)
    form = choose("paged_mqa_logits", implementation, q.is_cuda)
    if bound["next_n"] < 1:
        raise ValueError(f"q: shape {tuple(q.shape)}, allowed: next_n (size 1) from 1 on")
    guards.check_tensor("kv_cache", kv_cache)
    guards.check_dtype("kv_cache", kv_cache, torch.uint8)
    guards.check_shape("kv_cache", kv_cache, (None, BLOCK_SIZE, 1, TOKEN_BYTES))
    guards.check_pages("kv_cache", kv_cache)
    bound["rows"] = bound["B"] * bound["next_n"]
    guards.check_tensor("weights", weights)
    guards.check_dtype("weights", weights, torch.float32)
    guards.check_shape("weights", weights, ("rows", "heads"), bound)
    guards.check_tensor("context_lens", context_lens)
    guards.check_dtype("context_lens", context_lens, torch.int32)
    per_token = context_lens.dim() != 1
    guards.check_shape(
        "context_lens", context_lens, ("B", "next_n") if per_token else ("B",), bound
    )
    guards.check_tensor("block_tables", block_tables)
    guards.check_dtype("block_tables", block_tables, torch.int32)
    guards.check_shape("block_tables", block_tables, ("B", None), bound)
    guards.check_stride("block_tables", block_tables, 1, 1)
    if not isinstance(max_model_len, int) or max_model_len < 0:
        raise ValueError(f"max_model_len: {max_model_len!r}, allowed: an integer, 0 or more")
    guards.check_same_device(
        q=q,
        kv_cache=kv_cache,
        weights=weights,
        context_lens=context_lens,
        block_tables=block_tables,
    )
    arguments = (q, kv_cache, weights, context_lens, block_tables, max_model_len, clean_logits)
    if form == "reference":
        return reference.fp8_paged_mqa_logits(*arguments)
    from vllm_sm12x.ops.paged_mqa_logits import kernel  # here, so that the rest needs no Triton

    return kernel.fp8_paged_mqa_logits(*arguments)


def scratch_bytes(
    requests: int,
    next_n: int,
    heads: int,
    pages: int,
    max_model_len: int,
    implementation: Implementation | None = None,
) -> int:
    """Most memory that :func:`fp8_paged_mqa_logits` allocates at a time besides its result.

    Args:
        requests: ``B``.
        next_n: Query tokens of a request.
        heads: Number of heads.
        pages: Width of the block table.
        max_model_len: Columns of the result.
        implementation: As in :func:`fp8_paged_mqa_logits`; None: of calls on the current GPU.

    Returns:
        Bytes.

    Raises:
        ValueError: ``implementation`` is unknown.
    """
    form = choose("paged_mqa_logits", implementation, torch.cuda.is_available())
    if form == "triton":
        return 0
    return reference.scratch_bytes(requests, next_n, heads, pages, max_model_len)
