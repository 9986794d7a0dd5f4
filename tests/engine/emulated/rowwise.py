"""Operations whose rows do not depend on how many others are beside them.

PyTorch's on the CPU do. The order in which a matrix product adds up hangs on the number of rows, in
another way on each make of CPU, and a function of single numbers computes those at a tensor's end,
which fill no vector register, by another formula. A last bit moves an FP8 value or an expert's
choice, and with it a log-probability by a tenth.

Here both are computed in float64 and rounded once. A product of two float32 numbers is exact there.
Two orders of a sum are some 2**-53 of its terms apart, which only shows where a float32's rounding
lies between them, once in about 2**27. So a row comes out the same in every batch, padded or not,
and whatever differs between two ways to run a request is a mistake.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

_library: torch.library.Library | None = None


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``[B, M, K] @ [B, K, N]``, in the operands' dtype."""
    # Of PyTorch's products the one that stays its own.
    empty = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=torch.float64)
    return torch.baddbmm(empty, a.double(), b.double(), beta=0).to(a.dtype)


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``[M, K] @ [K, N]``."""
    return bmm(a[None], b[None])[0]


def addmm(
    c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """``beta * c + alpha * (a @ b)``, rounded once; ``c`` broadcasts to ``[M, N]``."""
    product = bmm(a.double()[None], b.double()[None])[0] * alpha
    # Zero times what may be NaN is not meant.
    return (product if beta == 0 else product + beta * c.double()).to(a.dtype)


def mv(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``[M, K] @ [K]``."""
    return bmm(a[None], b[None, :, None])[0, :, 0]


def _in_float64(name: str) -> Callable[..., torch.Tensor]:
    """A function of single numbers, whose form with ``out`` stays PyTorch's own."""
    function = getattr(torch.ops.aten, name).out

    def rounded_once(x: torch.Tensor, *options: float) -> torch.Tensor:
        exact = torch.empty_like(x, dtype=torch.float64)
        return function(x.double(), *options, out=exact).to(x.dtype)

    return rounded_once


sigmoid, silu, softplus = map(_in_float64, ("sigmoid", "silu", "softplus"))

OPERATIONS = {
    "bmm": bmm,
    "mm": mm,
    "addmm": addmm,
    "mv": mv,
    "sigmoid": sigmoid,
    "silu": silu,
    "softplus": softplus,
}


def install() -> None:
    """Put them where PyTorch computes on the CPU, for the rest of the process."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*[Oo]verriding a previously registered")
        for name, function in OPERATIONS.items():
            _library.impl(name, function, "CPU")
