"""The yardstick itself: it passes correct rounding and fails what is wrong."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close_to_reference, assert_unbiased, error_bound


def exact(n: int = 4096, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_bound_of_one_rounding_by_hand():
    bound = error_bound(
        torch.tensor([1.0, -2.0]), dtype=torch.bfloat16, reduction_length=0, scale=1.0
    )
    subnormal = 2.0**-133
    assert bound.tolist() == [2.0**-8 + subnormal, 2.0**-7 + subnormal]


def test_the_bound_of_a_reduction_by_hand():
    bound = error_bound(torch.zeros(1), dtype=torch.float32, reduction_length=1 << 22, scale=3.0)
    gamma = 0.25 / 0.75
    assert bound.item() == pytest.approx(3.0 * gamma * (1 + 2.0**-24), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_to_nearest_passes(dtype):
    expected = exact()
    actual = expected.to(dtype)
    assert_close_to_reference(actual, expected, dtype=dtype, reduction_length=1)
    assert_unbiased(actual, expected)


def test_a_long_float32_sum_passes():
    terms = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(64)
    for column in terms.unbind(1):
        total = total + column
    assert_close_to_reference(
        total,
        terms.double().sum(1),
        dtype=torch.float32,
        reduction_length=4096,
        scale=terms.double().abs().sum(1),
    )


def test_one_wrong_element_fails_and_is_named():
    expected = exact()
    actual = expected.to(torch.bfloat16)
    actual[77] = expected[77].item() * 1.02
    with pytest.raises(AssertionError, match=r"1 of 4096 .*\(77,\)"):
        assert_close_to_reference(
            actual, expected, dtype=torch.bfloat16, reduction_length=1, scale=1.0
        )


def test_nan_fails():
    expected = exact()
    actual = expected.float()
    actual[3] = float("nan")
    with pytest.raises(AssertionError, match=r"\(3,\)"):
        assert_close_to_reference(actual, expected, dtype=torch.float32, reduction_length=1)


def test_infinities_must_match():
    expected = torch.tensor([1.0, -float("inf")], dtype=torch.float64)
    assert_close_to_reference(expected.float(), expected, dtype=torch.float32, reduction_length=1)
    for wrong in (float("inf"), -3e38, float("nan")):
        with pytest.raises(AssertionError, match="infinity"):
            assert_close_to_reference(
                torch.tensor([1.0, wrong]), expected, dtype=torch.float32, reduction_length=1
            )


def test_truncation_and_a_shift_are_biased():
    expected = exact()
    truncated = (expected.float().view(torch.int32) & -65536).view(torch.float32)
    with pytest.raises(AssertionError, match="magnitude"):
        assert_unbiased(truncated, expected)
    with pytest.raises(AssertionError, match="value"):
        assert_unbiased(expected + 1e-9, expected)


def test_too_few_differences_show_nothing():
    expected = exact()
    with pytest.raises(ValueError, match="100 or more"):
        assert_unbiased(expected, expected)
