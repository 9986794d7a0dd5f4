"""Sparse multi-query attention of DeepSeek V4: every query token names the keys that it sees.

For query token ``t`` and head ``h``, over the keys ``i`` that the token names::

    s_i = softmax_scale * dot(q[t, h], k_i)
    out[t, h] = sum_i exp(s_i) * k_i / (sum_i exp(s_i) + exp(attn_sink[h]))

A key is its own value: all 512 numbers, the 64 rotated ones included. All heads share the keys. The
sink takes part in the denominator alone; ``-inf`` switches it off. A token that names no key gives
zeros. A key named twice counts twice.

Source: DeepSeek-V3.2 (sparse attention over selected latents) and DeepSeek-V4 (compressed keys
beside a sliding window, attention sink); layouts and argument meanings are vLLM's
(``flash_mla_with_kvcache`` and ``flash_mla_sparse_fwd`` as DeepSeek V4 calls them).

Neither function synchronises with the host, and what they allocate follows from shapes alone, so
both may run under CUDA-graph capture.
"""

from __future__ import annotations

import torch

from vllm_sm12x.implementation import Implementation, choose
from vllm_sm12x.lowering import multiprocessors as current_multiprocessors
from vllm_sm12x.lowering import target_key
from vllm_sm12x.ops import guards
from vllm_sm12x.ops.fp8_ds_mla import HEAD_DIM, check_cache
from vllm_sm12x.ops.sparse_mla import reference

__all__ = [
    "decode_scratch_bytes",
    "prefill_scratch_bytes",
    "sparse_mla_decode",
    "sparse_mla_prefill",
]


def sparse_mla_decode(
    q: torch.Tensor,
    swa_cache: torch.Tensor,
    swa_indices: torch.Tensor,
    swa_lens: torch.Tensor,
    attn_sink: torch.Tensor,
    softmax_scale: float,
    out: torch.Tensor,
    extra_cache: torch.Tensor | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_lens: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    batch_tokens: int | None = None,
    implementation: Implementation | None = None,
) -> None:
    """Attend to keys in one or two paged ``fp8_ds_mla`` caches, with one softmax over both.

    Args:
        q: bfloat16 ``[T, H, 512]``.
        swa_cache: uint8 ``[blocks, block_size, 584]``, the sliding window's cache; pages are
            ``stride(0)`` bytes apart (see :mod:`vllm_sm12x.ops.fp8_ds_mla`).
        swa_indices: int32 ``[T, W]``, ``block * block_size + offset``. Negative, or beyond the
            cache: no key. Entries from ``swa_lens[t]`` on are ignored, whatever they hold.
        swa_lens: int32 ``[T]``; zero or less: no keys; more than ``W``: all ``W``.
        attn_sink: float32, one dimension of ``H`` or more; the first ``H`` are used.
        softmax_scale: Factor of the scores.
        out: bfloat16 ``[T, H, 512]``, written in place.
        extra_cache: uint8 ``[blocks, block_size, 584]``, the compressed cache; its block size may
            differ. None: the three ``extra`` arguments are None.
        extra_indices: int32 ``[T, E]``, as ``swa_indices``.
        extra_lens: int32 ``[T]``, as ``swa_lens``.
        lse: float32 ``[T, H]``, written in place where given: the natural logarithm of
            ``sum_i exp(s_i)`` over both caches, without the sink; ``-inf`` for a token with no key.
        batch_tokens: The kernels' launch parameters are chosen for so many tokens, ``T`` or more;
            by default ``T``. By the same choice a row is the same to the last bit.
        implementation: ``"reference"``, or ``"triton"``: kernels that multiply in bfloat16 with
            float32 sums, for the shapes of ``config_decode`` and block sizes that are powers of
            two. None: see :mod:`vllm_sm12x.implementation`.

    Raises:
        ValueError: An argument has a wrong dtype, shape, stride or device, or some but not all
            ``extra`` arguments are given, or ``batch_tokens`` is below ``T``, or
            ``implementation`` is unknown or has no kernel for the shape.
    """
    bound = _check_queries(q, attn_sink, out, lse)
    if batch_tokens is not None and batch_tokens < q.shape[0]:
        raise ValueError(f"batch_tokens: {batch_tokens}, allowed: {q.shape[0]} (q's) and more")
    form = choose("sparse_mla_decode", implementation, q.is_cuda)
    check_cache("swa_cache", swa_cache)
    _check_indices("swa_indices", swa_indices, "swa_lens", swa_lens, bound)
    extra = {
        "extra_cache": extra_cache,
        "extra_indices": extra_indices,
        "extra_lens": extra_lens,
    }
    absent = [name for name, value in extra.items() if value is None]
    if 0 < len(absent) < len(extra):
        raise ValueError(f"{absent[0]}: got None, allowed: all of {', '.join(extra)}, or none")
    sets = [(swa_cache, swa_indices, swa_lens)]
    if extra_cache is not None and extra_indices is not None and extra_lens is not None:
        check_cache("extra_cache", extra_cache)
        _check_indices("extra_indices", extra_indices, "extra_lens", extra_lens, bound)
        sets.append((extra_cache, extra_indices, extra_lens))
    guards.check_same_device(
        q=q,
        swa_cache=swa_cache,
        swa_indices=swa_indices,
        swa_lens=swa_lens,
        attn_sink=attn_sink,
        out=out,
        lse=lse,
        **extra,
    )
    if form == "reference":
        reference.sparse_mla_decode(q, sets, attn_sink, softmax_scale, out, lse)
        return
    from vllm_sm12x.ops.sparse_mla import decode_kernel  # here, so that the rest needs no Triton

    decode_kernel.sparse_mla_decode(
        q, sets, attn_sink, softmax_scale, out, lse, batch_tokens=batch_tokens
    )


