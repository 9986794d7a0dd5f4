"""Sparse MLA attention: decode, prefill, and FlashMLA beside them."""
