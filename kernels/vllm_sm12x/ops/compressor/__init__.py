"""Compression of a window of tokens to one entry of DeepSeek V4's latent cache.

Each token has left a vector and a score a channel in the state cache. A position that ends a group
of ``compress_ratio`` tokens makes an entry of them::

    entry = sum_w softmax_w(score[w]) * vector[w]          over the window's tokens, by channel
    entry = entry / sqrt(mean(entry**2) + eps) * norm_weight
    the last 64 channels are turned by the rotary embedding, at the group's first position

and writes it to an ``fp8_ds_mla`` page (:mod:`vllm_sm12x.ops.fp8_ds_mla`). Without overlap the
window is the group (C128A). With overlap it is two groups (C4A): a token's row then holds twice the
channels, the first half for windows in which its group is the older one, the second for those in
which it is the newer.

Source: DeepSeek V4's compressor; argument meanings are those of vLLM's
``compress_norm_rope_store_triton`` with keys of 512 channels.
"""

from __future__ import annotations

import torch

from vllm_sm12x.implementation import Implementation, choose
from vllm_sm12x.ops import fp8_ds_mla, guards
from vllm_sm12x.ops.compressor import reference

__all__ = ["HEAD_DIM", "compress_to_cache"]

HEAD_DIM = fp8_ds_mla.HEAD_DIM


def compress_to_cache(
    state_cache: torch.Tensor,
    token_to_request: torch.Tensor,
    positions: torch.Tensor,
    state_slots: torch.Tensor,
    block_table: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cos_sin_cache: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    compress_ratio: int,
    overlap: bool,
    implementation: Implementation | None = None,
) -> None:
    """Write the entry of every token that ends a group.

    The arrays a token each may have different lengths: tokens beyond the shortest are left out, as
    are those with a negative slot in either cache. Positions of a window before the first token
    count for nothing.

    Args:
        state_cache: float32 ``[blocks, block_size, 2 * width]``, vectors and then scores; ``width``
            is 512, or 1024 with overlap. Rows are dense, of any strides.
        token_to_request: int32 ``[>= T]``, rows of ``block_table``.
        positions: int64 ``[>= T]``, not negative where the token counts.
        state_slots: int64 ``[T]``; negative for padding.
        block_table: int32 ``[requests, blocks of a request]``: blocks of ``state_cache``, by
            position.
        norm_weight: bfloat16 or float32 ``[512]``.
        eps: Added to the mean square.
        cos_sin_cache: float32 ``[positions, 64]``: 32 cosines, then 32 sines, of neighbouring pairs
            of channels.
        cache: uint8 ``[pages, page_size, 584]``, written in place.
        slots: int64 ``[>= T]``, where the entry goes, ``page * page_size + offset``; negative for
            none.
        compress_ratio: Tokens of a group.
        overlap: Whether the window has the group before, too.
        implementation: ``"reference"``, or ``"triton"``: a kernel for the windows that ``config``
            lists. None: see :mod:`vllm_sm12x.implementation`, where the name is ``cutedsl``. The
            reference looks at the values to find the tokens that count; it does not go into a CUDA
            graph.

    Raises:
        ValueError: An argument has a wrong dtype, shape, stride or device, or ``implementation`` is
            unknown or has no kernel for the window.
    """
    guards.check_tensor("state_cache", state_cache)
    form = choose("cutedsl", implementation, state_cache.is_cuda)
    if compress_ratio < 1:
        raise ValueError(f"compress_ratio: {compress_ratio}, allowed: 1 and more")
    width = HEAD_DIM * (2 if overlap else 1)
    guards.check_dtype("state_cache", state_cache, torch.float32)
    guards.check_shape("state_cache", state_cache, (None, None, 2 * width))
    guards.check_stride("state_cache", state_cache, 2, 1)
    for name, tensor, dtype in (
        ("token_to_request", token_to_request, torch.int32),
        ("positions", positions, torch.int64),
        ("state_slots", state_slots, torch.int64),
        ("slots", slots, torch.int64),
    ):
        guards.check_tensor(name, tensor)
        guards.check_dtype(name, tensor, dtype)
        guards.check_shape(name, tensor, (None,))
        guards.check_stride(name, tensor, 0, 1)
    guards.check_tensor("block_table", block_table)
    guards.check_dtype("block_table", block_table, torch.int32)
    guards.check_shape("block_table", block_table, (None, None))
    guards.check_stride("block_table", block_table, 1, 1)
    guards.check_tensor("norm_weight", norm_weight)
    guards.check_dtype("norm_weight", norm_weight, torch.bfloat16, torch.float32)
    guards.check_shape("norm_weight", norm_weight, (HEAD_DIM,))
    guards.check_stride("norm_weight", norm_weight, 0, 1)
    guards.check_tensor("cos_sin_cache", cos_sin_cache)
    guards.check_dtype("cos_sin_cache", cos_sin_cache, torch.float32)
    guards.check_shape("cos_sin_cache", cos_sin_cache, (None, fp8_ds_mla.ROPE_DIM))
    guards.check_stride("cos_sin_cache", cos_sin_cache, 1, 1)
    fp8_ds_mla.check_cache("cache", cache)
    guards.check_same_device(
        state_cache=state_cache,
        token_to_request=token_to_request,
        positions=positions,
        state_slots=state_slots,
        block_table=block_table,
        norm_weight=norm_weight,
        cos_sin_cache=cos_sin_cache,
        cache=cache,
        slots=slots,
    )
    arguments = (
        state_cache,
        token_to_request,
        positions,
        state_slots,
        block_table,
        norm_weight,
        eps,
        cos_sin_cache,
        cache,
        slots,
        compress_ratio,
        overlap,
    )
    if form == "reference":
        reference.compress_to_cache(*arguments)
        return
    from vllm_sm12x.ops.compressor import kernel  # here, so that the rest needs no Triton

    kernel.compress_to_cache(*arguments)
