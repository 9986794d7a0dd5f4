"""The grouped FP8 einsum in Triton: a block of threads makes one tile of one group's result.

It walks along K in blocks of 128 values, which share a scale. The products of a block are summed by
the matrix instruction alone, then multiplied by the two scales and added in float32, so that no sum
longer than 128 terms is left to an instruction that may keep fewer bits than float32 has.

With many tokens all warps share each block of K. With few tokens memory is what counts, and a walk
of 32 dependent steps takes longer than the weights take to come: there each warp multiplies blocks
of its own, and the warps' sums are added at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_sm12x import lowering
from vllm_sm12x.ops.fp8_einsum.config import EinsumConfig, einsum_config
from vllm_sm12x.ops.fp8_einsum.reference import BLOCK
from vllm_sm12x.ops.integers import cdiv
from vllm_sm12x.ops.launch_cache import launch
from vllm_sm12x.ops.launching import capability_of
from vllm_sm12x.ops.prefetch import prefetch_l2

_BLOCK = tl.constexpr(BLOCK)

# Blocks of K, a power of two, whose weights a dependent launch asks for before it waits. That is
# about what a block of threads has in flight later.
_PREFETCH = tl.constexpr(8)

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
def _decode(scale):
    """A scale of the weights in float32; as it is, unless it is UE8M0."""
    if scale.dtype == tl.uint8:
        # The float32 with these exponent bits, save 2**-127, which is subnormal, and NaN.
        exponent = scale.to(tl.int32)
        bits = tl.where(exponent == 0, 0x0040_0000, exponent << 23)
        scale = tl.where(exponent == 255, 0x7FC0_0000, bits).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _sum_together(
    x_row,
    inside,
    w_row,
    a_scale,
    a_scale_block,
    b_scale,
    b_scale_block,
    BLOCKS: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
):
    """``[tokens, outputs]``, by all warps together, a block of K a step.

    Args:
        x_row, inside: Pointers to rows of tokens, and which of them there are.
        w_row: Pointers to rows of weights.
        a_scale, b_scale: Pointers to the first block's scales: of each token, and one.
    """
    block_t: tl.constexpr = x_row.shape[0]
    block_n: tl.constexpr = w_row.shape[0]
    column = tl.arange(0, _BLOCK)
    x_place = x_row[:, None] + column[None, :]
    w_place = w_row[:, None] + column[None, :]
    if WEIGHTS_FIRST:
        acc = tl.zeros([block_n, block_t], tl.float32)
    else:
        acc = tl.zeros([block_t, block_n], tl.float32)
    # The scales are read a step ahead, into registers: Triton copies only operands of the product
    # ahead. They are multiplied in the step that uses them: the one that reads them would wait for
    # memory to do so. The last step reads its own once more.
    next_a, next_b = tl.load(a_scale), tl.load(b_scale)
    for step in range(0, BLOCKS):
        factor = next_a * _decode(next_b)
        x = tl.load(x_place + step * _BLOCK, mask=inside[:, None], other=0.0)
        w = tl.load(w_place + step * _BLOCK)
        ahead = tl.minimum(step + 1, BLOCKS - 1).to(tl.int64)
        next_a = tl.load(a_scale + ahead * a_scale_block)
        next_b = tl.load(b_scale + ahead * b_scale_block)
        if WEIGHTS_FIRST:
            product = tl.dot(w, tl.trans(x), tl.zeros([block_n, block_t], tl.float32))
            acc += product * factor[None, :]
        else:
            product = tl.dot(x, tl.trans(w), tl.zeros([block_t, block_n], tl.float32))
            acc += product * factor[:, None]
    if WEIGHTS_FIRST:
        acc = tl.trans(acc)
    return acc


@triton.jit
def _add_parts(acc, PARTS: tl.constexpr):
    """Sum of a power of two of matrices, in a fixed order: neighbours first.

    Halves are split off, so that all go through shared memory once, as Triton changes layouts.
    ``tl.sum`` across warps would have four words of a bank asked for at a time.
    """
    rows: tl.constexpr = acc.shape[1]
    columns: tl.constexpr = acc.shape[2]
    total = tl.permute(acc, (1, 2, 0))
    for level in tl.static_range(1, 8):
        if PARTS >> level > 0:
            pairs = tl.reshape(total, [rows, columns, PARTS >> level, 2])
            first, second = tl.split(pairs)
            total = first + second
    return tl.reshape(total, [rows, columns])


@triton.jit
def _sum_in_parts(
    x_row,
    inside,
    w_row,
    a_scale,
    a_scale_block,
    b_scale,
    b_scale_block,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """As :func:`_sum_together`, ``PARTS`` blocks of K a step.

    The product is a batch of ``PARTS`` matrices ``[outputs, tokens]``. Triton gives each warp whole
    matrices of a batch.
    """
    block_t: tl.constexpr = x_row.shape[0]
    block_n: tl.constexpr = w_row.shape[0]
    # Where the last step has fewer blocks, the rest of it is masked off.
    whole: tl.constexpr = BLOCKS % PARTS == 0
    part = tl.arange(0, PARTS)
    column = part[:, None, None] * _BLOCK + tl.arange(0, _BLOCK)[None, None, :]
    x_place = x_row[None, :, None] + column
    w_place = w_row[None, :, None] + column
    acc = tl.zeros([PARTS, block_n, block_t], tl.float32)
    block = tl.minimum(part, BLOCKS - 1).to(tl.int64)
    next_a = tl.load(a_scale[None, :] + block[:, None] * a_scale_block)
    next_b = tl.load(b_scale + block * b_scale_block)
    for step in range(0, tl.cdiv(BLOCKS, PARTS)):
        factor = next_a * _decode(next_b)[:, None]
        start = step * (PARTS * _BLOCK)
        if whole:
            x = tl.load(x_place + start, mask=inside[None, :, None], other=0.0)
            w = tl.load(w_place + start)
        else:
            there = step * PARTS + part < BLOCKS
            mask = there[:, None, None]
            x = tl.load(x_place + start, mask=mask & inside[None, :, None], other=0.0)
            w = tl.load(w_place + start, mask=mask, other=0.0)
            factor = tl.where(there[:, None], factor, 0.0)
        block = tl.minimum((step + 1) * PARTS + part, BLOCKS - 1).to(tl.int64)
        next_a = tl.load(a_scale[None, :] + block[:, None] * a_scale_block)
        next_b = tl.load(b_scale + block * b_scale_block)
        zero = tl.zeros([PARTS, block_n, block_t], tl.float32)
        acc += tl.dot(w, tl.permute(x, (0, 2, 1)), zero) * factor[:, None, :]
    return tl.trans(_add_parts(acc, PARTS))


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
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
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
        PARTS: As in :class:`~vllm_sm12x.ops.fp8_einsum.config.EinsumConfig`.
        DEPENDENT: The launch is a dependent one: it starts before the kernel ahead of it ends, and
            waits for that end before it reads what may be another kernel's result, or writes.
    """
    blocks: tl.constexpr = K // _BLOCK
    n_tiles: tl.constexpr = N // BLOCK_N
    token_tiles = tl.cdiv(tokens, BLOCK_T)
    tile = tl.program_id(0)
    n_tile = tile % n_tiles
    token_tile = (tile // n_tiles) % token_tiles
    group = (tile // (n_tiles * token_tiles)).to(tl.int64)

    row = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    w_row = b + group * b_group + row.to(tl.int64) * b_row
    if DEPENDENT:
        gdc_launch_dependents()
        # A row's values of one block are a line.
        line = tl.minimum(tl.arange(0, _PREFETCH), blocks - 1) * _BLOCK
        prefetch_l2(w_row[:, None] + line[None, :])
        gdc_wait()

    token = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < tokens
    # Lanes that are masked off get an address inside too.
    token = tl.where(inside, token, 0).to(tl.int64)
    x_row = a + group * a_group + token * a_token
    a_scale += group * a_scale_group + token * a_scale_token
    b_scale += group * b_scale_group + (n_tile * BLOCK_N // _BLOCK).to(tl.int64) * b_scale_row
    if PARTS == 1:
        result = _sum_together(
            x_row,
            inside,
            w_row,
            a_scale,
            a_scale_block,
            b_scale,
            b_scale_block,
            blocks,
            WEIGHTS_FIRST,
        )
    else:
        tl.static_assert(WEIGHTS_FIRST)
        result = _sum_in_parts(
            x_row,
            inside,
            w_row,
            a_scale,
            a_scale_block,
            b_scale,
            b_scale_block,
            blocks,
            PARTS,
        )
    tl.store(
        out + group * out_group + token[:, None] * out_token + row[None, :] * out_column,
        result.to(tl.bfloat16),
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
    options = lowering.launch_options(capability)
    if config.maxnreg is not None:
        options = {**options, "maxnreg": config.maxnreg}
    dependent = config.dependent and lowering.launches_overlap(capability)
    if dependent:
        options = {**options, "launch_pdl": True}
    launch(
        einsum_kernel,
        (groups * cdiv(tokens, config.block_t) * (n // config.block_n), 1, 1),
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
        PARTS=config.parts,
        DEPENDENT=dependent,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
