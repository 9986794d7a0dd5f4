"""Inputs of the attention benchmarks, made on the GPU: random, and larger than its L2 cache."""

from __future__ import annotations

import functools

import torch

from vllm_sm12x.ops.fp8_ds_mla.layout import HEAD_DIM

TOKEN_BYTES = 584
SCALE = HEAD_DIM**-0.5

# Bytes of a cache that keys are read from: several times the L2 of any GPU that this runs on.
POOL_BYTES = 2**30


@functools.cache
def pages(block_size: int) -> torch.Tensor:
    """uint8 ``[blocks, block_size, 584]`` with vLLM's page stride; keys of magnitude about 1."""
    stride = -(-block_size * TOKEN_BYTES // 576) * 576
    blocks = POOL_BYTES // stride
    memory = torch.randint(0, 256, (blocks * stride,), dtype=torch.uint8, device="cuda")
    memory[(memory & 0x7F) == 0x7F] = 0  # e4m3's NaN
    shape, step = (blocks, block_size, 64), (stride // 2, 288, 1)
    rotated = memory.view(torch.bfloat16).as_strided(shape, step, 448 // 2)
    rotated.copy_(torch.randn(block_size, 64, device="cuda"))
    scales = memory.as_strided((blocks, block_size, 8), (stride, 8, 1), block_size * 576)
    scales.copy_(torch.randint(118, 121, (block_size, 8), device="cuda", dtype=torch.uint8))
    return memory.as_strided((blocks, block_size, TOKEN_BYTES), (stride, TOKEN_BYTES, 1))


def decode(tokens: int, heads: int, kind: str, compressed: int, seed: int) -> dict:
    """Arguments of ``sparse_mla_decode``: full lengths, every token from a request of its own.

    Args:
        kind: ``"window"``, ``"c4a"`` (scattered keys, pages of 64) or ``"c128a"`` (all keys of a
            request, in order, from pages of 2).
        compressed: Compressed keys a token; the width of the index tensor too.
    """
    random = torch.Generator("cuda").manual_seed(seed)
    window = pages(64)
    arguments = dict(
        q=torch.randn(tokens, heads, HEAD_DIM, device="cuda", generator=random).bfloat16(),
        swa_cache=window,
        swa_indices=_in_pages(tokens, 128, window, random),
        swa_lens=torch.full((tokens,), 128, dtype=torch.int32, device="cuda"),
        attn_sink=torch.randn(heads, device="cuda", generator=random),
        softmax_scale=SCALE,
        out=torch.full((tokens, heads, HEAD_DIM), float("nan"), device="cuda").bfloat16(),
    )
    if kind == "window":
        return arguments
    cache = pages(64 if kind == "c4a" else 2)
    if kind == "c4a":
        slots = cache.shape[0] * cache.shape[1]
        indices = torch.randint(slots, (tokens, compressed), device="cuda", generator=random)
    else:
        indices = _in_pages(tokens, compressed, cache, random)
    return arguments | dict(
        extra_cache=cache,
        extra_indices=indices.int(),
        extra_lens=torch.full((tokens,), compressed, dtype=torch.int32, device="cuda"),
    )


def decode_flops(tokens: int, heads: int, keys: int) -> int:
    return 4 * tokens * heads * keys * HEAD_DIM


def decode_bytes(tokens: int, heads: int, keys: int) -> int:
    """Each key's 576 bytes and 8 of scales, its index, and queries and results in bfloat16."""
    return tokens * (keys * (TOKEN_BYTES + 4) + 2 * 2 * heads * HEAD_DIM)


def prefill(tokens: int, heads: int, keys: int, rows: int, seed: int) -> dict:
    """Arguments of ``sparse_mla_prefill``: ``keys`` of ``rows`` a token, 128 of them neighbours.

    The neighbours are a window that moves with the token; the others are scattered over all rows.
    """
    random = torch.Generator("cuda").manual_seed(seed)
    scattered = torch.randint(rows, (tokens, keys), device="cuda", generator=random)
    window = torch.arange(128, device="cuda") + torch.arange(tokens, device="cuda")[:, None]
    scattered[:, -128:] = window % rows
    return dict(
        q=torch.randn(tokens, heads, HEAD_DIM, device="cuda", generator=random).bfloat16(),
        kv=torch.randn(rows, HEAD_DIM, device="cuda", generator=random).bfloat16(),
        indices=scattered.int(),
        lens=torch.full((tokens,), keys, dtype=torch.int32, device="cuda"),
        attn_sink=torch.randn(heads, device="cuda", generator=random),
        softmax_scale=SCALE,
        out=torch.full((tokens, heads, HEAD_DIM), float("nan"), device="cuda").bfloat16(),
    )


def prefill_flops(tokens: int, heads: int, keys: int) -> int:
    return decode_flops(tokens, heads, keys)


def _in_pages(tokens: int, keys: int, cache: torch.Tensor, random: torch.Generator):
    """Slots of consecutive keys in pages that lie anywhere, int32 ``[tokens, keys]``."""
    blocks, block_size = cache.shape[:2]
    pages_each = -(-keys // block_size)
    first = torch.randint(blocks, (tokens, pages_each), device="cuda", generator=random)
    slots = first[:, :, None] * block_size + torch.arange(block_size, device="cuda")
    return slots.flatten(1)[:, :keys].int().contiguous()
