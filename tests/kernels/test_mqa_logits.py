"""Indexer logits over contiguous keys, against a definition in float64 with plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from capture import record, replay_on_gpu
from pages import E4M3, random_e4m3_bytes
from tolerance import assert_close_to_reference, assert_unbiased
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_sm12x.ops import mqa_logits
from vllm_sm12x.ops.mqa_logits import reference


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(m=5, heads=64, n=37, seed=0, ranges=None) -> dict:
    generator = rng(seed)
    starts = torch.randint(0, max(n, 1), (m,), generator=generator)
    ends = torch.minimum(starts + torch.randint(0, n + 1, (m,), generator=generator), ints(n))
    if ranges is not None:
        starts, ends = ints(*(r[0] for r in ranges)), ints(*(r[1] for r in ranges))
    q = torch.randn(m, heads, 128, generator=generator).to(torch.float8_e4m3fn)
    k = (torch.randn(n, 128, generator=generator) * 60).to(torch.float8_e4m3fn)
    return dict(
        q=q,
        k=k,
        k_scale=2.0 ** torch.randint(-9, -5, (n,), generator=generator).float(),
        weights=torch.randn(m, heads, generator=generator) * 0.01,
        ks=starts.int(),
        ke=ends.int(),
    )


def define(q, k, k_scale, weights):
    """The definition for every pair, and the sum of its terms' magnitudes, float64 ``[m, n]``.

    A term of the sum over heads is a dot product, so the magnitude of a pair is that of all its
    products.
    """
    queries, keys = E4M3[q.view(torch.uint8).int()], E4M3[k.view(torch.uint8).int()]
    logits = torch.zeros(len(q), len(k), dtype=torch.float64)
    magnitude = torch.zeros_like(logits)
    for i in range(len(q)):
        for j in range(len(k)):
            scale = k_scale[j].double()
            for h in range(q.shape[1]):
                weight = weights[i, h].double()
                dot = (queries[i, h] * keys[j]).sum()
                logits[i, j] += scale * weight * max(dot, torch.zeros_like(dot))
                magnitude[i, j] += scale * weight.abs() * (queries[i, h] * keys[j]).abs().sum()
    return logits, magnitude


def inside(ks, ke, n):
    column = torch.arange(n)
    return (column >= ks.unsqueeze(1)) & (column < ke.unsqueeze(1))


def assert_defined(actual, given):
    """``actual`` is what the definition says, ``-inf`` outside the ranges."""
    heads, n = given["q"].shape[1], len(given["k"])
    names = ("q", "k", "k_scale", "weights")
    expected, magnitude = define(*(given[name] for name in names))
    mask = inside(given["ks"], given["ke"], n)
    assert actual.is_contiguous()
    assert_close_to_reference(
        actual,
        expected.masked_fill(~mask, -math.inf),
        dtype=torch.float32,
        reduction_length=128 + heads + 2,
        scale=magnitude.masked_fill(~mask, 0),
    )


def check(given):
    clean = mqa_logits.fp8_mqa_logits(**given, clean_logits=True)
    assert_defined(clean, given)
    mask = inside(given["ks"], given["ke"], len(given["k"]))
    assert torch.equal(mqa_logits.fp8_mqa_logits(**given)[mask], clean[mask])


@pytest.mark.parametrize(
    "shape",
    [
        dict(m=1, heads=1, n=1, ranges=[(0, 1)]),
        dict(m=5, heads=64, n=37),
        dict(m=3, heads=32, n=130, ranges=[(0, 130), (5, 6), (129, 130)]),
        dict(m=4, heads=3, n=64, ranges=[(0, 0), (7, 7), (64, 64), (9, 3)]),
        dict(m=2, heads=64, n=9, ranges=[(-4, 5), (3, 99)]),
    ],
)
def test_equals_the_definition(shape):
    check(arguments(**shape))


@pytest.mark.parametrize("budget", [1, 300_000])
@pytest.mark.parametrize("tile_keys", [8, 13])
def test_tiles_do_not_show(monkeypatch, budget, tile_keys):
    monkeypatch.setattr(reference, "SCRATCH_BYTES", budget)
    monkeypatch.setattr(reference, "TILE_KEYS", tile_keys)
    check(arguments(m=5, heads=8, n=37))


def test_one_logit_by_hand():
    q = torch.zeros(1, 2, 128, dtype=torch.uint8)
    k = torch.zeros(2, 128, dtype=torch.uint8)
    q[0, 0, 3], q[0, 1, 3] = 0x40, 0xC0  # 2 and -2
    k[0, 3], k[1, 3] = 0x38, 0xB8  # 1 and -1
    actual = mqa_logits.fp8_mqa_logits(
        q.view(torch.float8_e4m3fn),
        k.view(torch.float8_e4m3fn),
        torch.tensor([0.5, 4.0]),
        torch.tensor([[3.0, -5.0]]),
        ints(0),
        ints(2),
    )
    # Key 0: only head 0 is positive, 0.5 * 3 * 2. Key 1: only head 1, 4 * -5 * 2.
    assert actual.tolist() == [[3.0, -40.0]]


def test_every_e4m3_code():
    given = arguments(m=4, heads=4, n=20)
    given["q"] = random_e4m3_bytes(4, 4, 128, generator=rng(3)).view(torch.float8_e4m3fn)
    given["k"] = random_e4m3_bytes(20, 128, generator=rng(4)).view(torch.float8_e4m3fn)
    given["k_scale"][0], given["k_scale"][1] = 2.0**-126, 2.0**60
    given["ks"].zero_()
    given["ke"].fill_(20)
    check(given)


def test_nan_in_keys_that_no_token_sees_does_not_spread():
    given = arguments(m=3, heads=8, n=40, ranges=[(5, 20), (5, 6), (10, 20)])
    unseen = torch.ones(40, dtype=torch.bool)
    unseen[5:20] = False
    given["k"].view(torch.uint8)[unseen] = 0x7F
    given["k_scale"][unseen] = math.nan
    mask = inside(given["ks"], given["ke"], 40)
    for clean in (False, True):
        actual = mqa_logits.fp8_mqa_logits(**given, clean_logits=clean)
        assert actual[mask].isfinite().all()
        if clean:
            assert actual[~mask].eq(-math.inf).all()


@pytest.mark.parametrize(("m", "n"), [(0, 7), (7, 0), (0, 0)])
def test_empty(m, n):
    given = arguments(m=m, heads=4, n=n, ranges=[(0, n)] * m) if m else None
    if given is None:
        given = arguments(m=1, heads=4, n=n, ranges=[(0, n)])
        for name in ("q", "weights", "ks", "ke"):
            given[name] = given[name][:0]
    for clean in (False, True):
        assert mqa_logits.fp8_mqa_logits(**given, clean_logits=clean).shape == (m, n)


def test_strided_arguments():
    given = arguments(m=4, heads=8, n=16)
    expected = mqa_logits.fp8_mqa_logits(**given, clean_logits=True)
    wide = torch.zeros(4, 20, 128, dtype=torch.uint8).view(torch.float8_e4m3fn)
    wide.view(torch.uint8)[:, 3:11] = given["q"].view(torch.uint8)
    given["q"] = wide[:, 3:11]
    weights = torch.full((4, 9), math.nan)
    weights[:, :8] = given["weights"]
    given["weights"] = weights[:, :8]
    scales = torch.full((16, 2), math.nan)
    scales[:, 0] = given["k_scale"]
    given["k_scale"] = scales[:, 0]
    assert torch.equal(mqa_logits.fp8_mqa_logits(**given, clean_logits=True), expected)


def test_upstreams_own_form_of_the_definition():
    """As vLLM's test of its DeepGEMM wrapper computes it: scaled keys, relu after the scale."""
    given = arguments(m=6, heads=32, n=50)
    keys = given["k"].double() * given["k_scale"].double().unsqueeze(1)
    score = torch.einsum("mhd,nd->hmn", given["q"].double(), keys)
    expected = (score.relu() * given["weights"].double().t().unsqueeze(-1)).sum(0)
    actual = mqa_logits.fp8_mqa_logits(**given)
    mask = inside(given["ks"], given["ke"], 50)
    magnitude = torch.einsum("mhd,nd->hmn", given["q"].double().abs(), keys.abs())
    magnitude = (magnitude * given["weights"].double().abs().t().unsqueeze(-1)).sum(0)
    assert_close_to_reference(
        actual[mask],
        expected[mask],
        dtype=torch.float32,
        reduction_length=128 + 32 + 2,
        scale=magnitude[mask],
    )


