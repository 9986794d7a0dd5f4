"""The definition of the MXFP4 experts with activations of e4m3, in float64."""

from __future__ import annotations

import torch
from mxfp4_unpack import in_order, quantized
from test_mxfp4_experts import cut, decode, definition

from vllm_sm12x.ops.mxfp4_experts import launch, mxfp4_experts

# FP8 matrix instructions are known to sum with 13 bits of mantissa on Ada and Hopper. Where 32
# products and the sum so far are cut off at 2**-13 of the largest, which is at most some ten times
# the root of their mean square, n products have a relative error of about 2**-13 * sqrt(n / 32) *
# sqrt(33) * 10 / sqrt(n), or 2**-9.6 with the cut's mean counted twice; bfloat16 rounds by 2**-9.3.
SUMS = 2.0**-9


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def float8_definition(
    arguments: list, *, limit: float | None = None, on_input: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """With both operands of activations rounded, and with neither."""
    x, w13, w13_scale, w2, w2_scale, weights, ids, _ = arguments
    w13, w2 = decode(w13, w13_scale), decode(w2, w2_scale)
    rows = quantized(x)
    expected = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(ids.size(0)):
        for k in range(ids.size(1)):
            expert, weight = int(ids[t, k]), weights[t, k].double()
            gate, up = (w13[expert] @ rows[t] * (weight if on_input else 1.0)).chunk(2)
            gate, up = cut(gate, limit), cut(up, limit, both=True)
            activation = (gate / (1 + torch.exp(-gate)) * up).bfloat16()
            result = w2[expert] @ quantized(activation[None])[0]
            expected[t] += result if on_input else weight * result
    exact, _ = definition(*arguments[:7], limit=limit, on_input=on_input)
    return expected, exact


def check_stages(monkeypatch, given: list, *, limit: float) -> None:
    """Run the kernels, and check each stage against the definition of what the one before gave.

    Each stage's bound is its own: of the whole, one unit in the last place before a rounding to
    e4m3 becomes a step of 2**-3, so that the noise of the sums comes out many times as large.
    """
    product, calls = launch._product, []

    def recorded(operand, weight, out, *arguments):
        product(operand, weight, out, *arguments)
        values, scale = (tensor.cpu() for tensor in operand)
        calls.append((in_order(values).double() * scale.double()[:, None], out.cpu()))

    with monkeypatch.context() as patch:
        patch.setattr(launch, "_product", recorded)
        mxfp4_experts(*given, swiglu_limit=limit, activations="float8", implementation="triton")
    (rows, activation), (activation_rows, result) = calls
    x, w13, w13_scale, w2, w2_scale, weights, ids, out = (tensor.cpu() for tensor in given)
    assert torch.equal(rows, quantized(x))
    assert torch.equal(activation_rows, quantized(activation))
    w13, w2 = decode(w13, w13_scale), decode(w2, w2_scale)
    expert, token = ids.flatten(), torch.arange(ids.numel()) // ids.size(1)
    first = torch.empty(activation.shape, dtype=torch.float64)
    second = torch.empty(result.shape, dtype=torch.float64)
    for e in expert.unique().tolist():
        of = expert == e
        gate, up = (rows[token[of]] @ w13[e].T).chunk(2, 1)
        gate, up = cut(gate, limit), cut(up, limit, both=True)
        first[of] = gate / (1 + torch.exp(-gate)) * up
        second[of] = activation_rows[of] @ w2[e].T
    assert relative_error(activation, first) < 2 * SUMS
    assert relative_error(result, second) < SUMS
    terms = weights.double()[..., None] * result.double().unflatten(0, ids.shape)
    # A float32 sum, rounded to bfloat16.
    bound = 2.0**-8 * terms.sum(1).abs() + ids.size(1) * 2.0**-23 * terms.abs().sum(1)
    assert ((out.double() - terms.sum(1)).abs() <= bound * (1 + 2.0**-8)).all()
