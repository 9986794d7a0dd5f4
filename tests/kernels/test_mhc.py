import itertools
import math

import pytest
import torch
from capture import record, replay_on_gpu
from tolerance import assert_close_to_reference
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_sm12x.ops import mhc
from vllm_sm12x.ops.mhc import reference

M, ROUNDS, EPS = 4, 20, 1e-6
MIX = M * (2 + M)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def define_pre(
    residual,
    fn,
    hc_scale,
    hc_base,
    *,
    rms_eps,
    pre_eps,
    sinkhorn_eps,
    post_value,
    rounds,
):
    """One token, with Python's floats: ``residual`` [M, H]; gates, post weights, mix and input."""
    streams = residual.double().tolist()
    m, h = len(streams), len(streams[0])
    flat = [value for stream in streams for value in stream]
    rms = math.sqrt(sum(value * value for value in flat) / len(flat) + rms_eps)
    rows = fn.double().tolist()
    logits = [sum(w * v for w, v in zip(row, flat, strict=True)) / rms for row in rows]
    scale, base = hc_scale.double().tolist(), hc_base.double().tolist()
    pre = [sigmoid(logits[j] * scale[0] + base[j]) + pre_eps for j in range(m)]
    post = [sigmoid(logits[m + j] * scale[1] + base[m + j]) * post_value for j in range(m)]
    mix = [[logits[i] * scale[2] + base[i] for i in range(2 * m + r * m, 2 * m + r * m + m)]
           for r in range(m)]  # fmt: skip
    for row in mix:
        exponentials = [math.exp(value - max(row)) for value in row]
        row[:] = [value / sum(exponentials) + sinkhorn_eps for value in exponentials]
    for step in range(rounds):
        if step:
            for row in mix:
                total = sum(row) + sinkhorn_eps
                row[:] = [value / total for value in row]
        for c in range(m):
            total = sum(row[c] for row in mix) + sinkhorn_eps
            for row in mix:
                row[c] /= total
    collapsed = [sum(pre[j] * streams[j][i] for j in range(m)) for i in range(h)]
    return pre, post, mix, collapsed


def as_tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def draw_mapping(hidden, seed=0, outputs=MIX, scales=3):
    g = torch.Generator().manual_seed(seed)
    fn = torch.randn(outputs, M * hidden, generator=g) / math.sqrt(M * hidden)
    return fn, torch.randn(scales, generator=g), torch.randn(outputs, generator=g)


def draw_streams(*shape, seed=0, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(1000 + seed)
    return (torch.randn(*shape, generator=g) * 3).to(dtype)


def pre(residual, mapping, rounds=ROUNDS, **more):
    return mhc.mhc_pre(residual, *mapping, EPS, EPS, EPS, 2.0, rounds, **more)


def logit_roundings(hidden):
    """Roundings on the way to a mix weight: the product, the norm, then a few a round."""
    return 2 * M * hidden + 10 * ROUNDS + 20


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 5])
@pytest.mark.parametrize("hidden", [8, 96])
@pytest.mark.parametrize("normed", [False, True])
def test_pre_equals_definition(num_tokens, hidden, normed):
    residual = draw_streams(num_tokens, M, hidden, seed=num_tokens)
    mapping = draw_mapping(hidden, seed=num_tokens)
    eps = {"rms_eps": 0.3, "pre_eps": 0.01, "sinkhorn_eps": 0.02}
    weight = draw_streams(hidden) if normed else None
    post_mix, comb_mix, layer_input = mhc.mhc_pre(
        residual, *mapping, *eps.values(), 1.5, 3, norm_weight=weight, norm_eps=0.7
    )
    assert post_mix.shape == (num_tokens, M, 1)
    assert comb_mix.shape == (num_tokens, M, M)
    assert layer_input.shape == (num_tokens, hidden)
    for t in range(num_tokens):
        gates, post, mix, collapsed = define_pre(
            residual[t], *mapping, **eps, post_value=1.5, rounds=3
        )
        steps = logit_roundings(hidden)
        logit = float((mapping[0].abs() @ residual[t].double().flatten().abs().float()).max())
        for actual, expected in ((post_mix[t, :, 0], post), (comb_mix[t], mix)):
            assert_close_to_reference(
                actual,
                as_tensor(expected),
                dtype=torch.float32,
                reduction_length=steps,
                scale=1 + logit,
            )
        expected = as_tensor(collapsed)
        magnitude = as_tensor(gates) @ residual[t].double().abs() * (1 + logit)
        if normed:
            factor = weight.double() / math.sqrt(expected.square().mean() + 0.7)
            expected, magnitude = expected * factor, magnitude * factor.abs()
        assert_close_to_reference(
            layer_input[t],
            expected,
            dtype=torch.bfloat16,
            reduction_length=steps,
            scale=magnitude,
            # With a norm, the collapsed streams are rounded before.
            operand_dtype=torch.bfloat16 if normed else None,
        )


