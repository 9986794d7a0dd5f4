"""Rounding of launch parameters in plain Python.

``triton.cdiv`` and ``triton.next_power_of_2`` work in kernels too, and unwrap their arguments for
that: a call takes as long as a small PyTorch operation, and a launch needs several.
"""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up; ``b`` is positive."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is ``n`` or more; ``n`` is positive."""
    return 1 << (n - 1).bit_length()
