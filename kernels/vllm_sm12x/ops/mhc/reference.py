"""Definitions, in PyTorch, for CPU and GPU; safe under CUDA-graph capture.

All arithmetic is in float32. PyTorch's default precision of float32 products is full; whoever
lowers it for the process (``set_float32_matmul_precision``) lets TF32 into the mix logits too.
"""

from __future__ import annotations

import torch

# Bound of the float32 copies of the residual streams alive at a time. A single token is taken even
# where it is larger.
SCRATCH_BUDGET_BYTES = 256 * 2**20

# Copies of a token's streams that a step holds at once: the float32 streams, and a product of their
# size with the result that replaces it.
_COPIES = 3

_FLOAT32_BYTES = 4


def token_chunk(num_tokens: int, hc_mult: int, hidden_size: int) -> int:
    per_token = _COPIES * hc_mult * hidden_size * _FLOAT32_BYTES
    return max(1, min(num_tokens, SCRATCH_BUDGET_BYTES // per_token))


def scratch_bytes(num_tokens: int, hc_mult: int, hidden_size: int) -> int:
    """Bytes of float32 copies that a call of this size holds."""
    per_token = _COPIES * hc_mult * hidden_size * _FLOAT32_BYTES
    return token_chunk(num_tokens, hc_mult, hidden_size) * per_token


def _token_slices(num_tokens: int, hc_mult: int, hidden_size: int) -> list[slice]:
    step = token_chunk(num_tokens, hc_mult, hidden_size)
    return [slice(start, start + step) for start in range(0, num_tokens, step)]


def hc_prenorm_gemm(
    x: torch.Tensor, fn: torch.Tensor, out: torch.Tensor, sqrsum: torch.Tensor
) -> None:
    n_splits = out.size(0)
    width = x.size(1) // n_splits
    for tokens in _token_slices(x.size(0), 1, x.size(1)):
        for split in range(n_splits):
            columns = slice(split * width, (split + 1) * width)
            part = x[tokens, columns].to(torch.float32)
            out[split, tokens] = part @ fn[:, columns].t()
            sqrsum[split, tokens] = part.square().sum(dim=-1)


def sinkhorn(logits: torch.Tensor, repeat: int, eps: float) -> torch.Tensor:
    """Softmax of the rows, then columns and rows in turn divided by their sums, columns last."""
    mix = torch.softmax(logits, dim=-1) + eps
    mix = mix / (mix.sum(dim=-2, keepdim=True) + eps)
    for _ in range(repeat - 1):
        mix = mix / (mix.sum(dim=-1, keepdim=True) + eps)
        mix = mix / (mix.sum(dim=-2, keepdim=True) + eps)
    return mix


def _normalized_logits(streams: torch.Tensor, fn: torch.Tensor, rms_eps: float) -> torch.Tensor:
    """``fn`` times the RMS-normalised streams. The norm is a factor a token, so it comes last."""
    flat = streams.flatten(1)
    mean_square = flat.square().mean(dim=-1, keepdim=True)
    return (flat @ fn.t()) * torch.rsqrt(mean_square + rms_eps)


def _weighted_sum(streams: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    return (streams * gates.unsqueeze(-1)).sum(dim=1)


def mhc_pre(
    residual: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *outer, hc_mult, hidden_size = residual.shape
    residual = residual.reshape(-1, hc_mult, hidden_size)
    num_tokens = residual.size(0)
    if norm_weight is not None:
        norm_weight = norm_weight.to(torch.bfloat16).to(torch.float32)

    post_mix = fn.new_empty(num_tokens, hc_mult)
    comb_mix = fn.new_empty(num_tokens, hc_mult, hc_mult)
    layer_input = residual.new_empty(num_tokens, hidden_size)
    for tokens in _token_slices(num_tokens, hc_mult, hidden_size):
        streams = residual[tokens].to(torch.float32)
        logits = _normalized_logits(streams, fn, rms_eps)
        pre, post, comb = logits.split([hc_mult, hc_mult, hc_mult * hc_mult], dim=-1)
        pre_base, post_base, comb_base = hc_base.split([hc_mult, hc_mult, hc_mult * hc_mult])

        pre = torch.sigmoid(pre * hc_scale[0] + pre_base) + hc_pre_eps
        post_mix[tokens] = torch.sigmoid(post * hc_scale[1] + post_base) * hc_post_mult_value
        comb = (comb * hc_scale[2] + comb_base).unflatten(-1, (hc_mult, hc_mult))
        comb_mix[tokens] = sinkhorn(comb, sinkhorn_repeat, hc_sinkhorn_eps)

        collapsed = _weighted_sum(streams, pre)
        if norm_weight is not None:
            rms = torch.rsqrt(collapsed.square().mean(dim=-1, keepdim=True) + norm_eps)
            collapsed = collapsed.to(torch.bfloat16).to(torch.float32) * rms * norm_weight
        layer_input[tokens] = collapsed
    return (
        post_mix.view(*outer, hc_mult, 1),
        comb_mix.view(*outer, hc_mult, hc_mult),
        layer_input.view(*outer, hidden_size),
    )


def mhc_post(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
) -> torch.Tensor:
    *outer, hc_mult, hidden_size = residual.shape
    x = x.reshape(-1, hidden_size)
    residual = residual.reshape(-1, hc_mult, hidden_size)
    post_layer_mix = post_layer_mix.reshape(-1, hc_mult, 1)
    comb_res_mix = comb_res_mix.reshape(-1, hc_mult, hc_mult)

    out = residual.new_empty(residual.shape)
    for tokens in _token_slices(residual.size(0), hc_mult, hidden_size):
        mixed = torch.bmm(comb_res_mix[tokens].mT, residual[tokens].to(torch.float32))
        placed = post_layer_mix[tokens] * x[tokens].to(torch.float32).unsqueeze(1)
        out[tokens] = mixed.add_(placed)
    return out.view(*outer, hc_mult, hidden_size)


def mhc_fused_post_pre(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
    *mapping_and_rest: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`mhc_post`, then :func:`mhc_pre` of its result; the last arguments are the latter's."""
    streams = mhc_post(x, residual, post_layer_mix, comb_res_mix)
    return streams, *mhc_pre(streams, *mapping_and_rest)


def hc_head(
    hidden_states: torch.Tensor,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_norm_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    *outer, hc_mult, hidden_size = hidden_states.shape
    hidden_states = hidden_states.reshape(-1, hc_mult, hidden_size)
    out = hidden_states.new_empty(hidden_states.size(0), hidden_size)
    for tokens in _token_slices(hidden_states.size(0), hc_mult, hidden_size):
        streams = hidden_states[tokens].to(torch.float32)
        logits = _normalized_logits(streams, hc_fn, rms_norm_eps)
        out[tokens] = _weighted_sum(streams, torch.sigmoid(logits * hc_scale + hc_base) + hc_eps)
    return out.view(*outer, hidden_size)