def test_results_are_not_biased():
    given = arguments(m=24, heads=8, n=64, ranges=[(0, 64)] * 24)
    expected, _ = define(*(given[name] for name in ("q", "k", "k_scale", "weights")))
    assert_unbiased(mqa_logits.fp8_mqa_logits(**given), expected, slack=0.02)


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("budget", [1, 300_000, 256 << 20])
def test_capture_safe_and_within_the_stated_scratch(monkeypatch, budget, clean):
    monkeypatch.setattr(reference, "SCRATCH_BYTES", budget)
    monkeypatch.setattr(reference, "TILE_KEYS", 64)
    operation = mqa_logits.fp8_mqa_logits
    first = record(operation, **arguments(9, 16, 200, seed=1), clean_logits=clean)
    second = record(operation, **arguments(9, 16, 200, seed=2), clean_logits=clean)
    assert first.calls == second.calls, "the launches depend on what the tensors hold"
    stated = mqa_logits.scratch_bytes(9, 16, 200)
    used = first.peak_bytes - 4 * 9 * 200
    assert used <= stated
    assert used > stated / 2, "the stated scratch is far too much"


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [300_000, 256 << 20])
def test_a_captured_graph_follows_its_inputs(monkeypatch, budget):
    monkeypatch.setattr(reference, "SCRATCH_BYTES", budget)
    given = arguments(9, 16, 200, seed=2)
    clean = dict(clean_logits=True)
    first = arguments(9, 16, 200, seed=1)
    actual, _ = replay_on_gpu(mqa_logits.fp8_mqa_logits, first | clean, given | clean)
    assert_defined(actual, given)


