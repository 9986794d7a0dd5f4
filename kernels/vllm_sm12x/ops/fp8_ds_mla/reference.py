"""``fp8_ds_mla`` in plain PyTorch: no host synchronisation, so safe under CUDA-graph capture."""

from __future__ import annotations

import torch

from vllm_sm12x.ops.fp8_ds_mla.layout import DATA_BYTES, NOPE_DIM, QUANT_BLOCK, SCALE_BYTES

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4


def page_views(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts of every page: data ``[blocks, bs, 576]`` and scales ``[blocks, bs, 8]``."""
    blocks, block_size, token_bytes = cache.shape
    start = cache.storage_offset()
    # The stride of a dimension of size 1 means nothing.
    stride = cache.stride(0) if blocks > 1 else block_size * token_bytes
    data = cache.as_strided((blocks, block_size, DATA_BYTES), (stride, DATA_BYTES, 1), start)
    scales = cache.as_strided(
        (blocks, block_size, SCALE_BYTES),
        (stride, SCALE_BYTES, 1),
        start + block_size * DATA_BYTES,
    )
    return data, scales


def capacity(cache: torch.Tensor) -> int:
    """Number of slots, no more than an int32 index can name."""
    return min(cache.shape[0] * cache.shape[1], 2**31 - 1)


def e8m0_to_float32(exponents: torch.Tensor) -> torch.Tensor:
    """``2**(byte - 127)`` built from bits, hence exact: 0 is the subnormal 2**-127, 255 is NaN."""
    bits = exponents.to(torch.int32).bitwise_left_shift_(23)
    bits.masked_fill_(exponents == 0, 0x0040_0000)
    bits.masked_fill_(exponents == 255, 0x7FC0_0000)
    return bits.view(torch.float32)


def dequantize_slots(
    cache: torch.Tensor, slots: torch.Tensor, valid: torch.Tensor, out: torch.Tensor
) -> None:
    """Fill ``out`` (float32 ``[*slots.shape, 512]``); tokens that are not ``valid`` become zeros.

    An invalid slot may hold anything: it is replaced before an address is formed, and the bytes
    read in its place are cleared before they become numbers, since they may encode NaN.
    """
    if cache.shape[0] * cache.shape[1] == 0:
        out.zero_()
        return
    slots = slots.masked_fill(~valid, 0).long()
    block, offset = slots // cache.shape[1], slots % cache.shape[1]
    data, scales = page_views(cache)
    absent = ~valid.unsqueeze(-1)
    # Eight bytes at a time: a gather of single bytes would be many times slower.
    token = data.view(torch.int64)[block, offset].masked_fill_(absent, 0).view(torch.uint8)
    exponents = scales.view(torch.int64)[block, offset].masked_fill_(absent, 0).view(torch.uint8)
    nope, rope = out[..., :NOPE_DIM], out[..., NOPE_DIM:]
    nope.copy_(token[..., :NOPE_DIM].view(torch.float8_e4m3fn))
    scale = e8m0_to_float32(exponents[..., : NOPE_DIM // QUANT_BLOCK])
    nope.unflatten(-1, (-1, QUANT_BLOCK)).mul_(scale.unsqueeze(-1))
    rope.copy_(token[..., NOPE_DIM:].view(torch.bfloat16))


def quantize_to_slots(latent: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    nope = latent[:, :NOPE_DIM].to(torch.bfloat16).float().unflatten(-1, (-1, QUANT_BLOCK))
    raw = nope.abs().amax(-1).clamp_min(SMALLEST_AMAX) / E4M3_MAX
    mantissa, exponent = torch.frexp(raw)  # raw = mantissa * 2**exponent, 0.5 <= mantissa < 1
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)  # ceil(log2(raw)), exactly
    scaled = torch.ldexp(nope, -exponent.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    values = scaled.to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
    rope = latent[:, NOPE_DIM:].to(torch.bfloat16).contiguous().view(torch.uint8)
    encoded = (exponent + 127).clamp(0, 254).to(torch.uint8)
    unused = torch.zeros_like(encoded[:, :1])
    block, offset = slots // cache.shape[1], slots % cache.shape[1]
    data, scales = page_views(cache)
    data[block, offset] = torch.cat([values, rope], 1)
    scales[block, offset] = torch.cat([encoded, unused], 1)
