"""The Triton einsum kernel against the definition, as compiled for SM12x."""

from __future__ import annotations

import math

import pytest
import torch
from test_fp8_einsum import BLOCK, E4M3, compare, definition, draw
from tolerance import assert_unbiased

from vllm_sm12x.ops.fp8_einsum import fp8_einsum_bhr_hdr, kernel
from vllm_sm12x.ops.fp8_einsum.config import TABLE

ROWS = sorted({row for table in TABLE.values() for row in table.values()}, key=repr)


def run(*arguments, config=None):
    if config is None:
        fp8_einsum_bhr_hdr(*arguments, implementation="triton")
    else:
        kernel.fp8_einsum_bhr_hdr(*arguments, config)


def check(*arguments, config=None):
    run(*arguments, config=config)
    compare(*arguments)


@pytest.mark.parametrize("config", ROWS)
def test_every_row_of_the_table(config):
    """Around each tile of tokens; two blocks of outputs with scales of their own."""
    for num_tokens in (1, config.block_t - 1, config.block_t, config.block_t + 1):
        check(*draw(num_tokens, 2, 256, 256, seed=num_tokens), config=config)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 8, 9, 17, 33, 65])
@pytest.mark.parametrize(("groups", "k", "n"), [(1, 128, 128), (3, 384, 128)])
def test_equals_definition(num_tokens, groups, k, n):
    check(*draw(num_tokens, groups, k, n, seed=num_tokens))


def test_real_width():
    check(*draw(2, 1, 4096, 1024))


def test_hand_computed():
    a, a_scale, b, b_scale, out = draw(1, 2, 256, 256)
    a.view(torch.uint8).zero_()
    b.view(torch.uint8).zero_()
    # Group 1, output 130 (second block of N), input 72 (first block of K).
    a[0, 1, 72], b[256 + 130, 72] = 3.0, -1.5
    a_scale.fill_(7.0)
    a_scale[0, 1, 0] = 0.5
    b_scale.fill_(140)
    b_scale[2 + 1, 0] = 129
    run(a, a_scale, b, b_scale, out)
    expected = torch.zeros(1, 2, 256, dtype=torch.bfloat16)
    expected[0, 1, 130] = 3.0 * 0.5 * -1.5 * 4.0
    assert torch.equal(out, expected)


@pytest.mark.parametrize("num_tokens", [5, 70])
@pytest.mark.parametrize("weight_dims", [2, 3])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.uint8, torch.float8_e8m0fnu])
def test_every_layout_gives_the_same(num_tokens, weight_dims, scale_dtype):
    groups, k, n = 2, 256, 256
    a, a_scale, b, b_scale, out = draw(num_tokens, groups, k, n)
    run(a, a_scale, b, b_scale, out)

    # The engine's: groups outermost; scales with tokens innermost, padded to a multiple of four.
    engine_a = a.transpose(0, 1).contiguous().transpose(0, 1)
    padded = torch.full((groups, k // BLOCK, num_tokens + 3), math.nan)
    padded[..., :num_tokens] = a_scale.permute(1, 2, 0)
    engine_scale = padded.permute(2, 0, 1)[:num_tokens]

    if scale_dtype == torch.float32:
        b_scale = torch.exp2(b_scale.float() - 127)
    else:
        b_scale = b_scale.view(scale_dtype)
    # Weights with gaps between their rows, and where they have them between their groups.
    wide = torch.full((groups * n, k + 16), math.nan).to(E4M3)
    wide[:, :k] = b
    b = wide[:, :k]
    if weight_dims == 3:
        apart = torch.full((groups, n + 8, k), math.nan).to(E4M3)
        apart[:, :n] = b.unflatten(0, (groups, n))
        b = apart[:, :n]
        b_scale = b_scale.view(groups, n // BLOCK, k // BLOCK)
    # Scales stored with their last dimension outermost.
    b_scale = b_scale.movedim(-1, 0).contiguous().movedim(0, -1)
    beside = torch.full((num_tokens + 1, n, groups + 1), math.nan, dtype=torch.bfloat16)
    result = beside[:num_tokens, :, :groups].transpose(1, 2)
    run(engine_a, engine_scale, b, b_scale, result)
    assert torch.equal(result, out)
    assert beside[num_tokens].isnan().all() and beside[:, :, groups].isnan().all(), "beside `out`"


def test_scales_at_both_ends():
    a, a_scale, b, b_scale, out = draw(2, 1, 256, 128)
    # 2**-127, a subnormal float32, and 2**127; the activations' scales make up for them.
    b_scale[:] = torch.tensor([[0, 254]], dtype=torch.uint8)
    a_scale[..., 0], a_scale[..., 1] = 2.0**117, 2.0**-137
    b[:, BLOCK:] = (b[:, BLOCK:].float() / 256).to(E4M3)
    check(a, a_scale, b, b_scale, out)


@pytest.mark.parametrize("num_tokens", [3, 80])
def test_nan_stays_where_it_belongs(num_tokens):
    a, a_scale, b, b_scale, out = draw(num_tokens, 2, 256, 256)
    a_scale[1, 0, 1] = math.nan
    a[2, 1, 77] = math.nan
    b_scale[3, 1] = 255
    run(a, a_scale, b, b_scale, out)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[1, 0] = True
    expected[2, 1] = True
    expected[:, 1, 128:] = True
    assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize("num_tokens", [16, 65])
def test_unbiased(num_tokens):
    a, a_scale, b, b_scale, out = draw(num_tokens, 2, 512, 256)
    run(a, a_scale, b, b_scale, out)
    assert_unbiased(out, definition(a, a_scale, b, b_scale)[0])
