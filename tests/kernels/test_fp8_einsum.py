import math

import pytest
import torch
from capture import record, replay_on_gpu
from tolerance import assert_close_to_reference, assert_unbiased
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_sm12x.ops.fp8_einsum import fp8_einsum_bhr_hdr, reference

BLOCK = 128
E4M3 = torch.float8_e4m3fn


def definition(a, a_scale, b, b_scale):
    """Sums of products of one block each, scaled block by block, in float64.

    Returns the result and the sum of the magnitudes of its terms.
    """
    num_tokens, groups, k = a.shape
    b = b.double().reshape(groups, -1, k)
    n = b.size(1)
    if b_scale.dtype != torch.float32:
        b_scale = torch.exp2(b_scale.view(torch.uint8).double() - 127)
    b_scale = b_scale.double().reshape(groups, n // BLOCK, k // BLOCK)
    expected = torch.zeros(num_tokens, groups, n, dtype=torch.float64)
    magnitude = torch.zeros_like(expected)
    for g in range(groups):
        for n_block in range(n // BLOCK):
            rows = slice(n_block * BLOCK, (n_block + 1) * BLOCK)
            for k_block in range(k // BLOCK):
                inner = slice(k_block * BLOCK, (k_block + 1) * BLOCK)
                x, w = a[:, g, inner].double(), b[g, rows, inner]
                factor = a_scale[:, g, k_block].double() * b_scale[g, n_block, k_block]
                expected[:, g, rows] += (x @ w.T) * factor[:, None]
                magnitude[:, g, rows] += (x.abs() @ w.T.abs()) * factor[:, None].abs()
    return expected, magnitude


def draw(num_tokens, groups, k, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(num_tokens, groups, k, generator=g).mul(100).clamp(-448, 448).to(E4M3)
    a_scale = torch.rand(num_tokens, groups, k // BLOCK, generator=g) * 0.01 + 1e-4
    b = torch.randn(groups * n, k, generator=g).mul(100).clamp(-448, 448).to(E4M3)
    shape = (groups * n // BLOCK, k // BLOCK)
    b_scale = torch.randint(110, 120, shape, generator=g, dtype=torch.uint8)
    out = torch.full((num_tokens, groups, n), math.nan, dtype=torch.bfloat16)
    return a, a_scale, b, b_scale, out


def check(a, a_scale, b, b_scale, out):
    fp8_einsum_bhr_hdr(a, a_scale, b, b_scale, out)
    compare(a, a_scale, b, b_scale, out)


def compare(a, a_scale, b, b_scale, out):
    expected, magnitude = definition(a, a_scale, b, b_scale)
    # One rounding a term, and one for each of the two scales.
    assert_close_to_reference(
        out,
        expected,
        dtype=torch.bfloat16,
        reduction_length=a.size(2) + 2,
        scale=magnitude,
    )


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 17])
@pytest.mark.parametrize(("groups", "k", "n"), [(1, 128, 128), (2, 384, 256), (8, 256, 256)])
def test_equals_definition(num_tokens, groups, k, n):
    check(*draw(num_tokens, groups, k, n, seed=num_tokens))


def test_real_width():
    check(*draw(3, 2, 4096, 1024))


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
    fp8_einsum_bhr_hdr(a, a_scale, b, b_scale, out)
    expected = torch.zeros(1, 2, 256, dtype=torch.bfloat16)
    expected[0, 1, 130] = 3.0 * 0.5 * -1.5 * 4.0
    assert torch.equal(out, expected)


@pytest.mark.parametrize("weight_dims", [2, 3])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.uint8, torch.float8_e8m0fnu])
def test_every_layout_gives_the_same(weight_dims, scale_dtype):
    num_tokens, groups, k, n = 5, 2, 256, 384
    a, a_scale, b, b_scale, out = draw(num_tokens, groups, k, n)
    fp8_einsum_bhr_hdr(a, a_scale, b, b_scale, out)

    # The engine's: groups outermost; scales with tokens innermost, padded to a multiple of four.
    engine_a = a.transpose(0, 1).contiguous().transpose(0, 1)
    assert engine_a.stride() == (k, num_tokens * k, 1)
    padded = torch.full((groups, k // BLOCK, 8), math.nan)
    padded[..., :num_tokens] = a_scale.permute(1, 2, 0)
    engine_scale = padded.permute(2, 0, 1)[:num_tokens]
    assert engine_scale.stride() == (1, 8 * (k // BLOCK), 8)

    if scale_dtype == torch.float32:
        b_scale = torch.exp2(b_scale.float() - 127)
    else:
        b_scale = b_scale.view(scale_dtype)
    if weight_dims == 3:
        b = b.view(groups, n, k)
        b_scale = b_scale.view(groups, n // BLOCK, k // BLOCK)
    # Scales stored with their last dimension outermost.
    b_scale = b_scale.movedim(-1, 0).contiguous().movedim(0, -1)
    wide = torch.full((num_tokens, n, groups), math.nan, dtype=torch.bfloat16)
    fp8_einsum_bhr_hdr(engine_a, engine_scale, b, b_scale, wide.transpose(1, 2))
    assert torch.equal(wide.transpose(1, 2), out)


def test_scales_at_both_ends():
    a, a_scale, b, b_scale, out = draw(2, 1, 256, 128)
    # 2**-127, a subnormal float32, and 2**127, which leaves room for a factor below 2. The scales
    # of the activations make up for it, so that both blocks count alike.
    b_scale[:] = torch.tensor([[0, 254]], dtype=torch.uint8)
    a_scale[..., 0], a_scale[..., 1] = 2.0**117, 2.0**-137
    b[:, BLOCK:] = (b[:, BLOCK:].float() / 256).to(E4M3)
    check(a, a_scale, b, b_scale, out)


def test_nan_stays_where_it_belongs():
    a, a_scale, b, b_scale, out = draw(3, 2, 256, 256)
    a[1, 0, 5] = math.nan
    b_scale[3, 1] = 255
    fp8_einsum_bhr_hdr(a, a_scale, b, b_scale, out)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[1, 0] = True
    expected[:, 1, 128:] = True
    assert torch.equal(out.isnan(), expected)


def test_unbiased():
    a, a_scale, b, b_scale, out = draw(16, 2, 512, 256)
    fp8_einsum_bhr_hdr(a, a_scale, b, b_scale, out)
    assert_unbiased(out, definition(a, a_scale, b, b_scale)[0])


@pytest.mark.parametrize("budget", [1, 2**18, 2**20])
def test_chunks_give_the_same(budget, monkeypatch):
    arguments = draw(7, 3, 256, 128)
    monkeypatch.setattr(reference, "SCRATCH_BUDGET_BYTES", budget)
    group_chunk, token_chunk = reference.chunk_sizes(7, 3, 128, 256)
    assert (group_chunk, token_chunk) == {1: (1, 1), 2**18: (1, 7), 2**20: (3, 7)}[budget]
    check(*arguments)
    held = record(fp8_einsum_bhr_hdr, *arguments).peak_bytes
    # The scales of the weight, decoded, come on top.
    assert held <= reference.scratch_bytes(7, 3, 128, 256) + 1024


@pytest.mark.parametrize("num_tokens", [1, 512, 8192])
def test_real_shapes_stay_within_the_budget(num_tokens):
    used = reference.scratch_bytes(num_tokens, 8, 1024, 4096)
    assert 0 < used <= reference.SCRATCH_BUDGET_BYTES


def test_the_same_work_whatever_the_values():
    first, second = draw(5, 2, 256, 128, seed=1), draw(5, 2, 256, 128, seed=2)
    second[0].fill_(math.nan)
    calls = [record(fp8_einsum_bhr_hdr, *arguments).calls for arguments in (first, second)]
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (
            0,
            lambda a: a.to(torch.bfloat16),
            r"a: dtype torch\.bfloat16, allowed: .*float8_e4m3fn",
        ),
        (0, lambda a: a.flatten(1), r"a: shape \(3, 512\), allowed: \(T, G, K\)"),
        (0, lambda a: a.mT.contiguous().mT, r"a: stride\(-1\) is 2, allowed: 1"),
        (0, lambda a: a[..., :192], r"a: K is 192, allowed: positive multiples of 128"),
        (
            1,
            lambda s: s.double(),
            r"a_scale: dtype torch\.float64, allowed: torch\.float32",
        ),
        (1, lambda s: s[:2], r"a_scale: shape \(2, 2, 2\), allowed: \(T=3, 2, 2\)|T=3"),
        (2, lambda b: b[:-128], r"b: shape \(128, 256\), allowed: \(256, 256\)"),
        (
            2,
            lambda b: b.view(1, 256, 256),
            r"b: shape \(1, 256, 256\), allowed: \(2, 128, 256\)",
        ),
        (2, lambda b: b.t(), r"b: stride\(-1\) is 256, allowed: 1"),
        (
            3,
            lambda s: s.to(torch.int32),
            r"b_scale: dtype torch\.int32, allowed: torch\.float32",
        ),
        (3, lambda s: s.t()[:1], r"b_scale: shape \(1, 2\), allowed: \(2, 2\)"),
        (
            4,
            lambda o: o.float(),
            r"out: dtype torch\.float32, allowed: torch\.bfloat16",
        ),
        (4, lambda o: o[:2], r"out: shape \(2, 2, 128\), allowed: \(T=3, G=2, N\)|T=3"),
        (4, lambda o: o[..., :64], r"out: N is 64, allowed: positive multiples of 128"),
        (4, lambda o: o.to("meta"), r"out: device meta, allowed: cpu"),
        (0, lambda a: None, "a: expected a tensor, got NoneType"),
    ],
)
def test_bad_argument_is_named(index, change, message):
    arguments = list(draw(3, 2, 256, 128))
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=message):
        fp8_einsum_bhr_hdr(*arguments)


NAMES = ("a", "a_scale", "b", "b_scale", "out")


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 6, 130])
def test_a_captured_graph_follows_its_inputs(num_tokens):
    first, second = (
        dict(zip(NAMES, draw(num_tokens, 4, 512, 256, seed=seed), strict=True)) for seed in (1, 2)
    )
    _, after = replay_on_gpu(fp8_einsum_bhr_hdr, first, second)
    compare(**second | {"out": after["out"]})


def test_runs_on_a_fake_gpu():
    """Devices and shapes fit without values, at the engine's size."""
    with FakeTensorMode():
        gpu = {"device": "cuda"}
        fp8_einsum_bhr_hdr(
            torch.empty(4096, 8, 4096, dtype=E4M3, **gpu),
            torch.empty(4096, 8, 32, **gpu),
            torch.empty(8192, 4096, dtype=E4M3, **gpu),
            torch.empty(64, 32, dtype=torch.float8_e8m0fnu, **gpu),
            torch.empty(4096, 8, 1024, dtype=torch.bfloat16, **gpu),
        )
