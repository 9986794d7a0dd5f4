"""DeepSeek V4's sparse MLA attention without FlashMLA.

The class stands in for ``DeepseekV4FlashMLASparseImpl``: same backend, same metadata, same cache
layout, other kernels. Each of decode and prefill can be left to upstream (``SM12X_PORTABLE``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.forward_context import get_forward_context
from vllm.models.deepseek_v4.common.ops import (
    combine_topk_swa_indices,
    compute_global_topk_indices_and_lens,
    dequantize_and_gather_k_cache,
)
from vllm.models.deepseek_v4.nvidia.flashmla import DeepseekV4FlashMLASparseImpl
from vllm.v1.worker.workspace import current_workspace_manager

from vllm_sm12x.adapters import indexer
from vllm_sm12x.dispatch import portable_enabled
from vllm_sm12x.ops import sparse_mla

if TYPE_CHECKING:
    from vllm.models.deepseek_v4.attention import DeepseekV4MLAAttention
    from vllm.v1.attention.backends.mla.flashmla_sparse import FlashMLASparseMetadata
    from vllm.v1.attention.backends.mla.sparse_swa import DeepseekSparseSWAMetadata

# What the fused norm, RoPE and cache-insert kernel can pad the query to.
PADDED_HEADS = (8, 16, 32, 64, 128)

# Upstream pads the width of its index tensors to multiples of this.
_INDEX_ALIGNMENT = 128


def padded_width(keys: int) -> int:
    """The width of an index tensor for so many keys, as vLLM pads it."""
    return -(-keys // _INDEX_ALIGNMENT) * _INDEX_ALIGNMENT


def most_compressed_keys(layer: DeepseekV4MLAAttention) -> int:
    """The width of a compressed layer's index tensor; 0 for a window-only layer."""
    if layer.compress_ratio <= 1:
        return 0
    if layer.compress_ratio == 4:
        return layer.topk_indices_buffer.shape[-1]
    return padded_width(-(-layer.max_model_len // layer.compress_ratio))


def _attention_scratch_bytes(layer: DeepseekV4MLAAttention, q: torch.Tensor) -> int:
    keys = padded_width(layer.window_size + most_compressed_keys(layer))
    return max(
        # Of up to so many tokens: a small batch, split over many programs, can need the most.
        sparse_mla.decode_scratch_bytes(*q.shape[:2], keys),
        sparse_mla.prefill_scratch_bytes(*q.shape[:2], keys),
    )


def _batch_tokens(swa_metadata: DeepseekSparseSWAMetadata) -> int:
    """Tokens that decode is to choose its launch parameters for.

    Those of the graph that the batch is padded to. On piecewise graphs attention sees the batch as
    it is; by the same choice it rounds as on a full graph, which it is captured in padded.
    """
    descriptor = get_forward_context().batch_descriptor
    tokens = swa_metadata.num_decode_tokens
    if descriptor is None or swa_metadata.num_prefills:
        return tokens
    return max(tokens, descriptor.num_tokens)


class PortableSparseMLAImpl(DeepseekV4FlashMLASparseImpl):
    """Sparse MLA of DeepSeek V4 on the operations of ``vllm_sm12x``."""

    @classmethod
    def get_padded_num_q_heads(cls, num_heads: int) -> int:
        # FlashMLA takes 64 or 128 heads alone; both halves must be ours to go below that.
        if not (portable_enabled("sparse_mla_decode") and portable_enabled("sparse_mla_prefill")):
            return super().get_padded_num_q_heads(num_heads)
        for padded in PADDED_HEADS:
            if num_heads <= padded:
                return padded
        raise ValueError(f"num_heads: {num_heads}, allowed: up to {PADDED_HEADS[-1]}")

    @classmethod
    def forward_mqa(  # type: ignore[override]
        cls,
        layer: DeepseekV4MLAAttention,
        q: torch.Tensor,
        kv: torch.Tensor,
        positions: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        super().forward_mqa(layer, q, kv, positions, output)
        if get_forward_context().attn_metadata is None:
            # The memory-profiling run: take once what the operations take at most, so that the KV
            # cache is sized with it in mind. The indexer runs beside us, on a stream of its own.
            scratch = _attention_scratch_bytes(layer, q)
            if layer.indexer is not None:
                scratch += indexer.scratch_bytes(
                    q.shape[0], layer.indexer.n_head, layer.indexer.max_model_len
                )
            torch.empty(scratch, dtype=torch.uint8, device=q.device)

    @classmethod
    def _forward_decode(
        cls,
        layer: DeepseekV4MLAAttention,
        q: torch.Tensor,
        kv_cache: torch.Tensor | None,
        swa_metadata: DeepseekSparseSWAMetadata,
        attn_metadata: FlashMLASparseMetadata | None,
        swa_only: bool,
        output: torch.Tensor,
    ) -> None:
        if not portable_enabled("sparse_mla_decode"):
            super()._forward_decode(
                layer, q, kv_cache, swa_metadata, attn_metadata, swa_only, output
            )
            return
        num_tokens = swa_metadata.num_decode_tokens
        extra_indices = extra_lens = None
        if not swa_only:
            assert attn_metadata is not None
            if layer.compress_ratio == 4:
                # The indexer's choice, as positions in the request: make them cache slots.
                extra_indices, extra_lens = compute_global_topk_indices_and_lens(
                    layer.topk_indices_buffer[:num_tokens],
                    swa_metadata.token_to_req_indices,
                    attn_metadata.block_table[: swa_metadata.num_decodes],
                    attn_metadata.block_size // layer.compress_ratio,
                    swa_metadata.is_valid_token[:num_tokens],
                )
            else:
                # C128A attends to every compressed entry; the metadata builder listed them.
                extra_indices = attn_metadata.c128a_global_decode_topk_indices
                extra_lens = attn_metadata.c128a_decode_topk_lens
            extra_indices = extra_indices.view(num_tokens, -1)
        sparse_mla.sparse_mla_decode(
            q,
            layer.swa_cache_layer.kv_cache,
            swa_metadata.decode_swa_indices.view(num_tokens, -1),
            swa_metadata.decode_swa_lens,
            layer.attn_sink,
            layer.scale,
            output,
            extra_cache=None if swa_only else kv_cache,
            extra_indices=extra_indices,
            extra_lens=extra_lens,
            batch_tokens=_batch_tokens(swa_metadata),
        )

    @classmethod
    def _forward_prefill(
        cls,
        layer: DeepseekV4MLAAttention,
        q: torch.Tensor,
        positions: torch.Tensor,
        compressed_k_cache: torch.Tensor | None,
        swa_k_cache: torch.Tensor,
        output: torch.Tensor,
        attn_metadata: FlashMLASparseMetadata | None,
        swa_metadata: DeepseekSparseSWAMetadata,
    ) -> None:
        if not portable_enabled("sparse_mla_prefill"):
            super()._forward_prefill(
                layer,
                q,
                positions,
                compressed_k_cache,
                swa_k_cache,
                output,
                attn_metadata,
                swa_metadata,
            )
            return
        swa_only = attn_metadata is None
        num_decodes = swa_metadata.num_decodes
        num_prefills = swa_metadata.num_prefills
        if layer.compress_ratio == 128:
            topk_indices = attn_metadata.c128a_prefill_topk_indices
        else:
            # A window-only layer reads none of it: its top-k is 0.
            start = swa_metadata.num_decode_tokens
            topk_indices = layer.topk_indices_buffer[
                start : start + swa_metadata.num_prefill_tokens
            ]
        topk = 0 if swa_only else topk_indices.shape[-1]

        # A request's row of the gathered keys: its compressed entries, then its window and chunk.
        num_compressed = 0 if swa_only else -(-layer.max_model_len // layer.compress_ratio)
        row = num_compressed + layer.window_size + layer.max_num_batched_tokens
        (gathered,) = current_workspace_manager().get_simultaneous(
            ((cls.PREFILL_CHUNK_SIZE, row, q.shape[-1]), torch.bfloat16),
        )
        query_start_loc = swa_metadata.query_start_loc_cpu
        first_token = int(query_start_loc[num_decodes])

        for first in range(0, num_prefills, cls.PREFILL_CHUNK_SIZE):
            last = min(first + cls.PREFILL_CHUNK_SIZE, num_prefills)
            seq_lens = swa_metadata.prefill_seq_lens[first:last]
            gather_lens = swa_metadata.prefill_gather_lens[first:last]
            keys = gathered[: last - first]
            requests = slice(num_decodes + first, num_decodes + last)
            if not swa_only:
                dequantize_and_gather_k_cache(
                    keys,
                    compressed_k_cache,
                    seq_lens=seq_lens // layer.compress_ratio,
                    gather_lens=None,
                    block_table=attn_metadata.block_table[requests],
                    block_size=attn_metadata.block_size // layer.compress_ratio,
                    offset=0,
                )
            dequantize_and_gather_k_cache(
                keys,
                swa_k_cache,
                seq_lens=seq_lens,
                gather_lens=gather_lens,
                block_table=swa_metadata.block_table[requests],
                block_size=swa_metadata.block_size,
                offset=num_compressed,
            )
            tokens = slice(
                int(query_start_loc[requests.start]) - first_token,
                int(query_start_loc[requests.stop]) - first_token,
            )
            indices, lens = combine_topk_swa_indices(
                topk_indices[tokens],
                swa_metadata.query_start_loc[requests.start : requests.stop + 1],
                seq_lens,
                gather_lens,
                layer.window_size,
                layer.compress_ratio,
                topk,
                row,
                num_compressed,
            )
            sparse_mla.sparse_mla_prefill(
                q[tokens],
                keys.view(-1, q.shape[-1]),
                indices,
                lens,
                layer.attn_sink,
                layer.scale,
                output[tokens],
            )
