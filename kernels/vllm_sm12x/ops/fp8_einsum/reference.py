"""Definition, in PyTorch, for CPU and GPU; safe under CUDA-graph capture.

Both operands are dequantised to float32 and multiplied in float32. PyTorch's default precision of
float32 products is full; whoever lowers it for the process (``set_float32_matmul_precision``) lets
TF32 into this product too.
"""

from __future__ import annotations

import torch

from vllm_sm12x.ops.ue8m0.reference import scale_blocks_, ue8m0_to_float32

# Values that share one scale: along K in both operands, and along N in the weight.
BLOCK = 128

# Bound of the float32 copies alive at a time. A single group's weight, or a single token's row, is
# taken even where it is larger.
SCRATCH_BUDGET_BYTES = 256 * 2**20

_FLOAT32_BYTES = 4


def chunk_sizes(num_tokens: int, groups: int, n: int, k: int) -> tuple[int, int]:
    """Groups and tokens to take at a time: one half of the budget is for either operand."""
    half = SCRATCH_BUDGET_BYTES // 2
    group_bytes = n * k * _FLOAT32_BYTES
    group_chunk = max(1, min(groups, half // group_bytes))
    token_bytes = group_chunk * (k + n) * _FLOAT32_BYTES
    token_chunk = max(1, min(num_tokens, half // token_bytes))
    return group_chunk, token_chunk


def scratch_bytes(num_tokens: int, groups: int, n: int, k: int) -> int:
    """Bytes of float32 copies (weight, activations, result) that a call of this size holds."""
    group_chunk, token_chunk = chunk_sizes(num_tokens, groups, n, k)
    return group_chunk * (n * k + token_chunk * (k + n)) * _FLOAT32_BYTES


def fp8_einsum_bhr_hdr(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out: torch.Tensor,
) -> None:
    num_tokens, groups, k = a.shape
    n = out.size(-1)
    if num_tokens == 0 or groups == 0:
        return
    if b_scale.dtype != torch.float32:
        b_scale = ue8m0_to_float32(b_scale)
    b = b if b.dim() == 3 else b.unflatten(0, (groups, n))
    b_scale = b_scale if b_scale.dim() == 3 else b_scale.unflatten(0, (groups, n // BLOCK))
    # Groups outermost, as the batch of the product.
    a, a_scale, out = a.transpose(0, 1), a_scale.transpose(0, 1), out.transpose(0, 1)

    group_chunk, token_chunk = chunk_sizes(num_tokens, groups, n, k)
    for g in range(0, groups, group_chunk):
        gs = slice(g, g + group_chunk)
        weight = scale_blocks_(b[gs].to(torch.float32), b_scale[gs], (BLOCK, BLOCK))
        for t in range(0, num_tokens, token_chunk):
            ts = slice(t, t + token_chunk)
            rows = scale_blocks_(a[gs, ts].to(torch.float32), a_scale[gs, ts], (BLOCK,))
            out[gs, ts] = torch.bmm(rows, weight.transpose(1, 2))
            # Before the next chunk's copies are made, so that one of each is alive.
            del rows
        del weight
