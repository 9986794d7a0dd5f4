"""UE8M0 scales: eight exponent bits, no sign, no mantissa (OCP Microscaling formats, v1.0)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_sm12x.ops import guards
from vllm_sm12x.ops.ue8m0 import reference

DTYPES = (torch.float8_e8m0fnu, torch.uint8)


def ue8m0_to_float32(scale: torch.Tensor) -> torch.Tensor:
    """Decode UE8M0 scales to float32, exactly.

    A byte ``b`` stands for ``2**(b - 127)``. Byte 0 is ``2**-127``, a subnormal float32; byte 254
    is ``2**127``; byte 255 is NaN. The result is put together from bits, so that no arithmetic can
    flush the subnormal.

    Args:
        scale: ``float8_e8m0fnu``, or ``uint8`` exponent bytes; any shape and strides.

    Returns:
        float32, the shape of ``scale``.

    Raises:
        ValueError: ``scale`` is not a tensor of one of these dtypes.
    """
    guards.check_tensor("scale", scale)
    guards.check_dtype("scale", scale, *DTYPES)
    return reference.ue8m0_to_float32(scale)


def scale_blocks_(
    values: torch.Tensor, scale: torch.Tensor, block_shape: Sequence[int]
) -> torch.Tensor:
    """Multiply every block of ``values`` by its scale, in place, without expanding the scales.

    Args:
        values: Floating point, ``[..., d_1, ..., d_n]``, ``n = len(block_shape)``; any strides.
        scale: Floating point, ``[..., d_1 / block_1, ..., d_n / block_n]``; any strides.
        block_shape: Sizes of a block along the last ``n`` dimensions.

    Returns:
        ``values``.

    Raises:
        ValueError: A size of ``values`` is not a multiple of the block's, or the shapes of
            ``values`` and ``scale`` do not belong together.
    """
    guards.check_tensor("values", values)
    guards.check_tensor("scale", scale)
    leading = values.dim() - len(block_shape)
    if leading < 0:
        raise ValueError(
            f"values: {values.dim()} dimensions, allowed: at least {len(block_shape)} "
            f"(one for each of block_shape)"
        )
    for dim, block in enumerate(block_shape, start=leading):
        if values.size(dim) % block:
            raise ValueError(
                f"values: size {values.size(dim)} of dimension {dim}, allowed: multiples of {block}"
            )
    blocks = [
        size // block for size, block in zip(values.shape[leading:], block_shape, strict=True)
    ]
    guards.check_shape("scale", scale, [*values.shape[:leading], *blocks])
    guards.check_same_device(values=values, scale=scale)
    return reference.scale_blocks_(values, scale, block_shape)
