"""Sizes in a page of the indexer's key cache; the package's docstring draws it."""

from __future__ import annotations

BLOCK_SIZE = 64
HEAD_DIM = 128
SCALE_BYTES = 4
TOKEN_BYTES = HEAD_DIM + SCALE_BYTES
PAGE_ALIGNMENT = 576  # vLLM pads a page to a multiple of this


def page_bytes() -> int:
    """Bytes from one page to the next, as vLLM allocates them."""
    return -(-BLOCK_SIZE * TOKEN_BYTES // PAGE_ALIGNMENT) * PAGE_ALIGNMENT