def test_pre_hand_computed():
    # With no mapping and no base every gate is 1/2, every post weight 2/2 and the mix is uniform.
    residual = torch.tensor([[[1.0, 2.0], [3.0, -4.0], [5.0, 6.0], [7.0, 8.0]]]).bfloat16()
    mapping = torch.zeros(MIX, 2 * M), torch.ones(3), torch.zeros(MIX)
    post_mix, comb_mix, layer_input = mhc.mhc_pre(residual, *mapping, 0.0, 0.0, 0.0, 2.0, ROUNDS)
    assert layer_input.tolist() == [[8.0, 6.0]]
    assert post_mix.tolist() == [[[1.0]] * M]
    assert comb_mix.tolist() == [[[0.25] * M] * M]


def test_norm_takes_the_mean_square_before_the_rounding():
    # Half of 256 + 256 + 2 is 257, which rounds to 256 in bfloat16.
    residual = torch.tensor([[[256.0], [256.0], [2.0], [0.0]]]).bfloat16()
    mapping = torch.zeros(MIX, M), torch.ones(3), torch.zeros(MIX)
    weight = torch.tensor([1.0]).bfloat16()
    _, _, layer_input = mhc.mhc_pre(
        residual, *mapping, 0.0, 0.0, 0.0, 2.0, ROUNDS, norm_weight=weight, norm_eps=0.0
    )
    assert layer_input.item() == torch.tensor(256 / 257).bfloat16().item() != 1.0


def test_norm_weight_is_used_as_bfloat16():
    residual, mapping = draw_streams(3, M, 64), draw_mapping(64)
    weight = torch.randn(64, generator=torch.Generator().manual_seed(5))
    rounded = pre(residual, mapping, norm_weight=weight.bfloat16())
    given = pre(residual, mapping, norm_weight=weight)
    assert torch.equal(given[2], rounded[2])


def test_mix_is_doubly_stochastic():
    fn, _, base = draw_mapping(128)
    scale = torch.tensor([1.0, 1.0, 0.5])
    base = base / 2
    _, comb_mix, _ = pre(draw_streams(64, M, 128), (fn, scale, base))
    assert (comb_mix > 0).all()
    # The columns come last, so that only eps separates them from 1; the rows converge.
    one = torch.ones(64, M)
    torch.testing.assert_close(comb_mix.sum(1), one, atol=1e-5, rtol=0)
    torch.testing.assert_close(comb_mix.sum(2), one, atol=1e-4, rtol=0)
    once = pre(draw_streams(64, M, 128), (fn, scale, base), rounds=1)[1]
    assert (once.sum(2) - 1).abs().max() > 10 * (comb_mix.sum(2) - 1).abs().max()


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
@pytest.mark.parametrize("squeezed", [False, True])
def test_post_equals_definition(num_tokens, squeezed):
    hidden = 24
    x, residual = (
        draw_streams(num_tokens, hidden),
        draw_streams(num_tokens, M, hidden, seed=1),
    )
    post_mix = draw_streams(num_tokens, M, 1, seed=2, dtype=torch.float32)
    comb_mix = draw_streams(num_tokens, M, M, seed=3, dtype=torch.float32)
    given = post_mix.squeeze(-1) if squeezed else post_mix
    out = mhc.mhc_post(x, residual, given, comb_mix)
    expected = torch.full((num_tokens, M, hidden), math.nan, dtype=torch.float64)
    magnitude = expected.clone()
    for t, j, h in itertools.product(range(num_tokens), range(M), range(hidden)):
        terms = [post_mix[t, j, 0].item() * x[t, h].item()]
        terms += [comb_mix[t, i, j].item() * residual[t, i, h].item() for i in range(M)]
        expected[t, j, h], magnitude[t, j, h] = sum(terms), sum(map(abs, terms))
    assert_close_to_reference(
        out, expected, dtype=torch.bfloat16, reduction_length=M + 2, scale=magnitude
    )


