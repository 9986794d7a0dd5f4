"""The sparse-attention indexer's logits, in the calling form of ``vllm.utils.deep_gemm``."""

from __future__ import annotations

import torch

from vllm_sm12x.dispatch import portable_enabled
from vllm_sm12x.ops import mqa_logits, paged_mqa_logits

# Keys in a page of the indexer's cache.
_PAGE = 64


def _require_fp8(q: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    values, scale = q
    if scale is not None:
        raise ValueError(
            "q: an MXFP4 query (values, scale) came, allowed: (float8_e4m3fn values, None); "
            "the portable path has no FP4 indexer cache"
        )
    return values


def fp8_mqa_logits(
    q: tuple[torch.Tensor, torch.Tensor | None],
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    cu_seqlen_ks: torch.Tensor,
    cu_seqlen_ke: torch.Tensor,
    clean_logits: bool,
) -> torch.Tensor:
    """Prefill logits. Arguments and result as ``deep_gemm.fp8_fp4_mqa_logits``; FP8 alone."""
    k, k_scale = kv
    return mqa_logits.fp8_mqa_logits(
        _require_fp8(q), k, k_scale, weights, cu_seqlen_ks, cu_seqlen_ke, clean_logits=clean_logits
    )


def fp8_paged_mqa_logits(
    q: tuple[torch.Tensor, torch.Tensor | None],
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    max_model_len: int,
    clean_logits: bool,
) -> torch.Tensor:
    """Decode logits. Arguments and result as ``deep_gemm.fp8_fp4_paged_mqa_logits``, less the
    schedule, which the portable operation does not need; FP8 alone.
    """
    return paged_mqa_logits.fp8_paged_mqa_logits(
        _require_fp8(q),
        kv_cache,
        weights,
        context_lens,
        block_tables,
        max_model_len,
        clean_logits=clean_logits,
    )


def scratch_bytes(tokens: int, heads: int, max_compressed_len: int) -> int:
    """Most memory that the portable logits of a step take besides their result, in bytes.

    Args:
        tokens: Query tokens of the step.
        heads: The indexer's heads.
        max_compressed_len: Keys of the longest request that the engine admits.
    """
    most = 0
    if portable_enabled("mqa_logits"):
        most = mqa_logits.scratch_bytes(tokens, heads, max_compressed_len)
    if portable_enabled("paged_mqa_logits"):
        pages = -(-max_compressed_len // _PAGE)
        decode = paged_mqa_logits.scratch_bytes(tokens, 1, heads, pages, max_compressed_len)
        most = max(most, decode)
    return most