@pytest.mark.parametrize("heads", [32, 64])
@pytest.mark.parametrize("tokens", [1, 512, 4096])
@pytest.mark.parametrize("keys", [1, 1000, 32768, 262144])
def test_scratch_stays_in_the_budget_at_real_shapes(tokens, keys, heads):
    assert 0 < mqa_logits.scratch_bytes(tokens, heads, keys) <= reference.SCRATCH_BYTES


def test_runs_on_a_fake_gpu():
    """Devices and shapes fit without values, at the largest size within vLLM's logits budget."""
    with FakeTensorMode():
        gpu = torch.device("cuda")
        fp8 = dict(dtype=torch.float8_e4m3fn, device=gpu)
        bounds = torch.empty(4096, dtype=torch.int32, device=gpu)
        logits = mqa_logits.fp8_mqa_logits(
            torch.empty(4096, 64, 128, **fp8),
            torch.empty(32768, 128, **fp8),
            torch.empty(32768, device=gpu),
            torch.empty(4096, 64, device=gpu),
            bounds,
            bounds,
            clean_logits=True,
        )
        assert logits.shape == (4096, 32768) and logits.device.type == "cuda"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(5, 64, 128)), "q: dtype torch.float32, allowed: torch.float8_e4m3fn"),
        (dict(q=arguments()["q"][..., :64]), "q: shape .*128"),
        (dict(q=(1, None)), "q: expected a tensor, got tuple"),
        (dict(k=arguments()["k"].view(torch.uint8)), "k: dtype torch.uint8"),
        (dict(k=arguments()["k"].unsqueeze(1)), "k: shape"),
        (dict(k_scale=torch.zeros(36)), r"k_scale: shape \(36,\), allowed: \(n=37\)"),
        (dict(k_scale=torch.zeros(37).half()), "k_scale: dtype"),
        (dict(weights=torch.zeros(5, 32)), "weights: shape .*heads=64"),
        (dict(weights=torch.zeros(5, 64).bfloat16()), "weights: dtype"),
        (dict(ks=torch.zeros(5, dtype=torch.int64)), "ks: dtype"),
        (dict(ke=ints(1, 2, 3)), "ke: shape"),
        (dict(ke=torch.zeros(5, dtype=torch.int32, device="meta")), "ke: device meta"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        mqa_logits.fp8_mqa_logits(**{**arguments(), **change})
