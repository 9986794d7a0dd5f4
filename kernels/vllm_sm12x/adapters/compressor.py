"""The compressor's kernel for DeepSeek V4's keys, in the calling form of vLLM's compressor."""

from __future__ import annotations

from typing import Any

import torch

from vllm_sm12x.implementation import choose
from vllm_sm12x.ops import fp8_ds_mla
from vllm_sm12x.ops.compressor import HEAD_DIM, compress_to_cache

# Tokens of the group whose window vLLM's Triton kernel cannot hold in registers: C128A. It is good
# for C4A's, and for the indexer's keys.
_LONG_RATIO = 128


def has_kernel(head_dim: int, compress_ratio: int) -> bool:
    """Whether a compressor takes :func:`compress_norm_rope_store`, and not vLLM's Triton kernel.

    It does for C128A's keys where ``SM12X_KERNELS`` has the kernels of ``cutedsl`` run.
    """
    long = head_dim == HEAD_DIM and compress_ratio == _LONG_RATIO
    return long and choose("cutedsl", None, on_gpu=True) == "triton"


def compress_norm_rope_store(
    state_cache: torch.Tensor,
    num_actual: int,
    token_to_req_indices: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    state_width: int,
    cos_sin_cache: torch.Tensor,
    kv_cache: torch.Tensor,
    k_cache_metadata: Any,
    pdl_kwargs: dict[str, object],
    head_dim: int,
    rope_head_dim: int,
    compress_ratio: int,
    overlap: bool,
    use_fp4_cache: bool,
    rms_norm_weight: torch.Tensor,
    rms_norm_eps: float,
    quant_block: int,
    token_stride: int,
    scale_dim: int,
) -> None:
    """Arguments and result as vLLM's ``compress_norm_rope_store_triton``.

    Raises:
        ValueError: The cache's layout or a tensor is not what the kernel takes; the message says
            which.
    """
    given = {
        "head_dim": (head_dim, HEAD_DIM),
        "rope_head_dim": (rope_head_dim, fp8_ds_mla.ROPE_DIM),
        "use_fp4_cache": (use_fp4_cache, False),
        "quant_block": (quant_block, fp8_ds_mla.QUANT_BLOCK),
        "token_stride": (token_stride, fp8_ds_mla.DATA_BYTES),
        "scale_dim": (scale_dim, fp8_ds_mla.SCALE_BYTES),
        "block_size": (block_size, state_cache.size(1)),
        "state_width": (state_width, state_cache.size(2) // 2),
    }
    for name, (value, allowed) in given.items():
        if value != allowed:
            raise ValueError(f"{name}: {value}, allowed in the portable compressor: {allowed}")
    compress_to_cache(
        state_cache,
        token_to_req_indices,
        positions,
        slot_mapping[:num_actual],
        block_table,
        rms_norm_weight,
        rms_norm_eps,
        cos_sin_cache,
        kv_cache,
        k_cache_metadata.slot_mapping,
        compress_ratio,
        overlap,
        implementation="triton",
    )
