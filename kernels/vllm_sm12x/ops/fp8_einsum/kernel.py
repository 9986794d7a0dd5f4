"""The grouped FP8 einsum in Triton: a block of threads makes one tile of one group's result.

It walks along K in steps of 128, one block of scales. The products of a step are summed by the
matrix instruction alone, then multiplied by the two scales and added in float32, so that no sum
longer than 128 terms is left to an instruction that may keep fewer bits than float32 has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sm12x import lowering
from vllm_sm12x.ops.fp8_einsum.config import EinsumConfig, einsum_config
from vllm_sm12x.ops.fp8_einsum.reference import BLOCK
from vllm_sm12x.ops.launching import capability_of

_BLOCK = tl.constexpr(BLOCK)

# These change from call to call, or are 1 in one call and not in the next: a kernel for each of
# their kinds would be compiled while serving.
_VARIABLE = [
    "tokens",
    "a_scale",
    "a_scale_token",
    "a_scale_group",
    "a_scale_block",
    "b_scale",
    "b_scale_group",
    "b_scale_row",
    "b_scale_block",
]


@triton.jit
def _load_factor(a_scale, b_scale):
    """Product of the scales of tokens and weights for one block of K; ``b_scale`` a scalar."""
    scale = tl.load(b_scale)
    if b_scale.dtype.element_ty == tl.uint8:
        # UE8M0: the float32 with these exponent bits, save 2**-127, which is subnormal, and NaN.
        exponent = scale.to(tl.int32)
        bits = tl.where(exponent == 0, 0x0040_0000, exponent << 23)
        scale = tl.where(exponent == 255, 0x7FC0_0000, bits).to(tl.float32, bitcast=True)
    return tl.load(a_scale) * scale


@triton.jit(do_not_specialize=_VARIABLE)
def einsum_kernel(
    a,
    a_token,
    a_group,
    a_scale,
    a_scale_token,
    a_scale_group,
    a_scale_block,
    b,
    b_group,
    b_row,
    b_scale,
    b_scale_group,
    b_scale_row,
    b_scale_block,
    out,
    out_token,
    out_group,
    out_column,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
):
    """A tile of ``BLOCK_T`` tokens and ``BLOCK_N`` outputs of one group.

    ``G * cdiv(tokens, BLOCK_T) * (N / BLOCK_N)`` programs; the tiles of one group are neighbours,
    those of the same tokens next to each other. Strides are in elements.

    Args:
        a: float8_e4m3fn ``[tokens, G, K]``, columns are neighbours.
        a_scale: float32 ``[tokens, G, K / 128]``.
        b: float8_e4m3fn ``[G, N, K]``, columns are neighbours.
        b_scale: float32 or uint8 (UE8M0) ``[G, N / 128, K / 128]``.
        out: bfloat16 ``[tokens, G, N]``.
    """
    n_tiles: tl.constexpr = N // BLOCK_N
    token_tiles = tl.cdiv(tokens, BLOCK_T)
    tile = tl.program_id(0)
    n_tile = tile % n_tiles
    token_tile = (tile // n_tiles) % token_tiles
    group = (tile // (n_tiles * token_tiles)).to(tl.int64)

    token = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < tokens
    # Lanes that are masked off get an address inside too.
    token = tl.where(inside, token, 0).to(tl.int64)
    row = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, _BLOCK)

    x_place = a + group * a_group + token[:, None] * a_token + column[None, :]
    w_place = b + group * b_group + row[:, None].to(tl.int64) * b_row + column[None, :]
    a_scale += group * a_scale_group + token * a_scale_token
    b_scale += group * b_scale_group + (n_tile * BLOCK_N // _BLOCK).to(tl.int64) * b_scale_row

    if WEIGHTS_FIRST:
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    else:
        acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    # The scales are read a step ahead, into registers: Triton copies only operands of the product
    # ahead. The last step reads its own once more.
    last: tl.constexpr = K // _BLOCK - 1
    next_factor = _load_factor(a_scale, b_scale)
    for step in range(0, K // _BLOCK):
        factor = next_factor
        x = tl.load(x_place + step * _BLOCK, mask=inside[:, None], other=0.0)
        w = tl.load(w_place + step * _BLOCK)
        ahead = tl.minimum(step + 1, last).to(tl.int64)
        next_factor = _load_factor(a_scale + ahead * a_scale_block, b_scale + ahead * b_scale_block)
        if WEIGHTS_FIRST:
            product = tl.dot(w, tl.trans(x), tl.zeros([BLOCK_N, BLOCK_T], tl.float32))
            acc += product * factor[None, :]
        else:
            product = tl.dot(x, tl.trans(w), tl.zeros([BLOCK_T, BLOCK_N], tl.float32))
            acc += product * factor[:, None]

    if WEIGHTS_FIRST:
        acc = tl.trans(acc)
    tl.store(
        out + group * out_group + token[:, None] * out_token + row[None, :] * out_column,
        acc.to(tl.bfloat16),
        mask=inside[:, None],
    )


def fp8_einsum_bhr_hdr(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out: torch.Tensor,
    config: EinsumConfig | None = None,
) -> None:
    """As :func:`vllm_sm12x.ops.fp8_einsum.fp8_einsum_bhr_hdr`, whose checks came before.

    Allocates nothing and does not synchronise with the host.

    Args:
        config: By default the table's, for the GPU of ``a`` and its tokens.

    Raises:
        ValueError: The tensors are on no GPU.
    """
    tokens, groups, k = a.shape
    n = out.size(-1)
    capability = capability_of("a", a, "Triton einsum kernel")
    if config is None:
        config = einsum_config(lowering.target_key(capability), tokens)
    if tokens == 0 or groups == 0:
        return
    b = b if b.dim() == 3 else b.unflatten(0, (groups, n))
    b_scale = b_scale if b_scale.dim() == 3 else b_scale.unflatten(0, (groups, n // BLOCK))
    if b_scale.dtype != torch.float32:
        b_scale = b_scale.view(torch.uint8)
    einsum_kernel[(groups * triton.cdiv(tokens, config.block_t) * (n // config.block_n),)](
        a,
        a.stride(0),
        a.stride(1),
        a_scale,
        *a_scale.stride(),
        b,
        b.stride(0),
        b.stride(1),
        b_scale,
        *b_scale.stride(),
        out,
        *out.stride(),
        tokens,
        N=n,
        K=k,
        BLOCK_T=config.block_t,
        BLOCK_N=config.block_n,
        WEIGHTS_FIRST=config.weights_first,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **({} if config.maxnreg is None else {"maxnreg": config.maxnreg}),
        **lowering.launch_options(capability),
    )
