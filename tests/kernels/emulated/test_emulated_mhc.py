"""The Triton hyper-connection kernels against the definition, as compiled for SM12x."""

from __future__ import annotations

import math

import pytest
import torch
from mhc_checks import (
    check_fused,
    check_head,
    check_our_post,
    check_pre,
    check_prenorm_gemm,
    define_mix,
)
from test_mhc import EPS, MIX, ROUNDS, M, draw_mapping, draw_streams
from tolerance import assert_unbiased

from vllm_sm12x.ops import mhc
from vllm_sm12x.ops.mhc import launch
from vllm_sm12x.ops.mhc.config import FINISH_TABLE, MIX_TABLE, PostConfig

PAIRS = sorted(
    {
        (mix, FINISH_TABLE[target][name])
        for target, table in MIX_TABLE.items()
        for name, mix in table.items()
    },
    key=repr,
)
# Rounds of the iteration take the emulator's time, so that few tests have all.
PLAIN = dict(
    rms_eps=EPS,
    hc_pre_eps=EPS,
    hc_sinkhorn_eps=EPS,
    hc_post_mult_value=2.0,
    sinkhorn_repeat=2,
)
TRITON = dict(implementation="triton")


def mapping(hidden, seed=0, outputs=MIX, scales=3):
    names = ("fn", "hc_scale", "hc_base")
    return dict(zip(names, draw_mapping(hidden, seed, outputs, scales), strict=True))


def head_arguments(num_tokens, hidden):
    fn, scale, base = draw_mapping(hidden, outputs=M, scales=1)
    return dict(
        hidden_states=draw_streams(num_tokens, M, hidden, seed=num_tokens),
        hc_fn=fn,
        hc_scale=scale,
        hc_base=base,
        rms_norm_eps=0.3,
        hc_eps=0.01,
    )


def fused_arguments(num_tokens, hidden, seed=0, **more):
    return dict(
        x=draw_streams(num_tokens, hidden, seed=seed),
        residual=draw_streams(num_tokens, M, hidden, seed=seed + 1),
        post_layer_mix=draw_streams(num_tokens, M, 1, seed=seed + 2, dtype=torch.float32),
        comb_res_mix=draw_streams(num_tokens, M, M, seed=seed + 3, dtype=torch.float32),
        **mapping(hidden, seed),
        **{**PLAIN, **more},
    )


@pytest.mark.parametrize("config", PAIRS)
def test_every_row_of_the_tables(config):
    """Around each tile of tokens; fewer parts than the row has, and more."""
    mix, _ = config
    for num_tokens, hidden in ((1, 512), (mix.block_t + 1, 64)):
        given = fused_arguments(num_tokens, hidden, norm_weight=draw_streams(hidden), norm_eps=0.1)
        check_fused(given, launch.mhc_fused_post_pre(**given, config=config))


@pytest.mark.parametrize("num_tokens", [0, 1, 17])
@pytest.mark.parametrize("hidden", [8, 96])
@pytest.mark.parametrize("normed", [False, True])
def test_pre(num_tokens, hidden, normed):
    eps = dict(rms_eps=0.3, hc_pre_eps=0.01, hc_sinkhorn_eps=0.02)
    given = dict(
        residual=draw_streams(num_tokens, M, hidden, seed=num_tokens),
        **mapping(hidden, num_tokens),
        **eps,
        hc_post_mult_value=1.5,
        sinkhorn_repeat=3,
    )
    if normed:
        given |= dict(norm_weight=draw_streams(hidden), norm_eps=0.7)
    check_pre(given, mhc.mhc_pre(**given, **TRITON))


@pytest.mark.parametrize("rounds", [1, 2, ROUNDS])
def test_rounds(rounds):
    given = dict(
        residual=draw_streams(3, M, 64), **mapping(64), **PLAIN | dict(sinkhorn_repeat=rounds)
    )
    check_pre(given, mhc.mhc_pre(**given, **TRITON))


def test_pre_hand_computed():
    # With no mapping and no base every gate is 1/2, every post weight 2/2 and the mix is uniform.
    residual = torch.tensor([[[1.0, 2.0], [3.0, -4.0], [5.0, 6.0], [7.0, 8.0]]]).bfloat16()
    nothing = torch.zeros(MIX, 2 * M), torch.ones(3), torch.zeros(MIX)
    post_mix, comb_mix, layer_input = mhc.mhc_pre(
        residual, *nothing, 0.0, 0.0, 0.0, 2.0, 2, **TRITON
    )
    assert layer_input.tolist() == [[8.0, 6.0]]
    assert torch.equal(post_mix, torch.ones(1, M, 1))
    torch.testing.assert_close(comb_mix, torch.full((1, M, M), 0.25), atol=1e-6, rtol=0)


