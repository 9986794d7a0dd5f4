"""Manifold-constrained hyper-connections (mHC): several residual streams beside each layer.

``mhc_pre`` collapses the streams into a layer's input and gives the weights with which ``mhc_post``
puts the layer's output back; ``hc_head`` collapses them at the end of the model. Names, arguments
and results are those of vLLM's ``model_executor/layers/mhc.py``, whose TileLang kernels are the
source of the maths. M below is the number of streams (4 in DeepSeek V4 Flash), H the hidden size
(4096), ``...`` any leading dimensions, of which any may be 0.

All arithmetic is in float32. What is rounded to bfloat16, as in those kernels: the streams that
``mhc_post`` gives (``mhc_fused_post_pre`` goes on from the rounded streams), and the layer's input.
With a norm, the collapsed streams are rounded before they are normalised, while their mean square
is taken before that rounding; then the product is rounded once more.
"""

from __future__ import annotations

from types import ModuleType

import torch

from vllm_sm12x.implementation import Implementation, choose
from vllm_sm12x.ops import guards
from vllm_sm12x.ops.mhc import reference


def _form(implementation: Implementation | None, tensor: torch.Tensor) -> ModuleType:
    """The module whose functions a call takes."""
    if choose("mhc", implementation, tensor.is_cuda) == "reference":
        return reference
    from vllm_sm12x.ops.mhc import launch  # here, so that the rest needs no Triton

    return launch


def _check_streams(name: str, streams: torch.Tensor) -> tuple[list[int], int, int]:
    guards.check_tensor(name, streams)
    guards.check_dtype(name, streams, torch.bfloat16)
    if streams.dim() < 2 or 0 in streams.shape[-2:]:
        raise ValueError(
            f"{name}: shape {tuple(streams.shape)}, allowed: (..., hc_mult, hidden_size), "
            f"the last two not 0"
        )
    *outer, hc_mult, hidden_size = streams.shape
    return outer, hc_mult, hidden_size


def _check_mapping(
    residual: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    sinkhorn_repeat: int,
    norm_weight: torch.Tensor | None,
) -> None:
    _, hc_mult, hidden_size = _check_streams("residual", residual)
    rows = hc_mult * (2 + hc_mult)
    given = {"fn": fn, "hc_scale": hc_scale, "hc_base": hc_base}
    shapes = {"fn": (rows, hc_mult * hidden_size), "hc_scale": (3,), "hc_base": (rows,)}
    for name, tensor in given.items():
        guards.check_tensor(name, tensor)
        guards.check_dtype(name, tensor, torch.float32)
        guards.check_shape(name, tensor, shapes[name])
    if norm_weight is not None:
        guards.check_tensor("norm_weight", norm_weight)
        guards.check_dtype("norm_weight", norm_weight, torch.bfloat16, torch.float32)
        guards.check_shape("norm_weight", norm_weight, (hidden_size,))
    if sinkhorn_repeat < 1:
        raise ValueError(f"sinkhorn_repeat: {sinkhorn_repeat}, allowed: 1 and more")
    guards.check_same_device(residual=residual, **given, norm_weight=norm_weight)


