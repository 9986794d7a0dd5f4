"""What hyper-connections may be off by, against the definition in float64.

Each check takes the keywords of a call and what the call gave.
"""

from __future__ import annotations

import torch
from tolerance import assert_close_to_reference, unit_roundoff

M = 4
# Relative error with which the kernels take a number of the mapping.
MAPPING_ERROR = 2.0**-17


def define_post(x, residual, post_layer_mix, comb_res_mix):
    """New streams in float64, and the sum of the magnitudes of their terms."""
    x, residual = x.double().unsqueeze(-2), residual.double()
    post = post_layer_mix.double().reshape(*residual.shape[:-1], 1)
    comb = comb_res_mix.double().mT
    return post * x + comb @ residual, (post * x).abs() + comb.abs() @ residual.abs()


def define_mix(streams, fn, hc_scale, hc_base, rms_eps):
    """Logits in float64 (before sigmoid or softmax), and what rounding may have added to them."""
    flat, fn = streams.double().flatten(-2), fn.double()
    inverse = 1 / (flat.square().mean(-1, keepdim=True) + rms_eps).sqrt()
    outputs = fn.size(0)
    if hc_scale.numel() == 3:
        counts = torch.tensor([M, M, outputs - 2 * M], device=fn.device)
        hc_scale = hc_scale.repeat_interleave(counts)
    scale = hc_scale.double()
    logits = (flat @ fn.T) * inverse * scale + hc_base.double()
    gamma = (2 * flat.size(-1) + 40) * unit_roundoff(torch.float32)
    terms = (flat.abs() @ fn.abs().T) * inverse * scale.abs()
    return logits, (gamma + MAPPING_ERROR) * terms + 4 * 2.0**-24 * hc_base.double().abs()


def sinkhorn(logits, rounds, eps):
    mix = torch.exp(logits - logits.amax(-1, keepdim=True))
    mix = mix / mix.sum(-1, keepdim=True) + eps
    mix = mix / (mix.sum(-2, keepdim=True) + eps)
    for _ in range(rounds - 1):
        mix = mix / (mix.sum(-1, keepdim=True) + eps)
        mix = mix / (mix.sum(-2, keepdim=True) + eps)
    return mix


def _close(actual, expected, error, dtype, **more):
    """Within ``error``, an element each, and one rounding into ``dtype``."""
    assert_close_to_reference(
        actual, expected, dtype=dtype, reduction_length=1, scale=error * 2.0**24, **more
    )


def _fma(a, b, c):
    """``a * b + c``, rounded once, in float32. The product is exact in float64; that the sum is
    rounded there too changes one in some 2**28 results."""
    return (a.double() * b.double() + c.double()).float()


def round_post(x, residual, post_layer_mix, comb_res_mix):
    """New streams as a matrix product in float32 and PyTorch's operations after it round them."""
    post = post_layer_mix.reshape(*residual.shape[:-1], 1)
    weights, streams = comb_res_mix.mT.unsqueeze(-1), residual.float().unsqueeze(-3)
    old = weights[..., 0, :] * streams[..., 0, :]
    for stream in range(1, M):
        old = _fma(weights[..., stream, :], streams[..., stream, :], old)
    return (old + post * x.float().unsqueeze(-2)).to(torch.bfloat16)


def check_post(given, out) -> None:
    expected, terms = define_post(**given)
    assert out.is_contiguous()
    _close(out, expected, (M + 2) * 2.0**-24 * terms, torch.bfloat16)


def check_our_post(given, out) -> None:
    """As :func:`check_post`, to the last bit: other kernels may round elsewhere."""
    check_post(given, out)
    assert torch.equal(out, round_post(**given).reshape(out.shape))


