"""Sizes in an ``fp8_ds_mla`` page; the package's docstring draws it."""

from __future__ import annotations

NOPE_DIM = 448
ROPE_DIM = 64
HEAD_DIM = NOPE_DIM + ROPE_DIM
QUANT_BLOCK = 64  # NoPE values that share a scale
DATA_BYTES = NOPE_DIM + 2 * ROPE_DIM
SCALE_BYTES = NOPE_DIM // QUANT_BLOCK + 1
TOKEN_BYTES = DATA_BYTES + SCALE_BYTES
PAGE_ALIGNMENT = 576  # vLLM pads a page to a multiple of this


def page_bytes(block_size: int) -> int:
    """Bytes from one page to the next, as vLLM allocates them."""
    used = block_size * TOKEN_BYTES
    return -(-used // PAGE_ALIGNMENT) * PAGE_ALIGNMENT
