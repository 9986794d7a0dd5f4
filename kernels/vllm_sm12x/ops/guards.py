"""Checks of arguments, shared by every operation.

Each raises ``ValueError`` whose message names the argument, says what came and what is allowed. All
look at metadata only (no device synchronisation), so they are safe under CUDA-graph capture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# A dimension in `check_shape`: a size, a name to bind and compare, or None for "any".
Dimension = int | str | None


def check_tensor(name: str, value: object) -> torch.Tensor:
    """``value`` must be a tensor; it is returned."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    return value


def check_dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """The dtype must be one of ``allowed``."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"{name}: dtype {tensor.dtype}, allowed: {wanted}")


def check_shape(
    name: str,
    tensor: torch.Tensor,
    expected: Sequence[Dimension],
    bound: dict[str, int] | None = None,
) -> None:
    """Compare a shape with a pattern.

    Args:
        expected: One entry a dimension: an ``int`` must match, ``None`` matches anything, and a
            name is bound in ``bound`` at its first use and must match there after.
        bound: Sizes by name, shared by the checks of one call.
    """
    bound = {} if bound is None else bound
    fits = tensor.dim() == len(expected)
    if fits:
        for size, want in zip(tensor.shape, expected, strict=True):
            if isinstance(want, str):
                want = bound.setdefault(want, size)
            fits = fits and (want is None or size == want)
    if not fits:
        pattern = ", ".join(
            "any" if want is None else f"{want}={bound[want]}" if want in bound else str(want)
            for want in expected
        )
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, allowed: ({pattern})")


def check_same_device(**tensors: torch.Tensor | None) -> None:
    """The first tensor given fixes the device for all."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: device {tensor.device}, allowed: {first.device}"
                f" (the device of {first_name})"
            )


def check_stride(name: str, tensor: torch.Tensor, dim: int, expected: int) -> None:
    """The stride of a dimension must be ``expected``, unless its size makes strides meaningless."""
    if tensor.size(dim) > 1 and tensor.stride(dim) != expected:
        raise ValueError(f"{name}: stride({dim}) is {tensor.stride(dim)}, allowed: {expected}")


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    """The tensor must be contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tensor.stride()}, allowed: contiguous")


def check_pages(name: str, cache: torch.Tensor) -> None:
    """A paged uint8 cache: inside a page packed, pages any multiple of 8 bytes apart.

    The multiple of 8 (of the page stride, and of where the first page begins) lets bytes be read
    as wider words.
    """
    packed = 1
    for dim in range(cache.dim() - 1, 0, -1):
        check_stride(name, cache, dim, packed)
        packed *= cache.size(dim)
    if cache.size(0) > 1 and (cache.stride(0) < packed or cache.stride(0) % 8):
        raise ValueError(
            f"{name}: stride(0) is {cache.stride(0)}, allowed: multiples of 8 from {packed} on"
        )
    if cache.storage_offset() % 8:
        raise ValueError(
            f"{name}: storage offset {cache.storage_offset()}, allowed: multiples of 8"
        )
