"""What a grouped FP8 einsum on a GPU's FP8 matrix instruction may be off by."""

from __future__ import annotations

import torch
from test_fp8_einsum import BLOCK
from tolerance import assert_close_to_reference

# Inputs that one matrix instruction multiplies and adds to its accumulator, on Hopper and SM12x.
_STEP = 32
# Bits that it keeps behind the leading one of its largest addend. Source: the technical report of
# DeepSeek-V3, section 3.3.2, which found about 14 bits in all on Hopper.
_KEPT_BITS = 13


def define(a, a_scale, b, b_scale):
    """The definition in float64, the sum of its terms' magnitudes, and what the instruction loses.

    Args:
        a: e4m3 ``[T, G, K]``; ``a_scale`` float32 ``[T, G, K / 128]``.
        b: e4m3 ``[G, N, K]``; ``b_scale`` float32 ``[G, N / 128, K / 128]``.

    Returns:
        Three float64 tensors ``[T, G, N]`` on the device of ``a``. The last: in each step of 32
        inputs, 33 addends (the accumulator is one) lose up to ``2**-13`` of the largest of them.
    """
    num_tokens, groups, k = a.shape
    n = b.shape[1]
    expected = torch.zeros(num_tokens, groups, n, dtype=torch.float64, device=a.device)
    magnitude, lost = torch.zeros_like(expected), torch.zeros_like(expected)
    for g in range(groups):
        for block in range(k // BLOCK):
            inner = slice(block * BLOCK, (block + 1) * BLOCK)
            x, w = a[:, g, inner].double(), b[g, :, inner].double()
            rows = b_scale[g, :, block].double().repeat_interleave(BLOCK)
            factor = a_scale[:, g, block].double()[:, None] * rows
            steps = torch.einsum(
                "tsk,nsk->tns", x.unflatten(1, (-1, _STEP)), w.unflatten(1, (-1, _STEP))
            )
            # Not less than the largest product, which is one of a token's and one of a row's.
            largest = x.abs().amax(1)[:, None] * w.abs().amax(1)
            largest = torch.maximum(largest, steps.cumsum(2).abs().amax(2))
            addends = BLOCK // _STEP * (_STEP + 1)
            expected[:, g] += steps.sum(2) * factor
            magnitude[:, g] += (x.abs() @ w.abs().T) * factor.abs()
            lost[:, g] += addends * 2.0**-_KEPT_BITS * largest * factor.abs()
    return expected, magnitude, lost


def check(a, a_scale, b, b_scale, out) -> None:
    """Fail unless ``out`` is within the bound, and all of it together close to rounding alone."""
    expected, magnitude, lost = define(a, a_scale, b, b_scale)
    length = a.size(2) + 2
    gamma = length * 2.0**-24
    assert_close_to_reference(
        out,
        expected,
        dtype=torch.bfloat16,
        reduction_length=length,
        scale=magnitude + lost / gamma,
    )
    # Rounding to bfloat16 alone leaves 2**-9 / sqrt(3), 0.0011, of uniform mantissas. Errors of
    # single addends do not add up in one direction, so that little comes on top.
    error = (out.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 2.0**-8, f"relative error of all results together: {error:.2g}"
