"""The definition of the MXFP4 experts with activations of e4m3, in float64."""

from __future__ import annotations

import torch
from mxfp4_unpack import quantized
from test_mxfp4_experts import cut, decode, definition


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
