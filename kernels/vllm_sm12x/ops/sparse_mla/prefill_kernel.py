"""Sparse MLA prefill in Triton: one block of threads works on one token and some of its heads.

The token's keys are gathered by index in tiles of ``BLOCK_N`` rows. A key is its own value, so that
a tile ``[BLOCK_N, 512]`` is read once from global memory and serves both products from shared
memory. Scores and sums are float32, the softmax runs online in powers of two, and the weights are
rounded to bfloat16 for the second product. The loop ends with the token's own length.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_sm12x import lowering
from vllm_sm12x.ops.fp8_ds_mla.layout import HEAD_DIM
from vllm_sm12x.ops.integers import cdiv
from vllm_sm12x.ops.launch_cache import launch
from vllm_sm12x.ops.launching import capability_of
from vllm_sm12x.ops.sparse_mla import prefill_gluon
from vllm_sm12x.ops.sparse_mla.config_prefill import PrefillConfig, prefill_config

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit(do_not_specialize=prefill_gluon.VARIABLE)
def prefill_kernel(
    q_ptr,
    kv_ptr,
    indices_ptr,
    lens_ptr,
    sink_ptr,
    out_ptr,
    lse_ptr,
    softmax_scale,
    rows,
    width,
    q_token_stride,
    q_head_stride,
    kv_stride,
    indices_stride,
    lens_stride,
    sink_stride,
    out_token_stride,
    out_head_stride,
    lse_token_stride,
    lse_head_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """Result (and logarithm of the sum) of one token and ``BLOCK_H`` heads of ``HEADS``.

    ``T * cdiv(HEADS, BLOCK_H)`` programs. Strides are in elements; columns are neighbours.

    Args:
        q_ptr: bfloat16 ``[T, HEADS, HEAD_DIM]``, as ``out_ptr``.
        kv_ptr: bfloat16 ``[rows, HEAD_DIM]``.
        indices_ptr: int32 ``[T, width]``; below 0 or ``rows`` and more: no key.
        lens_ptr: int32 ``[T]``, how many indices count.
        sink_ptr: float32 ``[HEADS]``.
        lse_ptr: float32 ``[T, HEADS]`` or None.
        BLOCK_N: Keys a tile.
        KEYS_FIRST: Scores are ``[BLOCK_N, BLOCK_H]``, otherwise ``[BLOCK_H, BLOCK_N]``.
    """
    # Blocks of one token are neighbours: they read the same keys at about the same time.
    head_blocks: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // head_blocks).to(tl.int64)
    head = (tl.program_id(0) % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_heads = head < HEADS
    # No address outside a tensor is formed, not even by lanes that a mask switches off.
    head = tl.where(in_heads, head, 0)
    column = tl.arange(0, HEAD_DIM)
    entry = tl.arange(0, BLOCK_N)
    count = tl.minimum(tl.load(lens_ptr + token * lens_stride), width)

    q_ptr += token * q_token_stride
    if KEYS_FIRST:
        q = tl.load(
            q_ptr + head[None, :] * q_head_stride + column[:, None],
            mask=in_heads[None, :],
            other=0.0,
        )
    else:
        q = tl.load(
            q_ptr + head[:, None] * q_head_stride + column[None, :],
            mask=in_heads[:, None],
            other=0.0,
        )
    scale = softmax_scale * LOG2_E

    acc = tl.zeros([BLOCK_H, HEAD_DIM], tl.float32)
    largest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)

    # The indices of a tile are read one tile ahead, into registers: the copy of its keys can then
    # start without waiting for them, and no shared memory is spent on them.
    indices_ptr += token * indices_stride
    next_row = tl.load(indices_ptr + tl.where(entry < count, entry, 0), entry < count, other=-1)
    for start in range(0, count, BLOCK_N):
        named = (next_row >= 0) & (next_row < rows)
        row = tl.where(named, next_row, 0).to(tl.int64)
        # Zeros, not rows that nobody named: they may hold NaN, and 0 * NaN is NaN.
        keys = tl.load(
            kv_ptr + row[:, None] * kv_stride + column[None, :], mask=named[:, None], other=0.0
        )
        position = start + BLOCK_N + entry
        inside = position < count
        next_row = tl.load(indices_ptr + tl.where(inside, position, 0), mask=inside, other=-1)

        if KEYS_FIRST:
            scores = tl.dot(keys, q, tl.zeros([BLOCK_N, BLOCK_H], tl.float32)) * scale
            scores = tl.where(named[:, None], scores, float("-inf"))
            now_largest = tl.maximum(largest, tl.max(scores, 0))
        else:
            scores = tl.dot(q, tl.trans(keys), tl.zeros([BLOCK_H, BLOCK_N], tl.float32)) * scale
            scores = tl.where(named[None, :], scores, float("-inf"))
            now_largest = tl.maximum(largest, tl.max(scores, 1))
        # No key yet: exp2(-inf - 0) is 0, where exp2(-inf - -inf) would be NaN.
        shift = tl.where(now_largest == float("-inf"), 0.0, now_largest)
        shrink = tl.exp2(largest - shift)
        if KEYS_FIRST:
            weights = tl.exp2(scores - shift[None, :])
            total = total * shrink + tl.sum(weights, 0)
            weights = tl.trans(weights.to(tl.bfloat16))
        else:
            weights = tl.exp2(scores - shift[:, None])
            total = total * shrink + tl.sum(weights, 1)
            weights = weights.to(tl.bfloat16)
        acc = tl.dot(weights, keys, acc * shrink[:, None])
        largest = now_largest

    # The sink joins the denominator alone. Against a very large one the share is 1 / inf = 0.
    sink = tl.load(sink_ptr + head * sink_stride) * LOG2_E
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    # Without a key the sum is 0; with a sink of -inf that would be 0 * (1 / 0).
    share = tl.where(total == 0.0, 0.0, 1.0 / (total + tl.exp2(sink - shift)))
    out = (acc * share[:, None]).to(tl.bfloat16)
    out_ptr += token * out_token_stride
    tl.store(
        out_ptr + head[:, None] * out_head_stride + column[None, :], out, mask=in_heads[:, None]
    )
    if lse_ptr is not None:
        lse_ptr += token * lse_token_stride
        lse = (largest + tl.log2(total)) * LN_2
        tl.store(lse_ptr + head * lse_head_stride, lse, mask=in_heads)


def sparse_mla_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lens: torch.Tensor,
    attn_sink: torch.Tensor,
    softmax_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    config: PrefillConfig | None = None,
) -> None:
    """As :func:`vllm_sm12x.ops.sparse_mla.sparse_mla_prefill`, whose checks came before.

    Allocates nothing and does not synchronise with the host.

    Args:
        config: By default the table's, for the GPU of ``q`` and its heads.

    Raises:
        ValueError: The table has no entry for the number of heads, the tensors are on no GPU, or
            rows of ``kv`` are not where the Gluon kernel can copy them.
    """
    tokens, heads, _ = q.shape
    capability = capability_of("q", q, "Triton prefill kernel")
    if config is None:
        config = prefill_config(lowering.target_key(capability), heads)
    if tokens == 0:
        return
    kernel = prefill_kernel
    flags: dict[str, object] = {"KEYS_FIRST": config.keys_first}
    if config.parts:
        # Asynchronous copies take 16 bytes at a time; Triton must see that they are aligned.
        if kv.data_ptr() % 16 or kv.stride(0) % 16:
            raise ValueError(
                f"kv: address {kv.data_ptr():#x}, stride(0) {kv.stride(0)}, allowed in the Gluon"
                " prefill kernel: multiples of 16"
            )
        kernel = prefill_gluon.prefill_kernel
        flags = {"PARTS": config.parts, "STAGES": config.num_stages}
    launch(
        kernel,
        (tokens * cdiv(heads, config.block_h), 1, 1),
        q,
        kv,
        indices,
        lens,
        attn_sink,
        out,
        lse,
        softmax_scale,
        kv.shape[0],
        indices.shape[1],
        q.stride(0),
        q.stride(1),
        kv.stride(0),
        indices.stride(0),
        lens.stride(0),
        attn_sink.stride(0),
        out.stride(0),
        out.stride(1),
        0 if lse is None else lse.stride(0),
        0 if lse is None else lse.stride(1),
        HEADS=heads,
        HEAD_DIM=HEAD_DIM,
        BLOCK_H=config.block_h,
        BLOCK_N=config.block_n,
        **flags,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **lowering.launch_options(capability),
    )