def test_logits_hand_computed():
    """One number of the mapping at a time shows where each logit goes."""
    residual = torch.ones(1, M, 16).bfloat16()
    for output in range(MIX):
        fn = torch.zeros(MIX, M * 16)
        fn[output, 37] = math.log(3.0)  # stream 2; the streams' root mean square is 1
        post, comb, layer_input = mhc.mhc_pre(
            residual, fn, torch.ones(3), torch.zeros(MIX), 0.0, 0.0, 0.0, 2.0, 1, **TRITON
        )
        gates, posts, mix = [0.5] * M, [1.0] * M, torch.full((M, M), 0.25)
        if output < M:
            gates[output] = 0.75  # 1 / (1 + 1/3)
        elif output < 2 * M:
            posts[output - M] = 1.5
        else:
            row, column = divmod(output - 2 * M, M)
            mix[row] = 1 / 6
            mix[row, column] = 1 / 2
            mix = mix / mix.sum(0)
        assert layer_input.eq(torch.tensor(sum(gates)).bfloat16()).all()
        torch.testing.assert_close(post.flatten(), torch.tensor(posts), atol=1e-5, rtol=0)
        torch.testing.assert_close(comb[0], mix, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
@pytest.mark.parametrize("hidden", [24, 1040])
@pytest.mark.parametrize("squeezed", [False, True])
def test_post(num_tokens, hidden, squeezed):
    given = {
        name: value
        for name, value in fused_arguments(num_tokens, hidden).items()
        if name in ("x", "residual", "post_layer_mix", "comb_res_mix")
    }
    expected = dict(given)
    if squeezed:
        given["post_layer_mix"] = given["post_layer_mix"].squeeze(-1)
    check_our_post(expected, mhc.mhc_post(**given, **TRITON))
    check_our_post(expected, launch.mhc_post(**given, config=PostConfig(16, 1)))


@pytest.mark.parametrize("num_tokens", [1, 17, 65, 513])
def test_a_stream_does_not_depend_on_the_kernel_that_makes_it(num_tokens):
    """Two products that cancel show which one is rounded before they are added."""
    given = fused_arguments(num_tokens, 32)
    given["x"].fill_(1 + 2.0**-7)
    given["residual"].fill_(-1 - 2.0**-7)
    given["post_layer_mix"].fill_(1 + 2.0**-23)
    given["comb_res_mix"].zero_()[:, 0] = 1.0
    new = mhc.mhc_fused_post_pre(**given, **TRITON)[0]
    # The first one is: it loses what is below 2**-23.
    assert new.eq(2.0**-23).all()
    names = ("x", "residual", "post_layer_mix", "comb_res_mix")
    assert torch.equal(new, mhc.mhc_post(**{name: given[name] for name in names}, **TRITON))


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("hidden", [40, 64])
@pytest.mark.parametrize("normed", [False, True])
def test_fused(num_tokens, hidden, normed):
    more = dict(norm_weight=draw_streams(hidden), norm_eps=0.1) if normed else {}
    given = fused_arguments(num_tokens, hidden, **more)
    check_fused(given, mhc.mhc_fused_post_pre(**given, **TRITON))


@pytest.mark.parametrize("num_tokens", [0, 1, 17])
@pytest.mark.parametrize("hidden", [40, 64])
def test_head(num_tokens, hidden):
    given = head_arguments(num_tokens, hidden)
    check_head(given, mhc.hc_head(**given, **TRITON))


@pytest.mark.parametrize("num_tokens", [0, 1, 18])
@pytest.mark.parametrize("outputs", [1, MIX, 32])
@pytest.mark.parametrize("n_splits", [1, 8])
def test_prenorm_gemm(num_tokens, outputs, n_splits):
    x = draw_streams(num_tokens, 320)
    fn = draw_streams(outputs, 320, seed=1, dtype=torch.float32)
    out = torch.full((n_splits, num_tokens, outputs), math.nan)
    sqrsum = torch.full((n_splits, num_tokens), math.nan)
    mhc.hc_prenorm_gemm(x, fn, out, sqrsum, n_splits, **TRITON)
    check_prenorm_gemm(x, fn, out, sqrsum)


def test_prenorm_gemm_into_strided_results():
    x, fn = draw_streams(5, 64), draw_streams(MIX, 64, seed=1, dtype=torch.float32)
    out = torch.full((2, MIX, 5), math.nan).mT
    sqrsum = torch.full((5, 3), math.nan)
    mhc.hc_prenorm_gemm(x, fn, out, sqrsum.T[:2], 2, **TRITON)
    check_prenorm_gemm(x, fn, out, sqrsum.T[:2])
    assert sqrsum[:, 2].isnan().all(), "beside `sqrsum`"


def test_the_mapping_keeps_its_lower_bits():
    """Numbers that bfloat16 cannot tell apart, against streams that leave only their difference."""
    fn = torch.full((MIX, 64), 1.0)
    fn[:, ::2] += 2.0**-12
    x = torch.ones(2, 64).bfloat16()
    x[:, 1::2] = -1
    out, sqrsum = torch.full((1, 2, MIX), math.nan), torch.full((1, 2), math.nan)
    mhc.hc_prenorm_gemm(x, fn, out, sqrsum, 1, **TRITON)
    torch.testing.assert_close(out, torch.full_like(out, 32 * 2.0**-12), rtol=1e-5, atol=0)


def test_leading_dimensions_and_strides_are_free():
    hidden = 32
    residual, given = draw_streams(2, 3, hidden, M).mT, mapping(hidden)
    x = draw_streams(2, hidden, 3).mT
    flat = residual.reshape(6, M, hidden).contiguous()
    ours = mhc.mhc_pre(residual, **given, **PLAIN, **TRITON)
    expected = mhc.mhc_pre(flat, **given, **PLAIN, **TRITON)
    for actual, other in zip(ours, expected, strict=True):
        assert torch.equal(actual, other.view(2, 3, *other.shape[1:]))
    mixes = [mix.mT.contiguous().mT for mix in ours[:2]]
    out = mhc.mhc_fused_post_pre(x, residual, *mixes, **given, **PLAIN, **TRITON)
    other = mhc.mhc_fused_post_pre(
        x.reshape(6, hidden), flat, *expected[:2], **given, **PLAIN, **TRITON
    )
    for actual, wanted in zip(out, other, strict=True):
        assert torch.equal(actual, wanted.view(2, 3, *wanted.shape[1:]))
    assert torch.equal(mhc.mhc_post(x, residual, *mixes, **TRITON), out[0])


def test_norm_weight_is_used_as_bfloat16():
    residual = draw_streams(3, M, 64)
    weight = torch.randn(64, generator=torch.Generator().manual_seed(5))
    given = dict(residual=residual, **mapping(64), **PLAIN, **TRITON)
    rounded = mhc.mhc_pre(**given, norm_weight=weight.bfloat16())
    assert torch.equal(mhc.mhc_pre(**given, norm_weight=weight)[2], rounded[2])


def test_a_normed_input_is_rounded_twice():
    """It is not biased, and is nearly always what two roundings in the same places give."""
    given = dict(
        residual=draw_streams(9, M, 512),
        **mapping(512),
        **PLAIN,
        norm_weight=draw_streams(512, seed=4),
    )
    found = mhc.mhc_pre(**given, **TRITON)[2]
    same = mhc.mhc_pre(**given)[2]
    # With one rounding, about a third of the results would be another number.
    assert found.eq(same).double().mean() > 0.95
    wide = {
        name: value.double() if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }
    logits, _ = define_mix(*(wide[n] for n in ("residual", "fn", "hc_scale", "hc_base", "rms_eps")))
    gates = torch.sigmoid(logits[:, :M]) + EPS
    collapsed = (gates.unsqueeze(-1) * wide["residual"]).sum(1)
    root = (collapsed.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_unbiased(found, collapsed / root * wide["norm_weight"])


def test_nan_stays_with_its_token():
    given = fused_arguments(9, 64)
    given["residual"][5, 1, 7] = math.nan
    expected = torch.arange(9) == 5
    for result in mhc.mhc_fused_post_pre(**given, norm_weight=draw_streams(64), **TRITON):
        assert torch.equal(result.isnan().flatten(1).any(1), expected)
    head = head_arguments(9, 64)
    head["hidden_states"][5, 3, 60] = math.nan
    assert torch.equal(mhc.hc_head(**head, **TRITON).isnan().all(1), expected)


def test_large_logits_stay_finite():
    given = mapping(64) | dict(hc_scale=torch.full((3,), 1e4))
    for result in mhc.mhc_pre(draw_streams(4, M, 64) * 1e30, **given, **PLAIN, **TRITON):
        assert result.isfinite().all()


def test_another_number_of_streams_is_refused():
    fn, scale, base = torch.zeros(8, 2 * 16), torch.zeros(3), torch.zeros(8)
    with pytest.raises(ValueError, match="residual: 2 streams, allowed in the Triton kernels: 4"):
        mhc.mhc_pre(draw_streams(3, 2, 16), fn, scale, base, **PLAIN, **TRITON)
