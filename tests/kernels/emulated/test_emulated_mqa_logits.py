"""The Triton kernel of the prefill logits against the definition, as compiled for SM12x."""

from __future__ import annotations

import math

import pytest
import torch
from logits_checks import assert_logits, e4m3_values, score
from pages import random_e4m3_bytes
from test_mqa_logits import arguments, define, inside, ints, rng
from tolerance import assert_unbiased

from vllm_sm12x.ops import mqa_logits
from vllm_sm12x.ops.mqa_logits import config, kernel
from vllm_sm12x.ops.mqa_logits.config import TABLE

# Those of the tables, and tiles of few keys with several tokens at a time.
ROWS = sorted(
    {(heads, row) for table in TABLE.values() for heads, row in table.items()}
    | {(64, config.Row(16, 4, 1, 3)), (64, config.Row(32, 2, 1, 2))},
    key=repr,
)


def run(given: dict, **options) -> torch.Tensor:
    return mqa_logits.fp8_mqa_logits(**given, **options, implementation="triton")


def check(given: dict, row: config.Row | None = None) -> None:
    arguments = {**given, "clean_logits": True}
    actual = run(arguments) if row is None else kernel.fp8_mqa_logits(**arguments, row=row)
    assert actual.is_contiguous()
    names = ("k_scale", "weights")
    expected, magnitude = score(
        given["q"], e4m3_values(given["k"]), *(given[name] for name in names)
    )
    mask = inside(given["ks"], given["ke"], len(given["k"]))
    assert_logits(actual, expected, magnitude, mask, given["q"].shape[1])


def test_the_vectorised_definition_is_the_definition():
    given = arguments(m=3, heads=5, n=9)
    names = ("k_scale", "weights")
    found = score(given["q"], e4m3_values(given["k"]), *(given[name] for name in names))
    expected = define(given["q"], given["k"], *(given[name] for name in names))
    for mine, plain in zip(found, expected, strict=True):
        assert torch.allclose(mine, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("heads", "row"), ROWS)
def test_every_row_of_the_table(heads, row):
    """Ranges that begin and end around the edges of tiles of 128 and 256 keys."""
    edges = [0, 1, 100, 127, 128, 129, 255, 256, 257, 300]
    ranges = [(a, b) for a in edges for b in edges if a < b][::5]
    check(arguments(m=len(ranges), heads=heads, n=300, ranges=ranges), row)


@pytest.mark.parametrize(
    "shape",
    [
        dict(m=1, heads=64, n=1, ranges=[(0, 1)]),
        dict(m=3, heads=32, n=130, ranges=[(0, 130), (5, 6), (129, 130)]),
        dict(m=4, heads=64, n=64, ranges=[(0, 0), (7, 7), (64, 64), (9, 3)]),
        dict(m=2, heads=64, n=9, ranges=[(-4, 5), (3, 99)]),
        dict(m=3, heads=32, n=9, ranges=[(-(2**31), 2**31 - 1), (2**31 - 1, 5), (8, 2**31 - 1)]),
        dict(m=70, heads=32, n=20),
    ],
)
def test_equals_the_definition(shape):
    check(arguments(**shape))