def test_post_hand_computed():
    # The mix moves stream 0 to 1, 1 to 2, 2 to 3 and 3 to 0; stream 2 alone takes the output.
    residual = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]).bfloat16()
    comb_mix = torch.eye(M).roll(1, dims=1)[None]
    post_mix = torch.tensor([[[0.0], [0.0], [10.0], [0.0]]])
    out = mhc.mhc_post(torch.tensor([[0.5]]).bfloat16(), residual, post_mix, comb_mix)
    assert out.flatten().tolist() == [4.0, 1.0, 7.0, 3.0]


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("normed", [False, True])
def test_fused_is_post_then_pre(num_tokens, normed):
    hidden = 64
    x, residual = (
        draw_streams(num_tokens, hidden),
        draw_streams(num_tokens, M, hidden, seed=1),
    )
    mapping = draw_mapping(hidden)
    post_mix, comb_mix, _ = pre(draw_streams(num_tokens, M, hidden, seed=2), mapping)
    norm = {"norm_weight": draw_streams(hidden), "norm_eps": 0.1} if normed else {}
    fused = mhc.mhc_fused_post_pre(
        x, residual, post_mix, comb_mix, *mapping, EPS, EPS, EPS, 2.0, ROUNDS, **norm
    )
    streams = mhc.mhc_post(x, residual, post_mix, comb_mix)
    assert streams.dtype == torch.bfloat16
    for actual, expected in zip(fused, (streams, *pre(streams, mapping, **norm)), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("num_tokens", [0, 1, 4])
def test_head_equals_definition(num_tokens):
    hidden = 40
    streams = draw_streams(num_tokens, M, hidden)
    fn, scale, base = draw_mapping(hidden, outputs=M, scales=1)
    out = mhc.hc_head(streams, fn, scale, base, 0.3, 0.01)
    assert out.shape == (num_tokens, hidden)
    padded_fn = torch.cat((fn, torch.zeros(MIX - M, M * hidden)))
    padded_base = torch.cat((base, torch.zeros(MIX - M)))
    for t in range(num_tokens):
        gates, _, _, collapsed = define_pre(
            streams[t], padded_fn, scale.repeat(3), padded_base,
            rms_eps=0.3, pre_eps=0.01, sinkhorn_eps=EPS, post_value=1.0, rounds=1,
        )  # fmt: skip
        logit = float((fn.abs() @ streams[t].flatten().float().abs()).max())
        assert_close_to_reference(
            out[t],
            as_tensor(collapsed),
            dtype=torch.bfloat16,
            reduction_length=logit_roundings(hidden),
            scale=as_tensor(gates) @ streams[t].double().abs() * (1 + logit),
        )


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("n_splits", [1, 2, 8])
def test_prenorm_gemm_equals_definition(num_tokens, n_splits):
    x = draw_streams(num_tokens, 64)
    fn = draw_streams(MIX, 64, seed=1, dtype=torch.float32)
    out = torch.full((n_splits, num_tokens, MIX), math.nan)
    sqrsum = torch.full((n_splits, num_tokens), math.nan)
    mhc.hc_prenorm_gemm(x, fn, out, sqrsum, n_splits)
    width = 64 // n_splits
    for split in range(n_splits):
        part = slice(split * width, (split + 1) * width)
        xs, fs = x[:, part].double(), fn[:, part].double()
        bounds = {"dtype": torch.float32, "reduction_length": width + 1}
        assert_close_to_reference(out[split], xs @ fs.T, **bounds, scale=xs.abs() @ fs.abs().T)
        assert_close_to_reference(sqrsum[split], (xs * xs).sum(1), **bounds, scale=(xs * xs).sum(1))


@pytest.mark.parametrize("hidden", [256, 4096])
def test_equals_vllm_torch(hidden):
    theirs = pytest.importorskip(
        "vllm.model_executor.kernels.mhc.torch", reason="vLLM is not installed"
    )
    residual, mapping = draw_streams(6, M, hidden), draw_mapping(hidden)
    ours = pre(residual, mapping)
    expected = theirs.mhc_pre_torch(residual, *mapping, EPS, EPS, EPS, 2.0, ROUNDS)
    for actual, other in zip(ours, expected, strict=True):
        assert actual.shape == other.shape and actual.dtype == other.dtype
        torch.testing.assert_close(actual, other)
    x = draw_streams(6, hidden, seed=3)
    torch.testing.assert_close(
        mhc.mhc_post(x, residual, *ours[:2]),
        theirs.mhc_post_torch(x, residual, *ours[:2]),
    )


def test_equals_transformers():
    theirs = pytest.importorskip(
        "transformers.models.deepseek_v4.modeling_deepseek_v4",
        reason="transformers is too old",
    )
    hidden = 256
    config = theirs.DeepseekV4Config(hidden_size=hidden)
    assert (config.hc_mult, config.hc_sinkhorn_iters, config.hc_eps) == (M, ROUNDS, EPS)
    residual, mapping = draw_streams(6, M, hidden), draw_mapping(hidden)
    connection = theirs.DeepseekV4HyperConnection(config)
    head = theirs.DeepseekV4HyperHead(config)
    head_mapping = draw_mapping(hidden, outputs=M, scales=1)
    with torch.no_grad():
        for name, value in zip(("fn", "scale", "base"), mapping, strict=True):
            getattr(connection, name).copy_(value)
        for name, value in zip(("fn", "scale", "base"), head_mapping, strict=True):
            getattr(head, f"hc_{name}").copy_(value)
        post, comb, collapsed = connection(residual[None])
        head_out = head(residual[None])
    ours = mhc.mhc_pre(residual[None], *mapping, config.rms_norm_eps, EPS, EPS, 2.0, ROUNDS)
    torch.testing.assert_close(ours[0].squeeze(-1), post)
    torch.testing.assert_close(ours[1], comb)
    torch.testing.assert_close(ours[2], collapsed)
    torch.testing.assert_close(
        mhc.hc_head(residual[None], *head_mapping, config.rms_norm_eps, EPS), head_out
    )


def test_leading_dimensions_and_strides_are_free():
    hidden = 32
    storage = draw_streams(2, 3, hidden, M)
    residual, mapping = storage.mT, draw_mapping(hidden)
    x = draw_streams(2, hidden, 3).mT
    flat = residual.reshape(6, M, hidden).contiguous()
    ours, expected = pre(residual, mapping), pre(flat, mapping)
    for actual, other in zip(ours, expected, strict=True):
        assert torch.equal(actual, other.view(2, 3, *other.shape[1:]))
    mixes = [mix.mT.contiguous().mT for mix in ours[:2]]
    out = mhc.mhc_post(x, residual, *mixes)
    other = mhc.mhc_post(x.reshape(6, hidden), flat, *expected[:2])
    assert torch.equal(out.view(6, M, hidden), other)
    head_mapping = draw_mapping(hidden, outputs=M, scales=1)
    out = mhc.hc_head(residual, *head_mapping, EPS, EPS)
    assert torch.equal(out.view(6, hidden), mhc.hc_head(flat, *head_mapping, EPS, EPS))


def test_launch_parameters_change_nothing():
    residual, mapping = draw_streams(3, M, 64), draw_mapping(64)
    x = draw_streams(3, 64, seed=1)
    first = pre(residual, mapping)
    arguments = (x, residual, *first[:2], *mapping, EPS, EPS, EPS, 2.0, ROUNDS)
    for ours, other in (
        (first, pre(residual, mapping, n_splits=8)),
        (mhc.mhc_fused_post_pre(*arguments), mhc.mhc_fused_post_pre(*arguments, 4, 3)),
    ):
        for actual, expected in zip(ours, other, strict=True):
            assert torch.equal(actual, expected)


def test_nan_stays_with_its_token():
    residual, mapping = draw_streams(5, M, 64), draw_mapping(64)
    residual[2, 1, 7] = math.nan
    expected = torch.arange(5) == 2
    ours = pre(residual, mapping, norm_weight=draw_streams(64))
    for result in ours:
        assert torch.equal(result.isnan().flatten(1).any(1), expected)
    out = mhc.hc_head(residual, *draw_mapping(64, outputs=M, scales=1), EPS, EPS)
    assert torch.equal(out.isnan().all(1), expected)


def test_large_logits_stay_finite():
    fn, _, base = draw_mapping(64)
    residual = draw_streams(4, M, 64) * 1e30
    for result in pre(residual, (fn, torch.full((3,), 1e4), base)):
        assert result.isfinite().all()


@pytest.mark.parametrize("budget", [1, 3 * 4 * M * 64 * 2])
def test_chunks_give_the_same(budget, monkeypatch):
    residual, mapping = draw_streams(5, M, 64), draw_mapping(64)
    x = draw_streams(5, 64, seed=1)
    whole = pre(residual, mapping)
    whole_post = mhc.mhc_post(x, residual, *whole[:2])
    monkeypatch.setattr(reference, "SCRATCH_BUDGET_BYTES", budget)
    assert reference.token_chunk(5, M, 64) == (1 if budget == 1 else 2)
    for actual, expected in zip(pre(residual, mapping), whole, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=False)
    assert torch.equal(mhc.mhc_post(x, residual, *whole[:2]), whole_post)
    # On top of the scratch: the results, and what does not grow with the hidden size.
    results = sum(result.nbytes for result in whole)
    fixed = 2**12
    scratch = reference.scratch_bytes(5, M, 64)
    held = record(mhc.mhc_pre, residual, *mapping, EPS, EPS, EPS, 2.0, ROUNDS).peak_bytes
    assert held <= scratch + results + fixed
    held = record(mhc.mhc_post, x, residual, *whole[:2]).peak_bytes
    assert held <= scratch + residual.nbytes + fixed


@pytest.mark.parametrize("num_tokens", [1, 8192])
def test_real_shapes_stay_within_the_budget(num_tokens):
    assert 0 < reference.scratch_bytes(num_tokens, M, 4096) <= reference.SCRATCH_BUDGET_BYTES


def test_the_same_work_whatever_the_values():
    def traces(residual, x):
        mapping = draw_mapping(64)
        mixes = torch.rand(3, M, 1), torch.rand(3, M, M)
        weight = torch.ones(64).bfloat16()
        out, sqrsum = torch.empty(2, 3, MIX), torch.empty(2, 3)
        calls = [
            lambda: mhc.mhc_fused_post_pre(
                x, residual, *mixes, *mapping, EPS, EPS, EPS, 2.0, 3, norm_weight=weight
            ),
            lambda: mhc.hc_head(residual, mapping[0][:M], mapping[1][:1], mapping[2][:M], EPS, EPS),
            lambda: mhc.hc_prenorm_gemm(residual.flatten(1), mapping[0], out, sqrsum, 2),
        ]
        return [record(call).calls for call in calls]

    usual = traces(draw_streams(3, M, 64), draw_streams(3, 64))
    assert usual == traces(draw_streams(3, M, 64) * math.nan, torch.zeros(3, 64).bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"residual": draw_streams(2, M, 8).float()},
            "residual: dtype torch.float32, allowed",
        ),
        (
            {"residual": draw_streams(8)},
            r"residual: shape \(8,\), allowed: \(\.\.\., hc_mult",
        ),
        ({"residual": draw_streams(2, M, 0)}, r"residual: shape \(2, 4, 0\)"),
        ({"fn": torch.zeros(MIX, 8)}, r"fn: shape \(24, 8\), allowed: \(24, 32\)"),
        (
            {"fn": torch.zeros(MIX, 32).bfloat16()},
            r"fn: dtype torch\.bfloat16, allowed",
        ),
        ({"hc_scale": torch.zeros(2)}, r"hc_scale: shape \(2,\), allowed: \(3\)"),
        ({"hc_base": torch.zeros(4)}, r"hc_base: shape \(4,\), allowed: \(24\)"),
        (
            {"hc_base": torch.zeros(MIX, device="meta")},
            "hc_base: device meta, allowed: cpu",
        ),
        ({"sinkhorn_repeat": 0}, "sinkhorn_repeat: 0, allowed: 1 and more"),
        (
            {"norm_weight": torch.zeros(4).bfloat16()},
            r"norm_weight: shape \(4,\), allowed: \(8\)",
        ),
        (
            {"norm_weight": torch.zeros(8).half()},
            r"norm_weight: dtype torch\.float16, allowed",
        ),
        ({"x": draw_streams(2, 9)}, r"x: shape \(2, 9\), allowed: \(2, 8\)"),
        ({"x": draw_streams(2, 8).float()}, r"x: dtype torch\.float32, allowed"),
        (
            {"post_layer_mix": torch.zeros(2, M, 2)},
            r"post_layer_mix: shape .*allowed: \(2, 4, 1\)",
        ),
        (
            {"post_layer_mix": torch.zeros(2, 3)},
            r"post_layer_mix: shape .*allowed: \(2, 4\)",
        ),
        (
            {"comb_res_mix": torch.zeros(2, 16)},
            r"comb_res_mix: shape .*allowed: \(2, 4, 4\)",
        ),
        ({"comb_res_mix": None}, "comb_res_mix: expected a tensor, got NoneType"),
    ],
)
def test_bad_argument_is_named(change, message):
    mapping = dict(zip(("fn", "hc_scale", "hc_base"), draw_mapping(8), strict=True))
    arguments = {
        "x": draw_streams(2, 8),
        "residual": draw_streams(2, M, 8),
        "post_layer_mix": torch.zeros(2, M, 1),
        "comb_res_mix": torch.zeros(2, M, M),
        **mapping,
        "rms_eps": EPS,
        "hc_pre_eps": EPS,
        "hc_sinkhorn_eps": EPS,
        "hc_post_mult_value": 2.0,
        "sinkhorn_repeat": 2,
    } | change
    post_names = ("x", "post_layer_mix", "comb_res_mix")
    with pytest.raises(ValueError, match=message):
        mhc.mhc_fused_post_pre(**arguments)
    alone = {name: value for name, value in arguments.items() if name not in post_names}
    if change.keys().isdisjoint(post_names):
        with pytest.raises(ValueError, match=message):
            mhc.mhc_pre(**alone)
    else:
        with pytest.raises(ValueError, match=message):
            mhc.mhc_post(*(arguments[name] for name in ("x", "residual", *post_names[1:])))


