"""Indexer logits of a prefill in Triton: a program keeps a tile of keys and goes through tokens.

The tile is the first operand of the product and stays in shared memory; the queries of one token
after another (``[heads, 128]``, 8 KiB for 64 heads) are copied there ahead of their use. Scores are
``[keys, heads]``, so that each thread has many heads of few keys: the sum over the heads is made in
registers, and only its last two steps cross threads.

A program first finds the tokens of its share that see a key of its tile, and goes from the first to
the last of them. What lies outside all ranges costs a look at the ranges.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sm12x import lowering
from vllm_sm12x.ops.integers import cdiv
from vllm_sm12x.ops.launch_cache import launch
from vllm_sm12x.ops.launching import capability_of
from vllm_sm12x.ops.mqa_logits import config

_MOST_TOKENS = tl.constexpr(config.MOST_TOKENS)
# More than any. The compiled loop adds its steps to it, for what it would load ahead, and compares
# the sum with the end: the sum must not overflow.
_NO_TOKEN = tl.constexpr(2**30)

# These change from call to call, or are 1 in one call and not in the next: a kernel for each of
# their kinds would be compiled while serving.
_VARIABLE = [
    "k_scale",
    "ks",
    "ke",
    "out_row",
    "tokens",
    "keys",
    "tokens_per_program",
    "k_scale_stride",
    "ks_stride",
    "ke_stride",
]


@triton.jit(do_not_specialize=_VARIABLE)
def logits_kernel(
    q,
    k,
    k_scale,
    weights,
    ks,
    ke,
    out,
    tokens,
    keys,
    tokens_per_program,
    q_token,
    q_head,
    k_row,
    k_scale_stride,
    weights_token,
    weights_head,
    ks_stride,
    ke_stride,
    out_row,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Logits of ``BLOCK_N`` keys for ``tokens_per_program`` tokens, inside their ranges.

    ``cdiv(keys, BLOCK_N) * cdiv(tokens, tokens_per_program)`` programs. Strides are in elements.

    Args:
        q: float8_e4m3fn ``[tokens, HEADS, HEAD_DIM]``.
        k: float8_e4m3fn ``[keys, HEAD_DIM]``.
        k_scale: float32 ``[keys]``.
        weights: float32 ``[tokens, HEADS]``.
        ks: int32 ``[tokens]``, as ``ke``.
        out: float32 ``[tokens, keys]``, columns are neighbours.
        BLOCK_Q: Tokens at a time, a power of two.
        STAGES: Of the software pipeline.
    """
    first_key = tl.program_id(0) * BLOCK_N
    entry = tl.arange(0, _MOST_TOKENS)
    token = tl.program_id(1) * tokens_per_program + entry
    inside = (entry < tokens_per_program) & (token < tokens)
    # No address outside a tensor is formed, not even by lanes that a mask switches off.
    place = tl.where(inside, token, 0).to(tl.int64)
    starts = tl.load(ks + place * ks_stride, mask=inside, other=0)
    ends = tl.load(ke + place * ke_stride, mask=inside, other=0)
    sees = inside & (starts < ends) & (starts < first_key + BLOCK_N) & (ends > first_key)
    first = tl.min(tl.where(sees, token, _NO_TOKEN), 0)
    last = tl.max(tl.where(sees, token, -1), 0) + 1

    key = first_key + tl.arange(0, BLOCK_N)
    key_inside = key < keys
    key_place = tl.where(key_inside, key, 0).to(tl.int64)
    dim = tl.arange(0, HEAD_DIM)
    tile = tl.load(k + key_place[:, None] * k_row + dim[None, :])
    scale = tl.load(k_scale + key_place * k_scale_stride)

    which = tl.arange(0, BLOCK_Q)
    pair = tl.arange(0, BLOCK_Q * HEADS)
    head = (pair % HEADS).to(tl.int64)
    # Named here, the stages count for all loads of the loop, not for the product's operand alone.
    for step in tl.range(first, last, BLOCK_Q, num_stages=STAGES):
        # Beyond the last token: the first once more.
        now = step + pair // HEADS
        now = tl.where(now < last, now, first).to(tl.int64)
        queries = tl.load(q + (now * q_token + head * q_head)[:, None] + dim[None, :])
        factor = tl.load(weights + now * weights_token + head * weights_head)
        row = tl.where(step + which < last, step + which, first).to(tl.int64)
        start = tl.load(ks + row * ks_stride)
        end = tl.load(ke + row * ke_stride)

        scores = tl.dot(tile, tl.trans(queries), tl.zeros([BLOCK_N, BLOCK_Q * HEADS], tl.float32))
        scores = tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL) * factor[None, :]
        summed = tl.sum(tl.reshape(scores, [BLOCK_N, BLOCK_Q, HEADS]), 2) * scale[:, None]
        seen = (key[:, None] >= start[None, :]) & (key[:, None] < end[None, :])
        seen &= key_inside[:, None]
        tl.store(out + row[None, :] * out_row + key_place[:, None], summed, mask=seen)


def fp8_mqa_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    clean_logits: bool,
    row: config.Row | None = None,
) -> torch.Tensor:
    """As :func:`vllm_sm12x.ops.mqa_logits.fp8_mqa_logits`, whose checks came before.

    Allocates its result alone and does not synchronise with the host.

    Args:
        row: Launch parameters; by default those of the static table. For tests and benchmarks.

    Raises:
        ValueError: The table has no row for the number of heads, or the tensors are on no GPU.
    """
    tokens, heads, head_dim = q.shape
    keys = k.shape[0]
    capability = capability_of("q", q, "Triton logits kernel")
    if row is None:
        row = config.row(heads, lowering.target_key(capability))
    shape = (tokens, keys)
    if clean_logits:
        logits = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    else:
        logits = torch.empty(shape, dtype=torch.float32, device=q.device)
    if tokens == 0 or keys == 0:
        return logits
    key_tiles = cdiv(keys, row.block_n)
    tokens_per_program = config.tokens_per_program(tokens, key_tiles, lowering.multiprocessors())
    # Tiles of keys lie next to each other: blocks at work at a time read the same queries.
    launch(
        logits_kernel,
        (key_tiles, cdiv(tokens, tokens_per_program), 1),
        q,
        k,
        k_scale,
        weights,
        ks,
        ke,
        logits,
        tokens,
        keys,
        tokens_per_program,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k_scale.stride(0),
        weights.stride(0),
        weights.stride(1),
        ks.stride(0),
        ke.stride(0),
        logits.stride(0),
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_N=row.block_n,
        BLOCK_Q=row.block_q,
        STAGES=row.num_stages,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
        **({} if row.maxnreg is None else {"maxnreg": row.maxnreg}),
        **lowering.launch_options(capability),
    )
    return logits
