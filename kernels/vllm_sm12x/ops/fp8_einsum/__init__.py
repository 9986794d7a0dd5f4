"""Grouped FP8 product of the attention output with the first output projection."""

from __future__ import annotations

import torch

from vllm_sm12x.implementation import Implementation, choose
from vllm_sm12x.ops import guards
from vllm_sm12x.ops.fp8_einsum import reference
from vllm_sm12x.ops.fp8_einsum.reference import BLOCK


def fp8_einsum_bhr_hdr(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out: torch.Tensor,
    *,
    implementation: Implementation | None = None,
) -> None:
    """``out[t, g, n] = sum_k a[t, g, k] * b[g, n, k]`` over block-scaled FP8 operands.

    With T tokens, G groups, K inputs and N outputs a group (4096 and 1024 in DeepSeek V4 Flash).
    A scale multiplies the 128 values of its block along K; those of ``b`` also cover 128 rows.
    Products are summed in float32 and rounded once, to bfloat16. Source: DeepGEMM's
    ``fp8_einsum("bhr,hdr->bhd")`` with 128 x 128 weight blocks, as vLLM calls it.

    Args:
        a: float8_e4m3fn ``[T, G, K]``, ``stride(-1) == 1``, other strides free (the engine stores
            the groups outermost). T may be 0.
        a_scale: float32 ``[T, G, K / 128]``, any strides.
        b: float8_e4m3fn ``[G * N, K]`` or ``[G, N, K]``, ``stride(-1) == 1``.
        b_scale: float32, or UE8M0 as float8_e8m0fnu or uint8; ``[G * N / 128, K / 128]`` or
            ``[G, N / 128, K / 128]``, any strides.
        out: bfloat16 ``[T, G, N]``, any strides; written in full.
        implementation: As :func:`vllm_sm12x.implementation.choose` takes it. The kernel multiplies
            in FP8, without a copy of the operands, and allocates nothing. It sums 128 products at a
            time as the GPU's FP8 matrix instruction does, which may keep fewer bits than float32
            has, and those sums in float32.

    Raises:
        ValueError: A shape, dtype, stride or device is not one of these, or ``implementation`` is
            unknown.
    """
    tensors = {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale, "out": out}
    for name, value in tensors.items():
        guards.check_tensor(name, value)
    form = choose("fp8_einsum", implementation, a.is_cuda)
    guards.check_dtype("a", a, torch.float8_e4m3fn)
    guards.check_dtype("a_scale", a_scale, torch.float32)
    guards.check_dtype("b", b, torch.float8_e4m3fn)
    guards.check_dtype("b_scale", b_scale, torch.float32, torch.float8_e8m0fnu, torch.uint8)
    guards.check_dtype("out", out, torch.bfloat16)

    sizes: dict[str, int] = {}
    guards.check_shape("a", a, ("T", "G", "K"), sizes)
    guards.check_shape("out", out, ("T", "G", "N"), sizes)
    groups, k, n = sizes["G"], sizes["K"], sizes["N"]
    for name, size in (("a: K", k), ("out: N", n)):
        if size == 0 or size % BLOCK:
            raise ValueError(f"{name} is {size}, allowed: positive multiples of {BLOCK}")
    guards.check_shape("a_scale", a_scale, ("T", "G", k // BLOCK), sizes)
    flat, grouped = (groups * n, k), (groups, n, k)
    guards.check_shape("b", b, flat if b.dim() == 2 else grouped)
    flat_scale = (groups * n // BLOCK, k // BLOCK)
    grouped_scale = (groups, n // BLOCK, k // BLOCK)
    guards.check_shape("b_scale", b_scale, flat_scale if b_scale.dim() == 2 else grouped_scale)
    guards.check_stride("a", a, -1, 1)
    guards.check_stride("b", b, -1, 1)
    guards.check_same_device(**tensors)
    if form == "reference":
        reference.fp8_einsum_bhr_hdr(a, a_scale, b, b_scale, out)
        return
    from vllm_sm12x.ops.fp8_einsum import kernel  # here, so that the rest needs no Triton

    kernel.fp8_einsum_bhr_hdr(a, a_scale, b, b_scale, out)
