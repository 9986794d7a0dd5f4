"""The Triton kernel of the decode logits against the definition, as compiled for SM12x."""

from __future__ import annotations

import math

import pytest
import torch
from logits_checks import assert_logits, score
from pages import IndexerPages, random_e4m3_bytes
from test_paged_mqa_logits import GARBAGE, Case, rng
from tolerance import assert_unbiased

from vllm_sm12x.ops import paged_mqa_logits
from vllm_sm12x.ops.paged_mqa_logits import config, kernel
from vllm_sm12x.ops.paged_mqa_logits.config import TABLE

ROWS = sorted(
    {(heads, row) for table in TABLE.values() for (heads, _), row in table.items()}
    | {(64, config.Row(1, 2, 2, 1)), (32, config.Row(2, 4, 2, 1))},
    key=repr,
)
# Around every edge of a page and of a tile of two pages.
LENS = [[0], [1], [63], [64], [65], [127], [128], [129], [-1], [191], [192], [256], [257], [300]]


def run(given: dict, **options) -> torch.Tensor:
    return paged_mqa_logits.fp8_paged_mqa_logits(**given, **options, implementation="triton")


def define(case: Case):
    """Logits, sums of magnitudes (float64), and which of them there are, for every row."""
    requests, next_n, heads, _ = case.q.shape
    shape = (requests * next_n, case.max_model_len)
    logits, magnitude = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    column = torch.arange(case.max_model_len)
    inside = column < case.lens.reshape(-1, 1)
    for b in range(requests):
        count = max(0, int(case.lens[b].max()))
        read = [case.pages.read(int(case.table[b, i // 64]), i % 64) for i in range(count)]
        if read:
            rows = slice(b * next_n, (b + 1) * next_n)
            keys, scales = torch.stack([key for key, _ in read]), [scale for _, scale in read]
            found = score(case.q[b], keys, torch.tensor(scales), case.weights[rows])
            logits[rows, :count], magnitude[rows, :count] = found
    return logits, magnitude, inside


def check(case: Case, **options) -> None:
    given = {**case.arguments(), "clean_logits": True}
    actual = kernel.fp8_paged_mqa_logits(**given, **options) if options else run(given)
    assert actual.is_contiguous()
    assert_logits(actual, *define(case), case.q.shape[2])


def test_the_vectorised_definition_is_the_definition():
    case = Case([[70, 71], [0, 1], [-1, 0]], heads=3)
    logits, magnitude, inside = define(case)
    expected, expected_magnitude = case.define()
    assert torch.equal(inside, expected > -math.inf)
    assert torch.allclose(logits[inside], expected[inside], rtol=1e-12, atol=1e-14)
    assert torch.allclose(magnitude[inside], expected_magnitude[inside], rtol=1e-12)


@pytest.mark.parametrize(("heads", "row"), ROWS)
def test_every_row_of_the_table(heads, row):
    check(Case(LENS, heads=heads, width=6, max_model_len=310), row=row)


@pytest.mark.parametrize("splits", [1, 2, 3, 50])
def test_any_number_of_splits(splits):
    check(Case([[300], [150], [1], [0]], heads=64, width=5, max_model_len=300), splits=splits)


@pytest.mark.parametrize(
    "shape",
    [
        dict(lens=[[1]], heads=64, width=1, max_model_len=1),
        dict(lens=[[130]], heads=64, width=3, max_model_len=130),
        dict(lens=[[20, 21], [63, 64], [-1, 0], [64, 65]], heads=32),
        dict(lens=[[98, 99, 100], [0, 0, 1]], heads=64, stride=8448),
        dict(lens=[[70], [3]], heads=32, width=2, max_model_len=500),
        dict(lens=[[70], [3]], heads=32, width=40, max_model_len=100, stride=9000),
    ],
)
def test_equals_the_definition(shape):
    check(Case(**shape))


def test_lengths_of_the_last_query_token():
    """One length a request: each earlier query token sees one key fewer."""
    case = Case([[98, 99, 100], [0, 1, 2], [-1, 0, 1], [64, 65, 66]], heads=32)
    given = case.arguments()
    expected = run(given, clean_logits=True)
    given["context_lens"] = case.lens[:, -1].contiguous()
    assert torch.equal(run(given, clean_logits=True), expected)
    check(case)


def test_nothing_is_written_beyond_the_lengths(monkeypatch):
    """With NaN for what `empty` gives: it stays, where `clean_logits` is not asked for."""
    case = Case([[100], [0], [-1], [65]], heads=64)
    monkeypatch.setattr(torch, "empty", lambda *s, **k: torch.full(*s, math.nan, **k))
    actual = run(case.arguments())
    inside = torch.arange(200) < case.lens
    assert actual[~inside].isnan().all() and actual[inside].isfinite().all()


def test_a_length_beyond_the_table_or_the_result_is_cut():
    """Not allowed, and still neither read nor written there."""
    case = Case([[100]], heads=32, width=2, max_model_len=120)
    expected = run(case.arguments(), clean_logits=True)[0, :100]
    case.lens[0, 0] = 2**31 - 1
    wide = torch.full((1, 9), GARBAGE[0], dtype=torch.int32)
    wide[:, :2] = case.table
    given = case.arguments() | dict(block_tables=wide[:, :2])
    assert torch.equal(run(given)[0, :100], expected)


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_the_table_ends_with_the_last_page(pages):
    """Nothing behind it is looked at, with a tile of two pages neither."""
    case = Case([[64], [64 * pages]], heads=32, width=pages, max_model_len=64 * pages)
    for row in (config.Row(1, 2, 2, 1), config.Row(2, 4, 2, 1)):
        check(case, row=row)


def test_one_logit_by_hand():
    raw = torch.full((2 * 8640,), 0xFF, dtype=torch.uint8)
    page = raw[8640:]
    page[: 2 * 128] = 0
    page[3], page[128 + 3] = 0x38, 0xB8  # 1 and -1
    page[8192 : 8192 + 8].view(torch.float32).copy_(torch.tensor([0.5, 4.0]))
    q = torch.zeros(1, 1, 32, 128, dtype=torch.uint8)
    q[0, 0, 0, 3], q[0, 0, 31, 3] = 0x40, 0xC0  # 2 and -2
    weights = torch.full((1, 32), 7.0)
    weights[0, 0], weights[0, 31] = 3.0, -5.0
    logits = run(
        dict(
            q=q.view(torch.float8_e4m3fn),
            kv_cache=raw.as_strided((2, 64, 1, 132), (8640, 132, 132, 1)),
            weights=weights,
            context_lens=torch.tensor([[2]], dtype=torch.int32),
            block_tables=torch.tensor([[1]], dtype=torch.int32),
            max_model_len=2,
        )
    )
    # Key 0: only head 0 is positive, 0.5 * 3 * 2. Key 1: only head 31, 4 * -5 * 2.
    assert logits.tolist() == [[3.0, -40.0]]


def test_every_e4m3_code_and_extreme_scales():
    case = Case([[70]], heads=32)
    for i in range(70):
        key = random_e4m3_bytes(128, generator=rng(i))
        case.pages.write(int(case.table[0, i // 64]), i % 64, key, (2.0**-126, 1.0, 2.0**60)[i % 3])
    check(case)


def test_nothing_is_cached():
    case = Case([[0], [-1]], heads=64)
    assert run(case.arguments(), clean_logits=True).eq(-math.inf).all()
    given = case.arguments()
    given["kv_cache"] = given["kv_cache"][:0]
    logits = run(given, clean_logits=True)
    assert logits.shape == (2, 200) and logits.eq(-math.inf).all()


@pytest.mark.parametrize("empty", ["max_model_len", "block_tables", "q"])
def test_empty(empty):
    given = Case([[0], [0]], heads=64).arguments()
    rows, columns = 2, 200
    if empty == "max_model_len":
        given["max_model_len"] = columns = 0
    elif empty == "block_tables":
        given["block_tables"] = given["block_tables"][:, :0]
    else:
        rows = 0
        for name in ("q", "weights", "context_lens", "block_tables"):
            given[name] = given[name][:0]
    logits = run(given, clean_logits=True)
    assert logits.shape == (rows, columns) and logits.eq(-math.inf).all()


def test_pages_beyond_two_to_the_31_bytes():
    case = Case([[3]], heads=32)
    pages = IndexerPages(248_700, untouched=True)
    page = 248_699
    assert page * pages.stride > 2**31
    for i in range(3):
        pages.write(page, i, random_e4m3_bytes(128, generator=rng(i)), 0.5)
    case.pages = pages
    case.table[0, 0] = page
    check(case)


@pytest.mark.parametrize("number", [2**31 - 1, -1, -(2**31), 5])
def test_a_page_outside_the_cache_is_not_read(number):
    case = Case([[100]], heads=32)
    given = case.arguments()
    expected = run(given)[0, :64]
    assert len(case.pages.cache) == 5
    case.table[0, 1] = number
    actual = run(given)[0]
    assert torch.equal(actual[:64], expected)
    assert actual[64:100].eq(0).all(), "what is not read counts as zeros"


def test_strided_arguments():
    case = Case([[100], [7]], heads=32)
    given = case.arguments()
    expected = run(given, clean_logits=True)
    wide = torch.full((2, 9), GARBAGE[0], dtype=torch.int32)
    wide[:, :4] = case.table
    given["block_tables"] = wide[:, :4]
    lens = torch.full((2, 3), 190, dtype=torch.int32)
    lens[:, 1:2] = case.lens
    given["context_lens"] = lens[:, 1:2]
    queries = torch.full((2, 3, 40, 160), 0x7F, dtype=torch.uint8)
    queries[:, 1:2, 4:36, 16:144] = case.q.view(torch.uint8)
    given["q"] = queries.view(torch.float8_e4m3fn)[:, 1:2, 4:36, 16:144]
    given["weights"] = torch.stack([case.weights, case.weights * math.nan], 2)[:, :, 0]
    assert torch.equal(run(given, clean_logits=True), expected)


def test_results_are_not_biased():
    case = Case([[190], [180], [150]], heads=32)
    logits, _, inside = define(case)
    assert_unbiased(run(case.arguments())[inside], logits[inside], slack=0.02)


def test_a_number_of_heads_without_a_row_is_refused():
    with pytest.raises(ValueError, match="q: 12 heads, allowed .*: 32, 64"):
        run(Case([[3]], heads=12).arguments())