def check_collapsed(streams, logits, error, eps, out, norm_weight=None, norm_eps=0.0) -> None:
    """The layer's input from the gates' logits (``[..., 4]``)."""
    streams = streams.double()
    gates = torch.sigmoid(logits)
    # The derivative of the sigmoid; 8 roundings more to the gate and the sum.
    gate_error = gates * (1 - gates) * error + 8 * 2.0**-24
    expected = ((gates + eps).unsqueeze(-1) * streams).sum(-2)
    allowed = ((gate_error + 8 * 2.0**-24 * gates).unsqueeze(-1) * streams.abs()).sum(-2)
    if norm_weight is None:
        _close(out, expected, allowed, torch.bfloat16)
        return
    weight = norm_weight.bfloat16().double()
    mean_square = expected.square().mean(-1, keepdim=True)
    factor = weight / (mean_square + norm_eps).sqrt()
    # The error of the mean square, and the rounding of the collapsed streams to bfloat16.
    off = (expected.abs() * allowed).mean(-1, keepdim=True) / (mean_square + norm_eps)
    off = off + expected.size(-1) * 2.0**-24
    rounded = unit_roundoff(torch.bfloat16) * (expected.abs() + allowed)
    allowed = (allowed + rounded + expected.abs() * off) * factor.abs()
    _close(out, expected * factor, allowed, torch.bfloat16)


def check_pre(given, results, streams=None) -> None:
    """``streams``: those that the logits were made of, where they are not ``residual``."""
    streams = given["residual"] if streams is None else streams
    post, comb, layer_input = results
    outer, hidden = streams.shape[:-2], streams.size(-1)
    assert post.shape == (*outer, M, 1)
    assert comb.shape == (*outer, M, M)
    assert layer_input.shape == (*outer, hidden)
    logits, error = define_mix(
        streams, *(given[name] for name in ("fn", "hc_scale", "hc_base", "rms_eps"))
    )
    value = given["hc_post_mult_value"]
    gate = torch.sigmoid(logits[..., M : 2 * M])
    allowed = gate * (1 - gate) * error[..., M : 2 * M] + 8 * 2.0**-24
    _close(post.squeeze(-1), value * gate, value * allowed, torch.float32)

    rounds, eps = given["sinkhorn_repeat"], given["hc_sinkhorn_eps"]
    expected = sinkhorn(logits[..., 2 * M :].unflatten(-1, (M, M)), rounds, eps)
    # The matrix is the exponentials times a factor a row and a factor a column. What a logit is off
    # by is in the exponential and in both factors, each of which is a quotient of sums: four times
    # covers it. 10 roundings a round.
    worst = error[..., 2 * M :].amax(-1)[..., None, None]
    allowed = (4 * worst + 10 * (rounds + 2) * 2.0**-24) * expected
    _close(comb, expected, allowed, torch.float32)

    check_collapsed(
        streams,
        logits[..., :M],
        error[..., :M],
        given["hc_pre_eps"],
        layer_input,
        given.get("norm_weight"),
        given.get("norm_eps", 1e-6),
    )


def check_fused(given, results) -> None:
    streams, *rest = results
    names = ("x", "residual", "post_layer_mix", "comb_res_mix")
    check_post({name: given[name] for name in names}, streams)
    check_pre(given, rest, streams)


def check_head(given, out) -> None:
    streams = given["hidden_states"]
    names = ("hc_fn", "hc_scale", "hc_base", "rms_norm_eps")
    logits, error = define_mix(streams, *(given[name] for name in names))
    check_collapsed(streams, logits, error, given["hc_eps"], out)


def check_prenorm_gemm(x, fn, out, sqrsum) -> None:
    n_splits = out.size(0)
    for split, (xs, fs) in enumerate(
        zip(x.double().chunk(n_splits, 1), fn.double().chunk(n_splits, 1), strict=True)
    ):
        gamma = (xs.size(1) + 1) * unit_roundoff(torch.float32)
        terms = xs.abs() @ fs.abs().T
        _close(out[split], xs @ fs.T, (gamma + MAPPING_ERROR) * terms, torch.float32)
        squares = xs.square().sum(1)
        _close(sqrsum[split], squares, gamma * squares, torch.float32)
