"""What the functions of this operation launch on a GPU; their checks came before.

Nothing here synchronises with the host, and what is allocated follows from shapes alone.
"""

from __future__ import annotations

import torch

from vllm_sm12x import lowering
from vllm_sm12x.ops.integers import cdiv, next_power_of_2
from vllm_sm12x.ops.launch_cache import launch
from vllm_sm12x.ops.launching import capability_of
from vllm_sm12x.ops.mhc.config import POST_TABLE, FinishConfig, MixConfig, PostConfig, configs
from vllm_sm12x.ops.mhc.kernel import (
    PRODUCTS,
    SQUARES,
    finish_kernel,
    halve_kernel,
    mix_kernel,
    post_kernel,
)

# Streams that the kernels are written for.
STREAMS = 4

# Columns a program of the kernel that halves the mapping, and its warps.
HALVE_BLOCK, HALVE_WARPS = 128, 4

Options = dict[str, object]
Configs = tuple[MixConfig, FinishConfig]


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
    config: Configs | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`vllm_sm12x.ops.mhc.mhc_pre`.

    Raises:
        ValueError: There are not four streams, or the tensors are on no GPU.
    """
    options, target = _options("residual", residual)
    *outer, _, hidden = residual.shape
    streams = residual.reshape(-1, STREAMS, hidden).contiguous()
    mix, finish = config or configs(target, len(streams))
    parts = _mix(streams, fn, mix, options)
    post, comb, layer_input = _finish(
        parts,
        hc_scale,
        hc_base,
        streams,
        (rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, norm_eps),
        sinkhorn_repeat,
        norm_weight,
        finish,
        options,
    )
    return (
        post.view(*outer, STREAMS, 1),
        comb.view(*outer, STREAMS, STREAMS),
        layer_input.view(*outer, hidden),
    )


def mhc_post(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
    config: PostConfig | None = None,
) -> torch.Tensor:
    """As :func:`vllm_sm12x.ops.mhc.mhc_post`.

    Raises:
        ValueError: There are not four streams, or the tensors are on no GPU.
    """
    options, target = _options("residual", residual)
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    hidden = residual.size(-1)
    tokens = out.numel() // (STREAMS * hidden)
    if tokens == 0:
        return out
    config = config or POST_TABLE[target]
    launch(
        post_kernel,
        (tokens, cdiv(hidden, config.block_h), 1),
        x.contiguous(),
        residual.contiguous(),
        post_layer_mix.contiguous(),
        comb_res_mix.contiguous(),
        out,
        HIDDEN=hidden,
        BLOCK_H=config.block_h,
        num_warps=config.num_warps,
        num_stages=1,
        **options,
    )
    return out


def mhc_fused_post_pre(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
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
    config: Configs | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`vllm_sm12x.ops.mhc.mhc_fused_post_pre`.

    Raises:
        ValueError: There are not four streams, or the tensors are on no GPU.
    """
    options, target = _options("residual", residual)
    *outer, _, hidden = residual.shape
    residual = residual.reshape(-1, STREAMS, hidden).contiguous()
    mix, finish = config or configs(target, len(residual))
    streams = torch.empty_like(residual)
    put_back = (x.contiguous(), post_layer_mix.contiguous(), comb_res_mix.contiguous(), streams)
    parts = _mix(residual, fn, mix, options, put_back)
    post, comb, layer_input = _finish(
        parts,
        hc_scale,
        hc_base,
        streams,
        (rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, norm_eps),
        sinkhorn_repeat,
        norm_weight,
        finish,
        options,
    )
    return (
        streams.view(*outer, STREAMS, hidden),
        post.view(*outer, STREAMS, 1),
        comb.view(*outer, STREAMS, STREAMS),
        layer_input.view(*outer, hidden),
    )


def hc_head(
    hidden_states: torch.Tensor,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_norm_eps: float,
    hc_eps: float,
    config: Configs | None = None,
) -> torch.Tensor:
    """As :func:`vllm_sm12x.ops.mhc.hc_head`.

    Raises:
        ValueError: There are not four streams, or the tensors are on no GPU.
    """
    options, target = _options("hidden_states", hidden_states)
    *outer, _, hidden = hidden_states.shape
    streams = hidden_states.reshape(-1, STREAMS, hidden).contiguous()
    mix, finish = config or configs(target, len(streams))
    parts = _mix(streams, hc_fn, mix, options)
    factors = (rms_norm_eps, hc_eps, 0.0, 0.0, 0.0)
    (out,) = _finish(parts, hc_scale, hc_base, streams, factors, 0, None, finish, options)
    return out.view(*outer, hidden)