def _check_post(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
) -> None:
    outer, hc_mult, hidden_size = _check_streams("residual", residual)
    guards.check_tensor("x", x)
    guards.check_tensor("post_layer_mix", post_layer_mix)
    guards.check_tensor("comb_res_mix", comb_res_mix)
    guards.check_dtype("x", x, torch.bfloat16)
    guards.check_dtype("post_layer_mix", post_layer_mix, torch.float32)
    guards.check_dtype("comb_res_mix", comb_res_mix, torch.float32)
    guards.check_shape("x", x, (*outer, hidden_size))
    post_shape = (*outer, hc_mult)
    if post_layer_mix.dim() > len(post_shape):
        post_shape = (*post_shape, 1)
    guards.check_shape("post_layer_mix", post_layer_mix, post_shape)
    guards.check_shape("comb_res_mix", comb_res_mix, (*outer, hc_mult, hc_mult))
    guards.check_same_device(
        residual=residual, x=x, post_layer_mix=post_layer_mix, comb_res_mix=comb_res_mix
    )


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
    n_splits: int = 1,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    *,
    implementation: Implementation | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights of the streams from the streams, and the input of the layer that follows.

    The mix logits are ``fn`` times the flattened streams, divided by the root of their mean square.
    Their first M, times ``hc_scale[0]`` plus ``hc_base``, give ``sigmoid(.) + hc_pre_eps``: the
    weights of the sum that is the layer's input. The next M, with ``hc_scale[1]``, give
    ``hc_post_mult_value * sigmoid(.)``. The last M x M, with ``hc_scale[2]``, become a matrix with
    rows and columns of sum 1 by Sinkhorn's iteration: softmax of the rows plus eps, then columns,
    and ``sinkhorn_repeat - 1`` times rows and columns, divided by their sum plus eps.

    Args:
        residual: bfloat16 ``[..., M, H]``.
        fn: float32 ``[M * (2 + M), M * H]``.
        hc_scale: float32 ``[3]``.
        hc_base: float32 ``[M * (2 + M)]``.
        sinkhorn_repeat: Rounds of the iteration, at least 1.
        n_splits: A launch parameter of upstream's kernels; it does not change the result.
        norm_weight: bfloat16 or float32 ``[H]`` (used as bfloat16): apply RMSNorm to the layer's
            input. ``None``: do not.
        norm_eps: Of that norm.
        implementation: As :func:`vllm_sm12x.implementation.choose` takes it. The kernels take four
            streams, and each number of ``fn`` with a relative error of up to ``2**-17``. Tensors
            that are not contiguous are copied first.

    Returns:
        ``post_mix`` float32 ``[..., M, 1]``, ``comb_mix`` float32 ``[..., M, M]`` and
        ``layer_input`` bfloat16 ``[..., H]``.

    Raises:
        ValueError: A shape, dtype or device is not one of these, ``sinkhorn_repeat`` is below 1, or
            ``implementation`` is unknown or has no kernel for the number of streams.
    """
    _check_mapping(residual, fn, hc_scale, hc_base, sinkhorn_repeat, norm_weight)
    return _form(implementation, residual).mhc_pre(
        residual,
        fn,
        hc_scale,
        hc_base,
        rms_eps,
        hc_pre_eps,
        hc_sinkhorn_eps,
        hc_post_mult_value,
        sinkhorn_repeat,
        norm_weight,
        norm_eps,
    )


def mhc_post(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
    *,
    implementation: Implementation | None = None,
) -> torch.Tensor:
    """``out[j] = post_layer_mix[j] * x + sum_i comb_res_mix[i, j] * residual[i]``, a token.

    Args:
        x: bfloat16 ``[..., H]``, the layer's output.
        residual: bfloat16 ``[..., M, H]``.
        post_layer_mix: float32 ``[..., M, 1]`` or ``[..., M]``.
        comb_res_mix: float32 ``[..., M, M]``, its first index the stream that is read.
        implementation: As in :func:`mhc_pre`.

    Returns:
        bfloat16 ``[..., M, H]``, contiguous.

    Raises:
        ValueError: A shape, dtype or device is not one of these.
    """
    _check_post(x, residual, post_layer_mix, comb_res_mix)
    return _form(implementation, residual).mhc_post(x, residual, post_layer_mix, comb_res_mix)


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
    n_splits: int = 1,
    tile_n: int = 1,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    *,
    implementation: Implementation | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`mhc_post`, then :func:`mhc_pre` of its result; the arguments are theirs.

    Upstream's kernel for up to 16 tokens takes the logits from the streams before they are rounded;
    here, as in upstream's other path, they come from the rounded streams at every size.

    Args:
        n_splits: As in :func:`mhc_pre`.
        tile_n: A launch parameter of upstream's kernels; it does not change the result.
        implementation: As in :func:`mhc_pre`.

    Returns:
        The new streams, bfloat16 ``[..., M, H]``, then what :func:`mhc_pre` gives.

    Raises:
        ValueError: As in those two.
    """
    _check_post(x, residual, post_layer_mix, comb_res_mix)
    _check_mapping(residual, fn, hc_scale, hc_base, sinkhorn_repeat, norm_weight)
    return _form(implementation, residual).mhc_fused_post_pre(
        x,
        residual,
        post_layer_mix,
        comb_res_mix,
        fn,
        hc_scale,
        hc_base,
        rms_eps,
        hc_pre_eps,
        hc_sinkhorn_eps,
        hc_post_mult_value,
        sinkhorn_repeat,
        norm_weight,
        norm_eps,
    )


