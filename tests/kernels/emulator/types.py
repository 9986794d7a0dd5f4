"""PTX's types as numpy's, and values of one seen as another."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

# How the bits of a register are seen. Halves and pairs in one register are arrays of them.
DTYPES = {
    "pred": np.bool_,
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
}

# Two of these stand in one register: the type of the register, and that of each.
PAIRS = {
    "f32x2": (np.uint64, np.float32),
    "s16x2": (np.uint32, np.int16),
    "bf16x2": (np.uint32, np.uint16),
}


def fit(value: np.ndarray, width: type[np.generic]) -> np.ndarray:
    """The bits of a value in an unsigned type: the same, extended by its sign, or cut."""
    if value.dtype == width or value.dtype == np.bool_:
        return value
    size = np.dtype(width).itemsize
    if value.itemsize == size:
        return value.view(width)
    return value.astype(width)


@cache
def unsigned(dtype: type[np.generic]) -> type[np.generic]:
    """The unsigned type of this width; that of predicates is their own."""
    if dtype is np.bool_:
        return np.bool_
    return np.dtype(f"u{np.dtype(dtype).itemsize}").type


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Exact. Bits as uint16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(value: np.ndarray) -> np.ndarray:
    """To nearest even, as bits in uint16."""
    return _by_torch(value, torch.bfloat16, torch.uint16)


def float16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Exact. Bits as uint16."""
    return bits.view(np.float16).astype(np.float32)


def e4m3_to_float32(bits: np.ndarray) -> np.ndarray:
    """Exact. Bits as uint8."""
    return _E4M3[bits]


def float32_to_e4m3(value: np.ndarray) -> np.ndarray:
    """To nearest even, at most 448 in magnitude (``satfinite``), as bits in uint8."""
    return _by_torch(np.clip(value, -448, 448), torch.float8_e4m3fn, torch.uint8)


def _by_torch(value: np.ndarray, dtype: torch.dtype, bits: torch.dtype) -> np.ndarray:
    return torch.from_numpy(np.array(value, np.float32)).to(dtype).view(bits).numpy()


_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()
