"""Routed experts with MXFP4 weights and bfloat16 activations (W4A16)."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from vllm_sm12x.implementation import Implementation, choose
from vllm_sm12x.ops import guards
from vllm_sm12x.ops.mxfp4_experts import reference
from vllm_sm12x.ops.mxfp4_experts.reference import BLOCK
from vllm_sm12x.ops.mxfp4_experts.routing import Align, align_block_size
from vllm_sm12x.ops.ue8m0 import DTYPES as SCALE_DTYPES

__all__ = ["dequantize_mxfp4", "mxfp4_experts"]

# What the kernels multiply the weights with. "bfloat16": the activations as they are. "float8":
# e4m3, one power of two a row, where there are many pairs of a token and an expert.
Activations = Literal["bfloat16", "float8"]


def dequantize_mxfp4(
    packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Decode MXFP4 (OCP Microscaling formats, v1.0): E2M1 values, 32 to a UE8M0 scale.

    A nibble is a sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6. Every product with a scale is exact in
    bfloat16 and float32, but for 2 and more times ``2**127``, which become infinite, and for the
    scale 255, which makes its whole block NaN.

    Args:
        packed: uint8 ``[..., N / 2]``; the low nibble of a byte is the value of even index.
        scale: UE8M0 as uint8 or float8_e8m0fnu, ``[..., N / 32]``.
        dtype: bfloat16 or float32.

    Returns:
        ``[..., N]`` of ``dtype``, contiguous.

    Raises:
        ValueError: A shape, dtype or device is not one of these.
    """
    guards.check_tensor("packed", packed)
    guards.check_tensor("scale", scale)
    guards.check_dtype("packed", packed, torch.uint8)
    guards.check_dtype("scale", scale, *SCALE_DTYPES)
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype: {dtype}, allowed: torch.bfloat16 or torch.float32")
    if packed.dim() == 0 or packed.size(-1) % (BLOCK // 2):
        raise ValueError(
            f"packed: shape {tuple(packed.shape)}, allowed: a last dimension that is a multiple of "
            f"{BLOCK // 2}"
        )
    guards.check_shape("scale", scale, (*packed.shape[:-1], packed.size(-1) * 2 // BLOCK))
    guards.check_same_device(packed=packed, scale=scale)
    return reference.dequantize_mxfp4(packed, scale, dtype)


def mxfp4_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    *,
    swiglu_limit: float | None = None,
    apply_router_weight_on_input: bool = False,
    expert_map: torch.Tensor | None = None,
    align: Align = align_block_size,
    activations: Activations = "bfloat16",
    implementation: Implementation | None = None,
) -> None:
    """Weighted sum over each token's experts of ``W2 (silu(gate) * up)``, ``[gate; up] = W13 x``.

    With T tokens, K experts a token, E experts here, hidden size H and intermediate size I (K = 6,
    E = 256, H = 4096 and I = 2048 in DeepSeek V4 Flash, the latter two before tensor parallelism).
    With a limit, ``gate`` is cut off above it, and ``up`` on both sides.

    Both products take bfloat16 values and sum in float32. Two things are rounded, each once, to
    bfloat16: ``silu(gate) * up`` before the second product, and the sum over the experts. The
    router's weights multiply in float32. Upstream's Marlin path also rounds ``gate``, ``up``, the
    router's weights and each expert's result to bfloat16, so that it agrees within those roundings.

    Args:
        hidden_states: bfloat16 ``[T, H]``, ``stride(-1) == 1``. T may be 0.
        w13: uint8 ``[E, 2 * I, H / 2]``, ``stride(-1) == 1``; I rows of the gate, then I of up. Two
            E2M1 values a byte, the low nibble the value of even index.
        w13_scale: UE8M0 as uint8 or float8_e8m0fnu, ``[E, 2 * I, H / 32]``.
        w2: uint8 ``[E, H, I / 2]``, packed likewise, ``stride(-1) == 1``.
        w2_scale: As ``w13_scale``, ``[E, H, I / 32]``.
        topk_weights: float32 ``[T, K]``, the router's weights.
        topk_ids: int32 or int64 ``[T, K]``, numbers of experts; the same may come twice. One that
            is negative or too large adds nothing (to raise would mean to wait for the device).
        out: bfloat16 ``[T, H]``, ``stride(-1) == 1``; written in full. It must not overlap
            ``hidden_states``.
        swiglu_limit: Positive, or ``None`` for no limit.
        apply_router_weight_on_input: Multiply the first product by the router's weights, and not
            the second.
        expert_map: int32 or int64 ``[experts in all]``, the index in the weights of each expert, or
            -1 for one that lives elsewhere and adds nothing. ``None``: ``topk_ids`` are indices.
        align: What sorts many pairs of a token and an expert into tiles (see
            :mod:`vllm_sm12x.ops.mxfp4_experts.routing`), such as vLLM's ``moe_align_block_size``.
            The reference does not use it.
        activations: ``"float8"`` rounds ``hidden_states`` and ``silu(gate) * up`` to e4m3 before
            the products, of rows that share a power of two. That is a relative error of up to
            ``2**-4`` a value, against ``2**-9`` of bfloat16. Weights stay exact unless the scales
            of a row are more than ``2**11`` apart: smaller groups then count as 0. Calls with at
            most 256 pairs of a token and an expert still take bfloat16: they are bound by the
            weights' bytes. It needs H and I that are multiples of 128. Without effect on the
            reference.
        implementation: As :func:`vllm_sm12x.implementation.choose` takes it. The kernels read
            ``hidden_states``, ``w13`` and ``w2`` 16 bytes at a time, so that their rows must begin
            at multiples of 16 bytes, and take scales of ``stride(-1) == 1``.

    Raises:
        ValueError: A shape, dtype, stride or device is not one of these, ``swiglu_limit`` is not
            positive, or ``implementation`` is unknown or has no kernel for the strides or device.
    """
    if activations not in get_args(Activations):
        allowed = ", ".join(get_args(Activations))
        raise ValueError(f"activations: {activations!r}, allowed: {allowed}")
    guards.check_tensor("hidden_states", hidden_states)
    form = choose("mxfp4_experts", implementation, hidden_states.is_cuda)
    tensors = {
        "hidden_states": hidden_states,
        "w13": w13,
        "w13_scale": w13_scale,
        "w2": w2,
        "w2_scale": w2_scale,
        "topk_weights": topk_weights,
        "topk_ids": topk_ids,
        "out": out,
    }
    for name, value in tensors.items():
        guards.check_tensor(name, value)
    integers = (torch.int32, torch.int64)
    guards.check_dtype("hidden_states", hidden_states, torch.bfloat16)
    guards.check_dtype("out", out, torch.bfloat16)
    guards.check_dtype("w13", w13, torch.uint8)
    guards.check_dtype("w13_scale", w13_scale, *SCALE_DTYPES)
    guards.check_dtype("w2", w2, torch.uint8)
    guards.check_dtype("w2_scale", w2_scale, *SCALE_DTYPES)
    guards.check_dtype("topk_weights", topk_weights, torch.float32)
    guards.check_dtype("topk_ids", topk_ids, *integers)

    sizes: dict[str, int] = {}
    guards.check_shape("hidden_states", hidden_states, ("T", "H"), sizes)
    guards.check_shape("out", out, ("T", "H"), sizes)
    guards.check_shape("topk_ids", topk_ids, ("T", "K"), sizes)
    guards.check_shape("topk_weights", topk_weights, ("T", "K"), sizes)
    guards.check_shape("w2", w2, ("E", "H", None), sizes)
    hidden, intermediate = sizes["H"], 2 * w2.size(2)
    for name, size in (("hidden_states: H", hidden), ("w2: I", intermediate)):
        if size == 0 or size % BLOCK:
            raise ValueError(f"{name} is {size}, allowed: positive multiples of {BLOCK}")
    for name, tensor, size in (("w2: E", w2, sizes["E"]), ("topk_ids: K", topk_ids, sizes["K"])):
        if size == 0:
            raise ValueError(f"{name} is 0 in shape {tuple(tensor.shape)}, allowed: 1 and more")
    guards.check_shape("w13", w13, ("E", 2 * intermediate, hidden // 2), sizes)
    guards.check_shape("w13_scale", w13_scale, ("E", 2 * intermediate, hidden // BLOCK), sizes)
    guards.check_shape("w2_scale", w2_scale, ("E", "H", intermediate // BLOCK), sizes)
    for name in ("hidden_states", "w13", "w2", "out"):
        guards.check_stride(name, tensors[name], -1, 1)
    if expert_map is not None:
        guards.check_tensor("expert_map", expert_map)
        guards.check_dtype("expert_map", expert_map, *integers)
        guards.check_shape("expert_map", expert_map, (None,))
        if expert_map.size(0) == 0:
            raise ValueError("expert_map: shape (0,), allowed: one entry an expert")
    if swiglu_limit is not None and not swiglu_limit > 0:
        raise ValueError(f"swiglu_limit: {swiglu_limit}, allowed: a positive number or None")
    guards.check_same_device(**tensors, expert_map=expert_map)
    arguments = (*tensors.values(), swiglu_limit, apply_router_weight_on_input, expert_map)
    if form == "reference":
        reference.mxfp4_experts(*arguments)
        return
    from vllm_sm12x.ops.mxfp4_experts import launch  # here, so that the rest needs no Triton

    launch.mxfp4_experts(*arguments, align, activations == "float8")