def hc_head(
    hidden_states: torch.Tensor,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_norm_eps: float,
    hc_eps: float,
    *,
    implementation: Implementation | None = None,
) -> torch.Tensor:
    """Collapse the streams at the end of the model: a sum with weights ``sigmoid(.) + hc_eps``.

    Args:
        hidden_states: bfloat16 ``[..., M, H]``.
        hc_fn: float32 ``[M, M * H]``, applied to the RMS-normalised flattened streams.
        hc_scale: float32 ``[1]``, times the logits.
        hc_base: float32 ``[M]``, added to them.
        implementation: As in :func:`mhc_pre`.

    Returns:
        bfloat16 ``[..., H]``.

    Raises:
        ValueError: A shape, dtype or device is not one of these.
    """
    _, hc_mult, hidden_size = _check_streams("hidden_states", hidden_states)
    given = {"hc_fn": hc_fn, "hc_scale": hc_scale, "hc_base": hc_base}
    shapes = {"hc_fn": (hc_mult, hc_mult * hidden_size), "hc_scale": (1,), "hc_base": (hc_mult,)}
    for name, tensor in given.items():
        guards.check_tensor(name, tensor)
        guards.check_dtype(name, tensor, torch.float32)
        guards.check_shape(name, tensor, shapes[name])
    guards.check_same_device(hidden_states=hidden_states, **given)
    return _form(implementation, hidden_states).hc_head(
        hidden_states, hc_fn, hc_scale, hc_base, rms_norm_eps, hc_eps
    )


def hc_prenorm_gemm(
    x: torch.Tensor,
    fn: torch.Tensor,
    out: torch.Tensor,
    sqrsum: torch.Tensor,
    n_splits: int = 1,
    *,
    implementation: Implementation | None = None,
) -> None:
    """Mix logits and squared norms of the flattened streams, in parts over the inner dimension.

    Part ``s`` covers columns ``[s * K / n_splits, (s + 1) * K / n_splits)``; the sums over the
    parts are ``x @ fn.T`` and the squared norms. Source: DeepGEMM's ``tf32_hc_prenorm_gemm``, here
    in float32.

    Args:
        x: bfloat16 ``[T, K]``.
        fn: float32 ``[N, K]``.
        out: float32 ``[n_splits, T, N]``; written in full.
        sqrsum: float32 ``[n_splits, T]``; written in full.
        n_splits: Number of parts; it must divide K.
        implementation: As in :func:`mhc_pre`, for any number of streams.

    Raises:
        ValueError: A shape, dtype or device is not one of these.
    """
    tensors = {"x": x, "fn": fn, "out": out, "sqrsum": sqrsum}
    for name, tensor in tensors.items():
        guards.check_tensor(name, tensor)
        guards.check_dtype(name, tensor, torch.bfloat16 if name == "x" else torch.float32)
    sizes: dict[str, int] = {}
    guards.check_shape("x", x, ("T", "K"), sizes)
    guards.check_shape("fn", fn, ("N", "K"), sizes)
    if n_splits < 1 or sizes["K"] % n_splits:
        raise ValueError(f"n_splits: {n_splits}, allowed: divisors of K={sizes['K']}")
    guards.check_shape("out", out, (n_splits, "T", "N"), sizes)
    guards.check_shape("sqrsum", sqrsum, (n_splits, "T"), sizes)
    guards.check_same_device(**tensors)
    _form(implementation, x).hc_prenorm_gemm(x, fn, out, sqrsum)
