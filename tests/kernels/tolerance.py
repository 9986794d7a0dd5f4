"""How far an operation may be from its definition, from arithmetic alone.

Each bound follows from the types and the length of the reduction. None is fitted to what a kernel
happens to give.
"""

from __future__ import annotations

import math

import torch


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest into ``dtype``: 2**-24 for float32."""
    return torch.finfo(dtype).eps / 2


def error_bound(
    expected: torch.Tensor,
    *,
    dtype: torch.dtype,
    reduction_length: int,
    scale: torch.Tensor | float | None = None,
    operand_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The bound that :func:`assert_close_to_reference` applies, one value an element."""
    expected = expected.double()
    if scale is None:
        scale = expected.abs().amax() if expected.numel() else 0.0
    scale = torch.as_tensor(scale, dtype=torch.float64, device=expected.device)
    steps = reduction_length * unit_roundoff(torch.float32)
    if not 0 <= steps < 1:
        raise ValueError(f"reduction_length: {reduction_length}, allowed: 0 to 2**24 - 1")
    relative = steps / (1 - steps)
    if operand_dtype is not None:
        relative += 2 * unit_roundoff(operand_dtype)
    summed = relative * scale
    # The sum is off by `summed` before it is rounded to the result's type.
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return summed + unit_roundoff(dtype) * (expected.abs() + summed) + smallest


def assert_close_to_reference(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    dtype: torch.dtype,
    reduction_length: int,
    scale: torch.Tensor | float | None = None,
    operand_dtype: torch.dtype | None = None,
) -> None:
    """Fail unless ``actual`` is within the rounding error of a float32 reduction of ``expected``.

    With ``u(t)`` the unit roundoff of type ``t`` and ``n`` the reduction length, each element may
    be off by::

        e = gamma(n) * scale,  gamma(n) = n * u(float32) / (1 - n * u(float32))
        |actual - expected| <= e + u(dtype) * (|expected| + e) + smallest subnormal of dtype

    That is the classical bound of a sum of ``n`` float32 roundings in any order, and then one
    rounding into the result's type. With ``operand_dtype``, ``gamma(n)`` grows by
    ``2 * u(operand_dtype)``: both factors of a product were rounded to that type first.

    Args:
        actual: Result of the operation, of type ``dtype``.
        expected: The definition's result in float64. Infinities must be matched exactly; NaN is
            not allowed.
        dtype: Type that the operation rounds its result to.
        reduction_length: Number of roundings on the longest path to one result.
        scale: Sum of the magnitudes of the terms of the reduction, an element each or one for all.
            By default the largest finite ``|expected|``, which is enough where the terms of the
            largest result do not cancel.
        operand_dtype: Type to which the operation rounds its factors, if narrower than float32.
    """
    assert actual.dtype == dtype, f"actual: dtype {actual.dtype}, expected {dtype}"
    assert expected.dtype == torch.float64, f"expected: dtype {expected.dtype}, not float64"
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    assert not expected.isnan().any(), "expected: holds NaN"
    actual = actual.double()
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite]), "an infinity is not matched"
    finite_expected = expected.masked_fill(infinite, 0.0)
    bound = error_bound(
        finite_expected,
        dtype=dtype,
        reduction_length=reduction_length,
        scale=scale,
        operand_dtype=operand_dtype,
    )
    error = (actual.masked_fill(infinite, 0.0) - finite_expected).abs()
    # Written so that NaN fails.
    wrong = ~(error <= bound)
    if wrong.any():
        ratio = torch.where(wrong, error / bound, 0.0).nan_to_num(nan=math.inf)
        where = torch.unravel_index(ratio.argmax(), ratio.shape)
        at = tuple(int(i) for i in where)
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are out of bounds; worst at {at}: "
            f"got {actual[where].item()!r}, expected {expected[where].item()!r}, "
            f"allowed error {bound.expand_as(expected)[where].item():.3g}"
        )


def assert_unbiased(
    actual: torch.Tensor, expected: torch.Tensor, *, deviations: float = 5.0, slack: float = 0.0
) -> None:
    """Fail unless about as many results lie above the reference as below it.

    Counted twice: by value, and by magnitude (truncation shortens both signs alike, so it shows
    only there). Equal elements are left out. Of the ``n`` others, the two counts may differ by
    ``deviations`` standard deviations of a fair coin, ``sqrt(n)``, plus ``slack * n``; the slack is
    for results whose errors are not independent.

    Raises:
        ValueError: Fewer than 100 elements differ, so that nothing could be shown.
    """
    actual, expected = actual.double(), expected.double()
    finite = actual.isfinite() & expected.isfinite()
    actual, expected = actual[finite], expected[finite]
    for what, difference in (
        ("value", actual - expected),
        ("magnitude", actual.abs() - expected.abs()),
    ):
        above, below = int((difference > 0).sum()), int((difference < 0).sum())
        total = above + below
        if total < 100:
            raise ValueError(f"expected: only {total} elements differ, allowed: 100 or more")
        allowed = deviations * math.sqrt(total) + slack * total
        assert abs(above - below) <= allowed, (
            f"biased in {what}: {above} above, {below} below, allowed difference {allowed:.0f}"
        )
