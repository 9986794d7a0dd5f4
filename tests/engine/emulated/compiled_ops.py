"""vLLM's C++ operations on DeepSeek V4's portable path, in PyTorch, from what each is to compute.

vLLM's Triton kernels and ours run as they are compiled; these are CUDA C++, of which its binaries
have machine code alone. ``tests/engine/test_compiled_ops.py`` holds them against the sources of
those, compiled to PTX. Formats are those of the FP8 caches in
:mod:`vllm_sm12x.ops.fp8_ds_mla`, written out again here: what writes a cache must not share a
mistake with what reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from tests.engine.emulated import graphs

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
BF16 = torch.bfloat16
# Of a token in an fp8_ds_mla page: FP8 values, bfloat16 values, exponents, and a byte of padding.
NOPE, ROPE, SCALES = 448, 64, 7
TOKEN_BYTES, SCALE_BYTES = NOPE + 2 * ROPE, 8
QUANT_GROUP = 64


def rms_norm(
    result: torch.Tensor, input: torch.Tensor, weight: torch.Tensor | None, epsilon: float
) -> None:
    values = input.float()
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)
    result.copy_(values if weight is None else values * weight.float())


def silu_and_mul_with_clamp(result: torch.Tensor, input: torch.Tensor, limit: float) -> None:
    gate, up = input.chunk(2, dim=-1)
    # Rounded between the activation and the product.
    activation = F.silu(gate.clamp(max=limit).float()).to(input.dtype)
    result.copy_(activation * up.clamp(-limit, limit))


def per_token_group_fp8_quant(
    input: torch.Tensor,
    output_q: torch.Tensor,
    output_s: torch.Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool,
    *layout_of_scales: bool,
) -> None:
    groups = input.float().unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1).clamp(min=eps) / fp8_max
    if scale_ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale.clamp(min=1e-10))))
    values = (groups / scale.unsqueeze(-1)).clamp(fp8_min, fp8_max)
    output_q.copy_(values.flatten(-2).to(output_q.dtype))
    output_s.copy_(scale)


def cutlass_scaled_mm(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Blocks of FP8: ``a [M, K]`` with a scale for 128 values, ``b [K, N]`` for 128 x 128."""
    assert a_scales.dtype == b_scales.dtype == torch.float32, "CUTLASS refuses other scales"
    rows, inner = a.shape
    assert a_scales.shape == (rows, inner // 128)
    left = a.float() * a_scales.repeat_interleave(128, 1)
    right = (
        b.float()
        * b_scales.repeat_interleave(128, 0)[:inner].repeat_interleave(128, 1)[:, : b.shape[1]]
    )
    product = left @ right
    out.copy_(product if bias is None else product + bias.float())


def qnorm_rope_kv_rope_quant_insert(
    q: torch.Tensor,
    kv: torch.Tensor,
    k_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    position_ids: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    padded_heads: int,
    eps: float,
    block_size: int,
) -> torch.Tensor:
    """Normalise and rotate queries, with heads of zeros up to ``padded_heads``; rotate keys and
    write them into their slots, but for those below zero."""
    table = cos_sin_cache[position_ids].float()
    queries = q.float()
    queries = queries * torch.rsqrt(queries.square().mean(-1, keepdim=True) + eps)
    out = torch.zeros(len(q), padded_heads, NOPE + ROPE, dtype=q.dtype)
    out[:, : q.shape[1]] = _rotated(queries, table.unsqueeze(1)).to(q.dtype)
    keys = _rotated(kv.float(), table).to(BF16)
    for key, slot in zip(keys, slot_mapping.tolist(), strict=False):
        if slot < 0:
            continue
        page = k_cache[slot // block_size]
        row = slot % block_size
        groups = key[:NOPE].float().unflatten(0, (SCALES, QUANT_GROUP))
        exponent = torch.ceil(torch.log2(groups.abs().amax(1).clamp(min=1e-4) / E4M3_MAX))
        values = (groups * torch.exp2(-exponent).unsqueeze(1)).clamp(-E4M3_MAX, E4M3_MAX)
        token = page[row * TOKEN_BYTES :][:TOKEN_BYTES]
        token[:NOPE] = values.flatten().to(E4M3).view(torch.uint8)
        token[NOPE:] = key[NOPE:].contiguous().view(torch.uint8)
        scales = page[block_size * TOKEN_BYTES + row * SCALE_BYTES :][:SCALE_BYTES]
        scales[:SCALES] = (exponent + 127).clamp(0, 255).to(torch.uint8)
        scales[SCALES:] = 0
    return out


def _rotated(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The last 64 values rotated in neighbouring pairs; ``table`` has 32 cosines, then sines."""
    pairs = values[..., NOPE:].unflatten(-1, (-1, 2))
    cos, sin = table.chunk(2, dim=-1)
    even, odd = pairs.unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return torch.cat((values[..., :NOPE], turned.flatten(-2)), -1)


def cp_gather_indexer_k_quant_cache(
    kv_cache: torch.Tensor,
    dst_k: torch.Tensor,
    dst_scale: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
) -> None:
    """Keys of the indexer (128 FP8 values, one float32) from pages into rows, request by request.

    Rows that belong to no request stay as they are.
    """
    _, rows, token = kv_cache.shape
    width = token - 4
    starts = cu_seq_lens.tolist()
    for request, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        for row in range(start, min(end, len(dst_k))):
            entry = row - start
            page = kv_cache[int(block_table[request, entry // rows])].flatten()
            at = entry % rows
            dst_k[row] = page[at * width :][:width].view(dst_k.dtype)
            dst_scale[row] = page[rows * width + 4 * at :][:4].view(dst_scale.dtype)


def top_k_per_row_prefill(
    logits: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    indices: torch.Tensor,
    rows: int,
    stride0: int,
    stride1: int,
    top_k: int,
) -> None:
    """Positions of the largest between a row's bounds, counted from its start; -1 where there are
    fewer."""
    assert stride1 == 1
    for row in range(rows):
        start, end = int(row_starts[row]), int(row_ends[row])
        _largest(logits[row, start:end], indices[row], top_k)


def top_k_per_row_decode(
    logits: torch.Tensor,
    next_n: int,
    seq_lens: torch.Tensor,
    indices: torch.Tensor,
    rows: int,
    stride0: int,
    stride1: int,
    top_k: int,
) -> None:
    for row in range(rows):
        if seq_lens.ndim == 2:
            length = int(seq_lens.flatten()[row])
        else:
            length = int(seq_lens[row // next_n]) - next_n + row % next_n + 1
        _largest(logits[row, : max(0, length)], indices[row], top_k)


def persistent_topk(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    output: torch.Tensor,
    workspace: torch.Tensor,
    k: int,
    max_seq_len: int,
) -> None:
    """As in decode; a length below zero would be read as a large unsigned one."""
    for row, length in enumerate(lengths.flatten().tolist()):
        assert length >= 0, f"length {length} of row {row}"
        _largest(logits[row, :length], output[row], k)


def _largest(values: torch.Tensor, indices: torch.Tensor, top_k: int) -> None:
    assert not values.isnan().any()
    indices[:top_k] = -1
    found = values.topk(min(top_k, len(values))).indices
    indices[: len(found)] = found.to(indices.dtype)


def topk_softplus_sqrt(
    topk_weights: torch.Tensor,
    topk_indices: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool,
    routed_scaling_factor: float,
    bias: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    tid2eid: torch.Tensor | None,
) -> None:
    """Experts by the square root of softplus and a bias, or by the token's id; weights by the
    former alone."""
    scores = F.softplus(gating_output.float()).sqrt()
    if tid2eid is not None:
        chosen = tid2eid[input_ids.long()].long()
    else:
        chosen = (scores if bias is None else scores + bias.float()).topk(topk_weights.shape[1])[1]
    weights = scores.gather(1, chosen)
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    topk_weights.copy_(weights * routed_scaling_factor)
    topk_indices.copy_(chosen)


def moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> None:
    """Pairs of a token and an expert by expert, each expert's filled up to whole blocks."""
    assert expert_map is None
    flat = topk_ids.flatten().tolist()
    pairs: list[int] = []
    experts: list[int] = []
    for expert in range(num_experts):
        mine = [pair for pair, of in enumerate(flat) if of == expert]
        mine += [len(flat)] * (-len(mine) % block_size)
        pairs += mine
        experts += [expert] * (len(mine) // block_size)
    sorted_token_ids.fill_(len(flat))
    sorted_token_ids[: len(pairs)] = torch.tensor(pairs, dtype=torch.int32)
    expert_ids.fill_(-1)
    expert_ids[: len(experts)] = torch.tensor(experts, dtype=torch.int32)
    num_tokens_post_pad.fill_(len(pairs))


STAND_INS = {
    "_C": {
        "rms_norm": rms_norm,
        "silu_and_mul_with_clamp": silu_and_mul_with_clamp,
        "per_token_group_fp8_quant": per_token_group_fp8_quant,
        "cutlass_scaled_mm": cutlass_scaled_mm,
        "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert": qnorm_rope_kv_rope_quant_insert,
        "top_k_per_row_prefill": top_k_per_row_prefill,
        "top_k_per_row_decode": top_k_per_row_decode,
        "persistent_topk": persistent_topk,
        "weak_ref_tensor": lambda tensor: tensor,
    },
    "_C_cache_ops": {"cp_gather_indexer_k_quant_cache": cp_gather_indexer_k_quant_cache},
    "_moe_C": {
        "topk_softplus_sqrt": topk_softplus_sqrt,
        "moe_align_block_size": moe_align_block_size,
    },
}


class _Operation:
    """As modules see an operation, whose overloads some bind while they are imported."""

    def __init__(self, name: str, function: Callable[..., Any] | None) -> None:
        self.default = self.out = self
        self._name, self._function = name, function

    def __call__(self, *arguments: Any) -> Any:
        if self._function is None:
            raise NotImplementedError(f"{self._name}: no stand-in in {__name__}")
        return graphs.record(lambda: self._function(*arguments))


class _Library(SimpleNamespace):
    """As ``torch.ops`` has a library; an operation without stand-in says so when it is called."""

    def __getattr__(self, name: str) -> _Operation:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Operation(name, None)


def install() -> None:
    """Put them where vLLM calls them."""
    for library, functions in STAND_INS.items():
        operations = {name: _Operation(name, function) for name, function in functions.items()}
        setattr(torch.ops, library, _Library(**operations))
