"""Logits of the lightning indexer over contiguous FP8 keys (prefill).

For query token ``i`` and key ``j``::

    logits[i, j] = k_scale[j] * sum_h weights[i, h] * relu(dot(q[i, h], k[j]))

The scale of ``q`` and both softmax-like factors are folded into ``weights`` by the caller, as vLLM
does. Only keys ``ks[i] <= j < ke[i]`` belong to token ``i``.

Source: DeepSeek-V3.2, lightning indexer; argument meanings are those of vLLM's
``fp8_fp4_mqa_logits`` with FP8 queries.

The function does not synchronise with the host, and what it allocates follows from shapes alone,
so it may run under CUDA-graph capture.
"""

from __future__ import annotations

import torch

from vllm_sm12x.implementation import Implementation, choose
from vllm_sm12x.ops import guards
from vllm_sm12x.ops.mqa_logits import reference

__all__ = ["HEAD_DIM", "fp8_mqa_logits", "scratch_bytes"]

HEAD_DIM = 128


def fp8_mqa_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    clean_logits: bool = False,
    implementation: Implementation | None = None,
) -> torch.Tensor:
    """Score every key for every query token.

    Args:
        q: float8_e4m3fn ``[m, heads, 128]``.
        k: float8_e4m3fn ``[n, 128]``.
        k_scale: float32 ``[n]``, not negative (it is taken out of the relu).
        weights: float32 ``[m, heads]``.
        ks: int32 ``[m]``, first key of a token.
        ke: int32 ``[m]``, one past its last key.
        clean_logits: Write ``-inf`` outside ``[ks, ke)``; otherwise what stands there is undefined.
        implementation: ``"reference"``, or ``"triton"``: a kernel that multiplies in e4m3 with
            float32 sums, for the heads that ``config`` lists. None: see
            :mod:`vllm_sm12x.implementation`.

    Returns:
        float32 ``[m, n]``, contiguous.

    Raises:
        ValueError: An argument has a wrong dtype, shape, stride or device, or ``implementation`` is
            unknown or has no kernel for the number of heads.
    """
    bound: dict[str, int] = {}
    guards.check_tensor("q", q)
    guards.check_dtype("q", q, torch.float8_e4m3fn)
    guards.check_shape("q", q, ("m", "heads", HEAD_DIM), bound)
    guards.check_stride("q", q, 2, 1)
    form = choose("mqa_logits", implementation, q.is_cuda)
    guards.check_tensor("k", k)
    guards.check_dtype("k", k, torch.float8_e4m3fn)
    guards.check_shape("k", k, ("n", HEAD_DIM), bound)
    guards.check_stride("k", k, 1, 1)
    guards.check_tensor("k_scale", k_scale)
    guards.check_dtype("k_scale", k_scale, torch.float32)
    guards.check_shape("k_scale", k_scale, ("n",), bound)
    guards.check_tensor("weights", weights)
    guards.check_dtype("weights", weights, torch.float32)
    guards.check_shape("weights", weights, ("m", "heads"), bound)
    for name, tensor in (("ks", ks), ("ke", ke)):
        guards.check_tensor(name, tensor)
        guards.check_dtype(name, tensor, torch.int32)
        guards.check_shape(name, tensor, ("m",), bound)
    guards.check_same_device(q=q, k=k, k_scale=k_scale, weights=weights, ks=ks, ke=ke)
    if form == "reference":
        return reference.fp8_mqa_logits(q, k, k_scale, weights, ks, ke, clean_logits)
    from vllm_sm12x.ops.mqa_logits import kernel  # here, so that the rest needs no Triton

    return kernel.fp8_mqa_logits(q, k, k_scale, weights, ks, ke, clean_logits)


def scratch_bytes(
    tokens: int, heads: int, keys: int, implementation: Implementation | None = None
) -> int:
    """Most memory that :func:`fp8_mqa_logits` allocates at a time besides its result, in bytes.

    Args:
        tokens: ``m``.
        heads: Number of heads.
        keys: ``n``.
        implementation: As in :func:`fp8_mqa_logits`; None: of calls on the current GPU.

    Raises:
        ValueError: ``implementation`` is unknown.
    """
    form = choose("mqa_logits", implementation, torch.cuda.is_available())
    if form == "triton":
        return 0
    return reference.scratch_bytes(tokens, heads, keys)