def hc_prenorm_gemm(
    x: torch.Tensor,
    fn: torch.Tensor,
    out: torch.Tensor,
    sqrsum: torch.Tensor,
    config: MixConfig | None = None,
) -> None:
    """As :func:`vllm_sm12x.ops.mhc.hc_prenorm_gemm`; ``splits`` of the configuration do not count.

    Raises:
        ValueError: The tensors are on no GPU.
    """
    options, target = _options("x", x, None)
    n_splits, tokens, outputs = out.shape
    if 0 in (tokens, outputs, x.size(1)):
        out.zero_()
        sqrsum.zero_()
        return
    config = config or configs(target, tokens)[0]
    # Whole rows of the tile, so that its last columns lie inside too.
    block_out = max(8, next_power_of_2(outputs))
    fits = out.stride(-1) == 1 and outputs == block_out
    products = out if fits else out.new_empty(n_splits, tokens, block_out)
    # The part of each program is here the caller's.
    columns = x.size(1) // n_splits
    launch(
        mix_kernel,
        (n_splits, cdiv(tokens, config.block_t), 1),
        None,
        x.contiguous(),
        None,
        None,
        fn.contiguous(),
        None,
        products,
        products.stride(0),
        products.stride(1),
        sqrsum,
        *sqrsum.stride(),
        tokens,
        columns,
        HIDDEN=x.size(1),
        STREAMS=1,
        OUTPUTS=outputs,
        BLOCK_OUT=block_out,
        BLOCK_T=config.block_t,
        BLOCK_H=config.block_h,
        HAS_POST=False,
        EVEN=columns % config.block_h == 0,
        ONE_STEP=False,
        HALVED=False,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
    if products is not out:
        out.copy_(products[..., :outputs])


def _options(name: str, tensor: torch.Tensor, streams: int | None = STREAMS) -> tuple[Options, str]:
    """What every launch takes besides its arguments, and the table's key.

    Raises:
        ValueError: There are not as many streams, or the tensor is on no GPU.
    """
    if streams is not None and tensor.size(-2) != streams:
        raise ValueError(
            f"{name}: {tensor.size(-2)} streams, allowed in the Triton kernels: {streams}"
        )
    capability = capability_of(name, tensor, "Triton kernels")
    overlap = lowering.launches_overlap(capability)
    options = lowering.launch_options(capability)
    if overlap:
        options = {**options, "launch_pdl": True}
    return {**options, "OVERLAP": overlap}, lowering.target_key(capability)


def _mix(
    residual: torch.Tensor,
    fn: torch.Tensor,
    config: MixConfig,
    options: Options,
    put_back: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Parts of the squares and products: float32 ``[T, splits, width]``, as the kernel has them."""
    tokens, _, hidden = residual.shape
    outputs = fn.size(0)
    width = next_power_of_2(PRODUCTS + outputs)
    splits = max(1, min(config.splits, hidden // config.block_h))
    columns = cdiv(hidden, splits * config.block_h) * config.block_h
    splits = cdiv(hidden, columns)
    parts = torch.empty(tokens, splits, width, dtype=torch.float32, device=residual.device)
    if tokens == 0:
        return parts
    x, post, comb, streams = put_back or (None,) * 4
    even = hidden % columns == 0
    block_out = max(8, next_power_of_2(outputs))
    fn = fn.contiguous()
    halved = config.halved and even
    if halved:
        fn = _halve(fn, block_out, options)
    launch(
        mix_kernel,
        (splits, cdiv(tokens, config.block_t), 1),
        x,
        residual,
        post,
        comb,
        fn,
        streams,
        parts[:, :, PRODUCTS:],
        parts.stride(1),
        parts.stride(0),
        parts[:, :, SQUARES:],
        parts.stride(1),
        parts.stride(0),
        tokens,
        columns,
        HIDDEN=hidden,
        STREAMS=STREAMS,
        OUTPUTS=outputs,
        BLOCK_OUT=block_out,
        BLOCK_T=config.block_t,
        BLOCK_H=config.block_h,
        HAS_POST=put_back is not None,
        EVEN=even,
        ONE_STEP=even and not halved and columns == config.block_h,
        HALVED=halved,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
    return parts


def _halve(fn: torch.Tensor, block_out: int, options: Options) -> torch.Tensor:
    """The mapping as a sum of two in bfloat16: ``[2, block_out, columns]``."""
    outputs, columns = fn.shape
    halves = torch.empty(2, block_out, columns, dtype=torch.bfloat16, device=fn.device)
    launch(
        halve_kernel,
        (cdiv(columns, HALVE_BLOCK), 1, 1),
        fn,
        halves,
        COLUMNS=columns,
        OUTPUTS=outputs,
        BLOCK_OUT=block_out,
        BLOCK_H=HALVE_BLOCK,
        num_warps=HALVE_WARPS,
        num_stages=1,
        **options,
    )
    return halves


def _finish(
    parts: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    streams: torch.Tensor,
    factors: tuple[float, float, float, float, float],
    rounds: int,
    norm_weight: torch.Tensor | None,
    config: FinishConfig,
    options: Options,
) -> tuple[torch.Tensor, ...]:
    """Post weights, mix matrices (both only with ``rounds``) and layer inputs.

    Args:
        factors: Epsilons of the mean square, the gates and the iteration, the factor of the post
            weights, and the epsilon of the norm.
    """
    tokens, _, hidden = streams.shape
    _, splits, width = parts.shape
    out = streams.new_empty(tokens, hidden)
    post = comb = None
    mix_programs = 0
    if rounds:
        post = parts.new_empty(tokens, STREAMS)
        comb = parts.new_empty(tokens, STREAMS, STREAMS)
        mix_programs = cdiv(tokens, config.mix_t)
    results = (out,) if post is None or comb is None else (post, comb, out)
    if tokens == 0:
        return results
    if norm_weight is not None:
        norm_weight = norm_weight.to(torch.bfloat16).contiguous()
    launch(
        finish_kernel,
        (mix_programs + tokens, 1, 1),
        parts,
        scale.contiguous(),
        base.contiguous(),
        streams,
        norm_weight,
        post,
        comb,
        out,
        tokens,
        splits,
        rounds,
        *factors,
        HIDDEN=hidden,
        BLOCK_H=next_power_of_2(hidden),
        OUTPUTS=base.size(0),
        WIDTH=width,
        SPLIT_SLOTS=next_power_of_2(splits),
        MIX_T=config.mix_t,
        HAS_MIXES=bool(rounds),
        num_warps=config.num_warps,
        num_stages=1,
        **options,
    )
    return results