def test_bad_head_and_gemm_arguments_are_named():
    streams = draw_streams(2, M, 8)
    fn, scale, base = draw_mapping(8, outputs=M, scales=1)
    with pytest.raises(ValueError, match=r"hc_fn: shape \(3, 32\), allowed: \(4, 32\)"):
        mhc.hc_head(streams, fn[:3], scale, base, EPS, EPS)
    with pytest.raises(ValueError, match=r"hc_scale: shape \(3,\), allowed: \(1\)"):
        mhc.hc_head(streams, fn, scale.repeat(3), base, EPS, EPS)
    with pytest.raises(ValueError, match=r"hidden_states: dtype torch\.float32"):
        mhc.hc_head(streams.float(), fn, scale, base, EPS, EPS)
    x, out, sqrsum = streams.flatten(1), torch.empty(3, 2, M), torch.empty(3, 2)
    with pytest.raises(ValueError, match="n_splits: 3, allowed: divisors of K=32"):
        mhc.hc_prenorm_gemm(x, fn, out, sqrsum, 3)
    with pytest.raises(ValueError, match=r"out: shape \(3, 2, 4\), allowed: \(2, T=2, N=4\)"):
        mhc.hc_prenorm_gemm(x, fn, out, sqrsum, 2)


def fused_arguments(num_tokens, hidden, seed):
    streams = draw_streams(num_tokens, M, hidden, seed=seed)
    mixes = [draw_streams(num_tokens, M, n, seed=seed, dtype=torch.float32) for n in (1, M)]
    fn, hc_scale, hc_base = draw_mapping(hidden, seed=seed)
    return {
        "x": draw_streams(num_tokens, hidden, seed=seed),
        "residual": streams,
        "post_layer_mix": mixes[0],
        "comb_res_mix": mixes[1],
        "fn": fn,
        "hc_scale": hc_scale,
        "hc_base": hc_base,
        "rms_eps": EPS,
        "hc_pre_eps": EPS,
        "hc_sinkhorn_eps": EPS,
        "hc_post_mult_value": 2.0,
        "sinkhorn_repeat": ROUNDS,
        "norm_weight": draw_streams(hidden, seed=seed),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 6, 130])
def test_a_captured_graph_follows_its_inputs(num_tokens):
    first, second = (fused_arguments(num_tokens, 4096, seed) for seed in (1, 2))
    results, _ = replay_on_gpu(mhc.mhc_fused_post_pre, first, second)
    for actual, expected in zip(results, mhc.mhc_fused_post_pre(**second), strict=True):
        torch.testing.assert_close(actual.cpu(), expected)


def test_runs_on_a_fake_gpu():
    """Devices and shapes fit without values, at the engine's size."""
    with FakeTensorMode():
        arguments = {
            name: value.cuda() if isinstance(value, torch.Tensor) else value
            for name, value in fused_arguments(64, 4096, 0).items()
        }
        results = mhc.mhc_fused_post_pre(**arguments)
        assert {result.device.type for result in results} == {"cuda"}
        head = mhc.hc_head(
            results[0], arguments["fn"][:M], arguments["hc_scale"][:1], arguments["hc_base"][:M],
            EPS, EPS,
        )  # fmt: skip
        assert head.shape == (64, 4096)
