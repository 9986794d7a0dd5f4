"""The ``fp8_ds_mla`` page of DeepSeek V4's latent cache: 584 bytes a token.

A token's latent is 512 numbers: 448 without position (NoPE), then 64 that the rotary embedding has
already turned (RoPE). A page holds ``block_size`` tokens and is not a table of 584-byte rows::

    block_size x 576 bytes   token data: 448 e4m3 values, then 64 bfloat16 values
    block_size x   8 bytes   scales: 7 exponents (E8M0), one for 64 NoPE values, and 1 unused byte
    padding                  up to the page stride, ``stride(0)`` (vLLM: a multiple of 576 bytes)

A NoPE value is ``e4m3 * 2**(exponent - 127)``. The exponent byte is read as the OCP microscaling
formats define E8M0: 0 is 2**-127 and 255 is NaN. vLLM never writes 255.

The tensor that vLLM hands over has the shape ``[blocks, block_size, 584]`` (uint8): its strides say
where a page begins, but not where a token's bytes are.

Source: vLLM's cache writers for DeepSeek V4 (``quantize_and_insert_k_cache`` and the compressor).
"""

from __future__ import annotations

import torch

from vllm_sm12x.ops import guards
from vllm_sm12x.ops.fp8_ds_mla import reference
from vllm_sm12x.ops.fp8_ds_mla.layout import (
    DATA_BYTES,
    HEAD_DIM,
    NOPE_DIM,
    PAGE_ALIGNMENT,
    QUANT_BLOCK,
    ROPE_DIM,
    SCALE_BYTES,
    TOKEN_BYTES,
    page_bytes,
)

__all__ = [
    "DATA_BYTES",
    "HEAD_DIM",
    "NOPE_DIM",
    "PAGE_ALIGNMENT",
    "QUANT_BLOCK",
    "ROPE_DIM",
    "SCALE_BYTES",
    "TOKEN_BYTES",
    "check_cache",
    "dequantize_slots",
    "page_bytes",
    "quantize_to_slots",
]


def check_cache(name: str, cache: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``cache`` can hold ``fp8_ds_mla`` pages.

    Allowed: uint8 ``[blocks, block_size, 584]``, rows packed, pages ``stride(0)`` bytes apart.
    """
    guards.check_tensor(name, cache)
    guards.check_dtype(name, cache, torch.uint8)
    guards.check_shape(name, cache, (None, None, TOKEN_BYTES))
    guards.check_pages(name, cache)


def dequantize_slots(cache: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Read tokens out of the cache.

    Args:
        cache: uint8 ``[blocks, block_size, 584]``, pages ``stride(0)`` bytes apart.
        slots: int32 or int64, any shape; ``block * block_size + offset``. A negative slot, or one
            beyond the cache, reads as zeros, and no memory is touched for it.
        out: float32 ``[*slots.shape, 512]``, contiguous, written in place. Exact, save that what
            exceeds float32 becomes infinite.

    Raises:
        ValueError: An argument has a wrong dtype, shape, stride or device.
    """
    check_cache("cache", cache)
    guards.check_tensor("slots", slots)
    guards.check_dtype("slots", slots, torch.int32, torch.int64)
    guards.check_tensor("out", out)
    guards.check_dtype("out", out, torch.float32)
    guards.check_shape("out", out, (*slots.shape, HEAD_DIM))
    guards.check_contiguous("out", out)
    guards.check_same_device(cache=cache, slots=slots, out=out)
    valid = (slots >= 0) & (slots < reference.capacity(cache))
    reference.dequantize_slots(cache, slots, valid, out)


def quantize_to_slots(latent: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Write tokens into the cache, quantised as vLLM does.

    The scale of 64 NoPE values is ``2**ceil(log2(max(amax, 1e-4) / 448))``.

    Args:
        latent: bfloat16 or float32 ``[tokens, 512]``; float32 is rounded to bfloat16 first.
        cache: uint8 ``[blocks, block_size, 584]``, pages ``stride(0)`` bytes apart, written in
            place.
        slots: int64 ``[tokens]``, ``block * block_size + offset``, all inside the cache, each at
            most once.

    Raises:
        ValueError: An argument has a wrong dtype, shape, stride or device.
    """
    guards.check_tensor("latent", latent)
    guards.check_dtype("latent", latent, torch.bfloat16, torch.float32)
    bound: dict[str, int] = {}
    guards.check_shape("latent", latent, ("tokens", HEAD_DIM), bound)
    check_cache("cache", cache)
    guards.check_tensor("slots", slots)
    guards.check_dtype("slots", slots, torch.int64)
    guards.check_shape("slots", slots, ("tokens",), bound)
    guards.check_same_device(latent=latent, cache=cache, slots=slots)
    reference.quantize_to_slots(latent, cache, slots)
