"""Matrices in the registers of a warp: how ``ldmatrix``, ``stmatrix`` and ``mma`` lay them out.

Arrays here have a row a warp and a column a thread of it. The layouts are those of the PTX ISA:
thread ``t`` belongs to group ``t // 4`` and stands at place ``t % 4`` in it.
"""

from __future__ import annotations

import numpy as np

from emulator import types

WARP = 32


def rows_to_fragment(rows: np.ndarray, transposed: bool) -> np.ndarray:
    """Rows of 8x8 matrices of 16-bit elements as the register of each thread.

    Args:
        rows: ``[warps, 8, 8]`` uint16, row by row as they lie in memory.
        transposed: ``.trans``: a thread holds two elements of a column and not of a row.

    Returns:
        ``[warps, 32]`` uint32; the first of the two elements in the lower half.
    """
    if transposed:
        rows = rows.transpose(0, 2, 1)
    return np.ascontiguousarray(rows).view(np.uint32).reshape(-1, WARP)


def fragment_to_rows(fragment: np.ndarray, transposed: bool) -> np.ndarray:
    """The inverse of :func:`rows_to_fragment`."""
    rows = np.ascontiguousarray(fragment).view(np.uint16).reshape(-1, 8, 8)
    return np.ascontiguousarray(rows.transpose(0, 2, 1)) if transposed else rows


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, element: str) -> np.ndarray:
    """``mma.m16n8``: ``a @ b + c`` a warp, summed in float64 and rounded to float32 once.

    A GPU's order and rounding of the sum are not specified; this is the number it comes near.

    Args:
        a: ``[4, warps, 32]`` uint32: 16 rows, of 16 elements of 16 bits or 32 of 8.
        b: ``[2, warps, 32]`` uint32: as many elements deep, 8 columns.
        c: ``[4, warps, 32]`` float32: 16 rows of 8 columns.
        element: ``"bf16"`` or ``"e4m3"``.

    Returns:
        ``[4, warps, 32]`` float32, laid out as ``c``.
    """
    rows = _operand(a, element)
    # Registers 0 and 1 are rows 0-7 and 8-15 of the first half of the depth, 2 and 3 of the second.
    upper = np.concatenate([rows[0], rows[2]], axis=2)
    lower = np.concatenate([rows[1], rows[3]], axis=2)
    left = np.concatenate([upper, lower], axis=1)
    columns = np.concatenate(list(_operand(b, element)), axis=2)
    product = left @ columns.transpose(0, 2, 1)
    warps = c.shape[1]
    # Registers 0 and 1 are two neighbours of a row of the upper half, 2 and 3 of the lower.
    halves = product.reshape(warps, 2, 8, 4, 2)
    ordered = halves.transpose(1, 4, 0, 2, 3).reshape(4, warps, WARP)
    return (ordered + c.astype(np.float64)).astype(np.float32)


def _operand(registers: np.ndarray, element: str) -> np.ndarray:
    """Registers as float64 ``[registers, warps, 8, elements of a group]``."""
    registers = np.ascontiguousarray(registers)
    if element == "bf16":
        values = types.bfloat16_to_float32(registers.view(np.uint16))
    else:
        values = types.e4m3_to_float32(registers.view(np.uint8))
    return values.reshape(registers.shape[0], registers.shape[1], 8, -1).astype(np.float64)