@pytest.mark.parametrize("tokens_per_program", [1, 3, 16, 256])
@pytest.mark.parametrize("heads", [32, 64])
def test_any_number_of_tokens_a_program(monkeypatch, heads, tokens_per_program):
    """Causal ranges of two requests, as in a chunk of the engine: tiles see some of the tokens."""
    monkeypatch.setattr(config, "tokens_per_program", lambda *_: tokens_per_program)
    ranges = [(0, 130 + i // 4) for i in range(7)] + [(132, 132 + (9 + i) // 4) for i in range(9)]
    check(arguments(m=16, heads=heads, n=300, ranges=ranges))


def test_nothing_is_written_outside_the_ranges(monkeypatch):
    """With NaN for what `empty` gives: it stays, where `clean_logits` is not asked for."""
    given = arguments(m=9, heads=64, n=150)
    monkeypatch.setattr(torch, "empty", lambda *s, **k: torch.full(*s, math.nan, **k))
    actual = run(given)
    mask = inside(given["ks"], given["ke"], 150)
    assert 0 < mask.sum() < mask.numel()
    assert actual[~mask].isnan().all()
    assert actual[mask].isfinite().all()


def test_one_logit_by_hand():
    q = torch.zeros(1, 32, 128, dtype=torch.uint8)
    k = torch.zeros(2, 128, dtype=torch.uint8)
    q[0, 0, 3], q[0, 31, 3] = 0x40, 0xC0  # 2 and -2
    k[0, 3], k[1, 3] = 0x38, 0xB8  # 1 and -1
    weights = torch.full((1, 32), 7.0)
    weights[0, 0], weights[0, 31] = 3.0, -5.0
    actual = run(
        dict(
            q=q.view(torch.float8_e4m3fn),
            k=k.view(torch.float8_e4m3fn),
            k_scale=torch.tensor([0.5, 4.0]),
            weights=weights,
            ks=ints(0),
            ke=ints(2),
        )
    )
    # Key 0: only head 0 is positive, 0.5 * 3 * 2. Key 1: only head 31, 4 * -5 * 2.
    assert actual.tolist() == [[3.0, -40.0]]


def test_every_e4m3_code():
    given = arguments(m=4, heads=32, n=20)
    given["q"] = random_e4m3_bytes(4, 32, 128, generator=rng(3)).view(torch.float8_e4m3fn)
    given["k"] = random_e4m3_bytes(20, 128, generator=rng(4)).view(torch.float8_e4m3fn)
    given["k_scale"][0], given["k_scale"][1] = 2.0**-126, 2.0**60
    given["ks"].zero_()
    given["ke"].fill_(20)
    check(given)


def test_nan_in_keys_that_no_token_sees_does_not_spread():
    given = arguments(m=3, heads=64, n=40, ranges=[(5, 20), (5, 6), (10, 20)])
    unseen = torch.ones(40, dtype=torch.bool)
    unseen[5:20] = False
    given["k"].view(torch.uint8)[unseen] = 0x7F
    given["k_scale"][unseen] = math.nan
    mask = inside(given["ks"], given["ke"], 40)
    actual = run(given, clean_logits=True)
    assert actual[mask].isfinite().all() and actual[~mask].eq(-math.inf).all()


@pytest.mark.parametrize("name", ["q", "k", "k_scale", "weights"])
def test_nan_in_what_is_seen_shows(name):
    given = arguments(m=2, heads=64, n=10, ranges=[(0, 10)] * 2)
    given[name][1] = math.nan
    expected = torch.zeros(2, 10, dtype=torch.bool)
    expected[(slice(None), 1) if name.startswith("k") else 1] = True
    assert torch.equal(run(given).isnan(), expected)


@pytest.mark.parametrize(("m", "n"), [(0, 7), (7, 0), (0, 0)])
def test_empty(m, n):
    given = arguments(m=max(m, 1), heads=64, n=n, ranges=[(0, n)] * max(m, 1))
    for name in ("q", "weights", "ks", "ke"):
        given[name] = given[name][:m]
    for clean in (False, True):
        assert run(given, clean_logits=clean).shape == (m, n)


def test_strided_arguments():
    given = arguments(m=4, heads=32, n=16)
    expected = run(given, clean_logits=True)
    wide = torch.full((4, 40, 160), 0x7F, dtype=torch.uint8)
    wide[:, 3:35, 16:144] = given["q"].view(torch.uint8)
    given["q"] = wide.view(torch.float8_e4m3fn)[:, 3:35, 16:144]
    keys = torch.full((16, 160), 0x7F, dtype=torch.uint8)
    keys[:, 16:144] = given["k"].view(torch.uint8)
    given["k"] = keys.view(torch.float8_e4m3fn)[:, 16:144]
    given["weights"] = torch.stack([given["weights"], given["weights"] * math.nan], 2)[:, :, 0]
    given["k_scale"] = torch.stack([given["k_scale"], given["k_scale"] * math.nan], 1)[:, 0]
    for name, beside in (("ks", 0), ("ke", 99)):
        given[name] = torch.stack([given[name], torch.full_like(given[name], beside)], 1)[:, 0]
    assert torch.equal(run(given, clean_logits=True), expected)


def test_results_are_not_biased():
    given = arguments(m=24, heads=32, n=64, ranges=[(0, 64)] * 24)
    names = ("k_scale", "weights")
    expected, _ = score(given["q"], e4m3_values(given["k"]), *(given[name] for name in names))
    assert_unbiased(run(given), expected, slack=0.02)


def test_a_number_of_heads_without_a_row_is_refused():
    with pytest.raises(ValueError, match="q: 12 heads, allowed .*: 32, 64"):
        run(arguments(m=2, heads=12, n=4))
