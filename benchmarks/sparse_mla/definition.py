"""How far a result of the attention benchmarks is from the definition."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.contest import relative_error
from benchmarks.harness import Call

# Weights of keys are rounded to bfloat16 before they multiply, and so is the result.
TOLERANCE = 2**-7


def definition_error(given: dict, operation: Callable[..., None]) -> Callable[[Call], float]:
    """Of calls that write ``given["out"]``, or return their result as FlashMLA's do.

    Args:
        given: Arguments of ``operation``, which has a reference.
    """
    out = given["out"]
    operation(**given, implementation="reference")
    expected = out.float()

    def error(call: Call) -> float:
        out.fill_(torch.nan)
        found = call()
        return relative_error(out if found is None else found, expected)

    return error
