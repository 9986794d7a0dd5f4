"""What a sparse prefill with bfloat16 weights may be off by, against the definition in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from tolerance import assert_close_to_reference, unit_roundoff


def attend(q, keys, sink, scale):
    """The definition for one token, in float64.

    Args:
        q: ``[H, 512]``.
        keys: ``[n, 512]``, a key that is named twice twice.
        sink: ``[H]``.

    Returns:
        Result, sum of weighted magnitudes (both ``[H, 512]``), natural logarithm of the sum, and
        the largest sum of the magnitudes of a score's terms (both ``[H]``).
    """
    q, keys, sink = q.double(), keys.double(), sink.double()
    if len(keys) == 0:
        nothing = torch.zeros_like(q)
        return nothing, nothing, torch.full_like(sink, -math.inf), torch.zeros_like(sink)
    scores = scale * (q @ keys.T)
    lse = torch.logsumexp(scores, 1)
    weights = torch.exp(scores - torch.logaddexp(lse, sink).unsqueeze(1))
    terms = (abs(scale) * (q.abs() @ keys.abs().T)).amax(1)
    return weights @ keys, weights @ keys.abs(), lse, terms


def named_rows(indices, lens, t, rows):
    """Rows that token ``t`` names, in order: inside the length and inside the keys."""
    count = max(0, min(int(lens[t]), indices.shape[1]))
    named = indices[t, :count].long()
    return named[(named >= 0) & (named < rows)]


def check_token(q, keys, sink, scale, out, lse) -> None:
    """Fail unless one token's ``out`` (``[H, 512]``) and ``lse`` (``[H]`` or None) are right.

    The scores' roundings multiply the sum, as in the tests of the reference. The weights are
    rounded to bfloat16 once, and the keys are exact in bfloat16: one factor of each product is off
    by half an ulp of bfloat16.
    """
    expected, weighted, expected_lse, terms = attend(q, keys, sink, scale)
    length = 512 + len(keys) + 16
    gamma = length * unit_roundoff(torch.float32)
    assert_close_to_reference(
        out,
        expected,
        dtype=torch.bfloat16,
        reduction_length=length,
        scale=weighted * (1 + 2 * terms[:, None] + unit_roundoff(torch.bfloat16) / gamma),
    )
    if lse is not None:
        assert_close_to_reference(
            lse,
            expected_lse,
            dtype=torch.float32,
            reduction_length=length,
            scale=1 + terms + expected_lse.abs().nan_to_num(posinf=0.0),
        )
    if len(keys) == 0:
        assert torch.equal(out, torch.zeros_like(out)), "no key: exactly zero"


def check_tokens(q, kv, indices, lens, sink, scale, out, lse, tokens: Iterable[int]) -> None:
    """Fail unless the given tokens' rows of ``out`` and ``lse`` are right."""
    sink = sink[: q.shape[1]]
    for t in tokens:
        named = named_rows(indices, lens, t, len(kv))
        keys = kv[named] if len(named) else kv.new_empty(0, 512)
        check_token(q[t], keys, sink, scale, out[t], None if lse is None else lse[t])