def sparse_mla_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lens: torch.Tensor,
    attn_sink: torch.Tensor,
    softmax_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    implementation: Implementation | None = None,
) -> None:
    """Attend to keys that were gathered and dequantised before.

    Args:
        q: bfloat16 ``[T, H, 512]``.
        kv: bfloat16 ``[S, 512]``. Rows that no index names may hold anything.
        indices: int32 ``[T, K]``, rows of ``kv``. Negative, or ``S`` or more: no key. Entries from
            ``lens[t]`` on are ignored, whatever they hold.
        lens: int32 ``[T]``; zero or less: no keys; more than ``K``: all ``K``.
        attn_sink: float32, one dimension of ``H`` or more; the first ``H`` are used.
        softmax_scale: Factor of the scores.
        out: bfloat16 ``[T, H, 512]``, written in place.
        lse: As in :func:`sparse_mla_decode`.
        implementation: As there; ``"triton"`` takes the heads that its table lists for the GPU.

    Raises:
        ValueError: An argument has a wrong dtype, shape, stride or device, or ``implementation`` is
            unknown or has no kernel for the number of heads.
    """
    bound = _check_queries(q, attn_sink, out, lse)
    form = choose("sparse_mla_prefill", implementation, q.is_cuda)
    guards.check_tensor("kv", kv)
    guards.check_dtype("kv", kv, torch.bfloat16)
    guards.check_shape("kv", kv, (None, HEAD_DIM))
    guards.check_stride("kv", kv, 1, 1)
    _check_indices("indices", indices, "lens", lens, bound)
    guards.check_same_device(
        q=q, kv=kv, indices=indices, lens=lens, attn_sink=attn_sink, out=out, lse=lse
    )
    if form == "reference":
        reference.sparse_mla_prefill(q, kv, indices, lens, attn_sink, softmax_scale, out, lse)
        return
    from vllm_sm12x.ops.sparse_mla import prefill_kernel  # here, so that the rest needs no Triton

    prefill_kernel.sparse_mla_prefill(q, kv, indices, lens, attn_sink, softmax_scale, out, lse)


def decode_scratch_bytes(
    tokens: int,
    heads: int,
    keys: int,
    *,
    implementation: Implementation | None = None,
    target: str | None = None,
    multiprocessors: int | None = None,
) -> int:
    """Most memory that :func:`sparse_mla_decode` allocates at a time, in bytes.

    Args:
        tokens: The most tokens of a call. With kernels, fewer can need more memory, so all counts
            are covered.
        heads: ``H``.
        keys: ``W + E``, the widths of both index tensors together.
        implementation: As in :func:`sparse_mla_decode`; None: of calls on the current GPU.
        target: ``"sm_120"``, ``"sm_121"`` or ``"sm_90"``; by default that of the current GPU.
        multiprocessors: Of the GPU; by default those of the current one.

    Raises:
        ValueError: There is no kernel for the shape or the target.
    """
    form = choose("sparse_mla_decode", implementation, torch.cuda.is_available())
    if form == "reference":
        return reference.decode_scratch_bytes(tokens, heads, keys)
    from vllm_sm12x.ops.sparse_mla import decode_kernel

    return decode_kernel.scratch_bytes(
        tokens,
        heads,
        keys,
        target_key() if target is None else target,
        current_multiprocessors() if multiprocessors is None else multiprocessors,
    )


def prefill_scratch_bytes(
    tokens: int, heads: int, keys: int, *, implementation: Implementation | None = None
) -> int:
    """Most memory that :func:`sparse_mla_prefill` allocates at a time, in bytes.

    Args:
        tokens: ``T``.
        heads: ``H``.
        keys: ``K``, the width of the index tensor.
        implementation: As in :func:`decode_scratch_bytes`.

    Raises:
        ValueError: ``implementation`` is unknown.
    """
    form = choose("sparse_mla_prefill", implementation, torch.cuda.is_available())
    if form == "triton":
        return 0
    return reference.prefill_scratch_bytes(tokens, heads, keys)


def _check_queries(
    q: torch.Tensor, attn_sink: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
) -> dict[str, int]:
    bound: dict[str, int] = {}
    for name, tensor in (("q", q), ("out", out)):
        guards.check_tensor(name, tensor)
        guards.check_dtype(name, tensor, torch.bfloat16)
        guards.check_shape(name, tensor, ("T", "H", HEAD_DIM), bound)
        guards.check_stride(name, tensor, 2, 1)
    guards.check_tensor("attn_sink", attn_sink)
    guards.check_dtype("attn_sink", attn_sink, torch.float32)
    if attn_sink.dim() != 1 or attn_sink.size(0) < bound["H"]:
        raise ValueError(
            f"attn_sink: shape {tuple(attn_sink.shape)}, allowed: ({bound['H']} or more,)"
        )
    if lse is not None:
        guards.check_tensor("lse", lse)
        guards.check_dtype("lse", lse, torch.float32)
        guards.check_shape("lse", lse, ("T", "H"), bound)
    return bound


def _check_indices(
    indices_name: str,
    indices: torch.Tensor,
    lens_name: str,
    lens: torch.Tensor,
    bound: dict[str, int],
) -> None:
    guards.check_tensor(indices_name, indices)
    guards.check_dtype(indices_name, indices, torch.int32)
    guards.check_shape(indices_name, indices, ("T", None), bound)
    guards.check_stride(indices_name, indices, 1, 1)
    guards.check_tensor(lens_name, lens)
    guards.check_dtype(lens_name, lens, torch.int32)
    guards.check_shape(lens_name, lens, ("T",), bound)
