"""FP8 blocks and MXFP4 groups, quantised as the checkpoints hold them.

A scale is a power of two, stored as its exponent plus 127 (E8M0). It is the smallest that brings
the largest magnitude of its block into the format's range, so that nothing saturates.
"""

from __future__ import annotations

import torch

# Rows and columns of a block of e4m3 values with one scale.
FP8_BLOCK = 128
# Values along a row with one scale, for e2m1.
MXFP4_GROUP = 32

E4M3_MAX = 448.0
E2M1_MAX = 6.0
_BIAS = 127

# The magnitudes of e2m1, by code. Bit 3 is the sign.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def quantize_fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix to e4m3 in blocks of 128 × 128.

    Args:
        weight: float32 ``[N, K]``, finite, both multiples of 128.

    Returns:
        The values, float8_e4m3fn ``[N, K]``, and the scales, float8_e8m0fnu ``[N/128, K/128]``.

    Raises:
        ValueError: A dimension is no multiple of 128, or a value is not finite.
    """
    _check(weight, FP8_BLOCK, FP8_BLOCK)
    rows, columns = weight.shape[0] // FP8_BLOCK, weight.shape[1] // FP8_BLOCK
    blocks = weight.view(rows, FP8_BLOCK, columns, FP8_BLOCK)
    exponent = _exponent(blocks.abs().amax(dim=(1, 3)), E4M3_MAX)
    scaled = torch.ldexp(blocks, -exponent[:, None, :, None])
    values = scaled.view(weight.shape).to(torch.float8_e4m3fn)
    return values, (exponent + _BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


def quantize_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix to e2m1 in groups of 32 along its rows.

    Args:
        weight: float32 ``[N, K]``, finite, K a multiple of 32.

    Returns:
        The codes, int8 ``[N, K/2]``, the even column in the low four bits, and the scales,
        float8_e8m0fnu ``[N, K/32]``.

    Raises:
        ValueError: K is no multiple of 32, or a value is not finite.
    """
    _check(weight, 1, MXFP4_GROUP)
    groups = weight.view(weight.shape[0], -1, MXFP4_GROUP)
    exponent = _exponent(groups.abs().amax(dim=2), E2M1_MAX)
    scaled = torch.ldexp(groups, -exponent[..., None]).view(weight.shape)
    codes = _e2m1_codes(scaled)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed.view(torch.int8), (exponent + _BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


def _check(weight: torch.Tensor, row_multiple: int, column_multiple: int) -> None:
    shape = tuple(weight.shape)
    if len(shape) != 2 or 0 in shape or shape[0] % row_multiple or shape[1] % column_multiple:
        raise ValueError(
            f"weight: shape {shape}, allowed: multiples of ({row_multiple}, {column_multiple})"
        )
    if not weight.isfinite().all():
        raise ValueError("weight: holds values that are not finite, allowed: finite ones")


def _exponent(largest: torch.Tensor, limit: float) -> torch.Tensor:
    """The least ``e`` with ``largest <= limit * 2**e``, int32; 0 for an empty block."""
    # largest / limit = mantissa * 2**exponent with a mantissa in [0.5, 1): exact, unlike log2.
    mantissa, exponent = torch.frexp(largest.double() / limit)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return exponent.clamp(-_BIAS, _BIAS).to(torch.int32)


def _e2m1_codes(scaled: torch.Tensor) -> torch.Tensor:
    """The nearest e2m1 code of each value, uint8; of two equally near, the even one."""
    values = torch.tensor(_E2M1, device=scaled.device)
    between = (values[1:] + values[:-1]) / 2
    # bucketize gives a value on a boundary to the code below. That is right where it is even.
    upward = torch.arange(len(between), device=scaled.device) % 2 == 1
    between = torch.where(upward, torch.nextafter(between, torch.zeros_like(between)), between)
    codes = torch.bucketize(scaled.abs(), between).to(torch.uint8)
    return codes | (torch.signbit(scaled).to(torch.uint8) << 3)
