"""Indexer logits over the paged cache, against a definition in float64 with plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from capture import record, replay_on_gpu
from pages import E4M3, IndexerPages, random_e4m3_bytes
from tolerance import assert_close_to_reference, assert_unbiased
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_sm12x.ops import mqa_logits, paged_mqa_logits
from vllm_sm12x.ops.paged_mqa_logits import reference

GARBAGE = (2**31 - 1, -(2**31), -1, 77_777_777)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Case:
    """``lens[b][j]`` keys of request ``b`` for its token ``j``; all that is unused is garbage."""

    def __init__(self, lens, *, heads=8, width=4, max_model_len=200, stride=8640, seed=0):
        generator = rng(seed)
        self.lens = torch.tensor(lens, dtype=torch.int32)
        requests, next_n = self.lens.shape
        needed = [max(0, -(-max(row) // 64)) for row in lens]
        blocks = sum(needed) + 3
        self.pages = IndexerPages(blocks, stride)
        # Page 0 stays unwritten: what stands in for a page that is not used must not spread.
        free = (torch.randperm(blocks - 1, generator=generator) + 1).tolist()
        table = torch.tensor(GARBAGE, dtype=torch.int32).repeat(requests, width)
        self.table = table[:, :width].contiguous()
        for b, count in enumerate(needed):
            for p in range(count):
                page = free.pop()
                self.table[b, p] = page
                for offset in range(min(64, max(lens[b]) - 64 * p)):
                    key = (torch.randn(128, generator=generator) * 60).to(torch.float8_e4m3fn)
                    exponent = int(torch.randint(-9, -5, (1,), generator=generator))
                    self.pages.write(page, offset, key.view(torch.uint8), 2.0**exponent)
        q = torch.randn(requests, next_n, heads, 128, generator=generator)
        self.q = q.to(torch.float8_e4m3fn)
        self.weights = torch.randn(requests * next_n, heads, generator=generator) * 0.01
        self.max_model_len = max_model_len

    def arguments(self) -> dict:
        return dict(
            q=self.q,
            kv_cache=self.pages.cache,
            weights=self.weights,
            context_lens=self.lens,
            block_tables=self.table,
            max_model_len=self.max_model_len,
        )

    def define(self):
        """Logits, ``-inf`` where there are none, and the sums of magnitudes, float64."""
        requests, next_n, heads, _ = self.q.shape
        shape = (requests * next_n, self.max_model_len)
        logits = torch.full(shape, -math.inf, dtype=torch.float64)
        magnitude = torch.zeros(shape, dtype=torch.float64)
        for b in range(requests):
            for j in range(next_n):
                row = b * next_n + j
                queries = E4M3[self.q[b, j].view(torch.uint8).int()]
                for i in range(max(0, int(self.lens[b, j]))):
                    key, scale = self.pages.read(int(self.table[b, i // 64]), i % 64)
                    total = size = 0.0
                    for h in range(heads):
                        weight = self.weights[row, h].item()
                        total += weight * max(0.0, torch.dot(queries[h], key).item())
                        size += abs(weight) * torch.dot(queries[h].abs(), key.abs()).item()
                    logits[row, i] = total * scale
                    magnitude[row, i] = size * scale
        return logits, magnitude

    def assert_defined(self, actual):
        """``actual`` is what the definition says, ``-inf`` from the lengths on."""
        expected, magnitude = self.define()
        assert actual.is_contiguous()
        assert_close_to_reference(
            actual,
            expected,
            dtype=torch.float32,
            reduction_length=128 + self.q.shape[2] + 2,
            scale=magnitude,
        )

    def check(self):
        given = self.arguments()
        clean = paged_mqa_logits.fp8_paged_mqa_logits(**given, clean_logits=True)
        self.assert_defined(clean)
        plain = paged_mqa_logits.fp8_paged_mqa_logits(**given)
        seen = clean > -math.inf
        assert torch.equal(plain[seen], clean[seen])


def test_page_size():
    assert paged_mqa_logits.page_bytes() == 8640


@pytest.mark.parametrize(
    "shape",
    [
        dict(lens=[[1]], heads=1, width=1, max_model_len=1),
        dict(lens=[[100], [0], [64], [-1], [65]], heads=64),
        dict(lens=[[130]], heads=64, width=3, max_model_len=130),
        dict(lens=[[20, 21], [63, 64], [-1, 0], [64, 65]], heads=8),
        dict(lens=[[98, 99, 100], [0, 0, 1]], heads=5, stride=8448),
        dict(lens=[[70], [3]], width=2, max_model_len=500),
        dict(lens=[[70], [3]], width=40, max_model_len=100, stride=9000),
    ],
)
def test_equals_the_definition(shape):
    Case(**shape).check()


@pytest.mark.parametrize("budget", [1, 150_000, 500_000])
def test_chunks_do_not_show(monkeypatch, budget):
    monkeypatch.setattr(reference, "SCRATCH_BYTES", budget)
    Case([[100, 101], [0, 1], [170, 171], [64, 3], [-1, -1]], heads=4).check()


def test_one_logit_by_hand():
    raw = torch.full((2 * 8640,), 0xFF, dtype=torch.uint8)
    key, scale = 8640 + 128, 8640 + 64 * 128 + 4  # token 1 of page 1
    raw[key : key + 128] = 0
    raw[key + 5] = 0x40  # 2
    raw[scale : scale + 4] = torch.tensor([0, 0, 0x80, 0x3E])  # 0.25
    raw[8640 : 8640 + 128] = 0
    raw[scale - 4 : scale] = 0
    q = torch.zeros(1, 1, 2, 128, dtype=torch.uint8)
    q[0, 0, 0, 5], q[0, 0, 1, 5] = 0x3C, 0xBC  # 1.5 and -1.5
    logits = paged_mqa_logits.fp8_paged_mqa_logits(
        q.view(torch.float8_e4m3fn),
        raw.as_strided((2, 64, 1, 132), (8640, 132, 132, 1)),
        torch.tensor([[8.0, 100.0]]),
        torch.tensor([[2]], dtype=torch.int32),
        torch.tensor([[1]], dtype=torch.int32),
        64,
        clean_logits=True,
    )
    assert logits[0, :2].tolist() == [0.0, 6.0]
    assert logits[0, 2:].eq(-math.inf).all()


def test_one_length_a_request_counts_back_from_the_last_token():
    case = Case([[61, 62, 63], [126, 127, 128], [-2, -1, 0], [-1, 0, 1]])
    given = case.arguments()
    expected = paged_mqa_logits.fp8_paged_mqa_logits(**given, clean_logits=True)
    given["context_lens"] = torch.tensor([63, 128, 0, 1], dtype=torch.int32)
    actual = paged_mqa_logits.fp8_paged_mqa_logits(**given, clean_logits=True)
    assert torch.equal(actual, expected)


def test_agrees_with_the_contiguous_form():
    case = Case([[150], [40]], heads=64)
    logits = paged_mqa_logits.fp8_paged_mqa_logits(**case.arguments())
    for b, length in enumerate((150, 40)):
        read = [case.pages.read(int(case.table[b, i // 64]), i % 64) for i in range(length)]
        contiguous = mqa_logits.fp8_mqa_logits(
            case.q[b],
            torch.stack([key for key, _ in read]).float().to(torch.float8_e4m3fn),
            torch.tensor([scale for _, scale in read]),
            case.weights[b : b + 1],
            torch.zeros(1, dtype=torch.int32),
            torch.full((1,), length, dtype=torch.int32),
        )
        assert torch.allclose(logits[b, :length], contiguous[0], rtol=1e-4, atol=1e-5)


def test_every_e4m3_code_and_extreme_scales():
    case = Case([[70]], heads=3)
    for i in range(70):
        key = random_e4m3_bytes(128, generator=rng(i))
        case.pages.write(int(case.table[0, i // 64]), i % 64, key, (2.0**-126, 1.0, 2.0**60)[i % 3])
    case.check()


def test_nothing_is_cached():
    case = Case([[0], [-1]])
    logits = paged_mqa_logits.fp8_paged_mqa_logits(**case.arguments(), clean_logits=True)
    assert logits.eq(-math.inf).all()
    given = case.arguments()
    given["kv_cache"] = given["kv_cache"][:0]
    logits = paged_mqa_logits.fp8_paged_mqa_logits(**given, clean_logits=True)
    assert logits.shape == (2, 200) and logits.eq(-math.inf).all()


@pytest.mark.parametrize("change", [dict(max_model_len=0), dict(block_tables=0), dict(q=0)])
def test_empty(change):
    given = Case([[0], [0]]).arguments()
    rows, columns = 2, 200
    if "max_model_len" in change:
        given["max_model_len"] = columns = 0
    elif "block_tables" in change:
        given["block_tables"] = given["block_tables"][:, :0]
    else:
        rows = 0
        for name in ("q", "weights", "context_lens", "block_tables"):
            given[name] = given[name][:0]
    logits = paged_mqa_logits.fp8_paged_mqa_logits(**given, clean_logits=True)
    assert logits.shape == (rows, columns) and logits.eq(-math.inf).all()


def test_pages_beyond_two_to_the_31_bytes():
    case = Case([[3]])
    pages = IndexerPages(248_700, untouched=True)
    page = 248_699
    assert page * pages.stride > 2**31
    for i in range(3):
        pages.write(page, i, random_e4m3_bytes(128, generator=rng(i)), 0.5)
    case.pages = pages
    case.table[0, 0] = page
    case.check()


def test_a_page_outside_the_cache_is_not_read():
    case = Case([[100]])
    case.table[0, 1] = 2**31 - 1
    logits = paged_mqa_logits.fp8_paged_mqa_logits(**case.arguments())
    case.lens[0, 0] = 64
    assert torch.equal(
        logits[0, :64], paged_mqa_logits.fp8_paged_mqa_logits(**case.arguments())[0, :64]
    )


def test_strided_arguments():
    case = Case([[100], [7]], heads=8)
    given = case.arguments()
    expected = paged_mqa_logits.fp8_paged_mqa_logits(**given, clean_logits=True)
    wide = torch.full((2, 9), GARBAGE[0], dtype=torch.int32)
    wide[:, :4] = case.table
    given["block_tables"] = wide[:, :4]
    lens = torch.full((2, 3), 190, dtype=torch.int32)
    lens[:, 1:2] = case.lens
    given["context_lens"] = lens[:, 1:2]
    assert torch.equal(paged_mqa_logits.fp8_paged_mqa_logits(**given, clean_logits=True), expected)


def test_results_are_not_biased():
    case = Case([[190], [180], [150]], heads=8)
    logits = paged_mqa_logits.fp8_paged_mqa_logits(**case.arguments(), clean_logits=True)
    assert_unbiased(logits, case.define()[0], slack=0.02)


LENS_IN_PAIRS = [
    ([[0], [90], [-1]], [[3], [100], [128]]),
    ([[0, 0], [0, 1]], [[3, 4], [99, 100]]),
]


def alike(lens: tuple, heads: int = 16) -> list[Case]:
    """Cases of these lengths whose caches are of one size."""
    cases = [Case(values, heads=heads, seed=seed) for seed, values in enumerate(lens)]
    blocks = max(len(case.pages.cache) for case in cases)
    for case in cases:
        pages = IndexerPages(blocks)
        pages.bytes[: len(case.pages.bytes)] = case.pages.bytes
        case.pages = pages
    return cases


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("budget", [1, 400_000, 256 << 20])
@pytest.mark.parametrize("lens", LENS_IN_PAIRS)
def test_capture_safe_and_within_the_stated_scratch(monkeypatch, lens, budget, clean):
    monkeypatch.setattr(reference, "SCRATCH_BYTES", budget)
    operation = paged_mqa_logits.fp8_paged_mqa_logits
    cases = alike(lens)
    first, second = (record(operation, **case.arguments(), clean_logits=clean) for case in cases)
    assert first.calls == second.calls, "the launches depend on what the tensors hold"
    requests, next_n = cases[0].lens.shape
    stated = paged_mqa_logits.scratch_bytes(requests, next_n, 16, 4, 200)
    used = first.peak_bytes - 4 * requests * next_n * 200
    assert used <= stated
    assert used > stated / 2, "the stated scratch is far too much"


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [400_000, 256 << 20])
@pytest.mark.parametrize("lens", LENS_IN_PAIRS)
def test_a_captured_graph_follows_its_inputs(monkeypatch, lens, budget):
    """Captured with (almost) nothing cached, as vLLM captures; replayed with more."""
    monkeypatch.setattr(reference, "SCRATCH_BYTES", budget)
    first, second = alike(lens)
    actual, _ = replay_on_gpu(
        paged_mqa_logits.fp8_paged_mqa_logits,
        first.arguments() | dict(clean_logits=True),
        second.arguments() | dict(clean_logits=True),
    )
    second.assert_defined(actual)


@pytest.mark.parametrize("max_model_len", [1, 32768, 262144])
@pytest.mark.parametrize("next_n", [1, 3])
@pytest.mark.parametrize("requests", [1, 512])
def test_scratch_stays_near_the_budget_at_real_shapes(requests, next_n, max_model_len):
    pages = -(-max_model_len // 64)
    stated = paged_mqa_logits.scratch_bytes(requests, next_n, 64, pages, max_model_len)
    assert 0 < stated <= 1.1 * reference.SCRATCH_BYTES


def test_runs_on_a_fake_gpu():
    """Devices and shapes fit without values, at a real size."""
    with FakeTensorMode():
        gpu = torch.device("cuda")
        raw = torch.empty(2000 * 8640, dtype=torch.uint8, device=gpu)
        logits = paged_mqa_logits.fp8_paged_mqa_logits(
            torch.empty(48, 3, 64, 128, device=gpu).to(torch.float8_e4m3fn),
            raw.as_strided((2000, 64, 1, 132), (8640, 132, 132, 1)),
            torch.empty(144, 64, device=gpu),
            torch.empty(48, 3, dtype=torch.int32, device=gpu),
            torch.empty(48, 512, dtype=torch.int32, device=gpu),
            32768,
            clean_logits=True,
        )
        assert logits.shape == (144, 32768) and logits.device.type == "cuda"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(1, 1, 8, 128)), "q: dtype"),
        (dict(q=torch.zeros(1, 8, 128).to(torch.float8_e4m3fn)), "q: shape"),
        (dict(q=torch.zeros(1, 0, 8, 128).to(torch.float8_e4m3fn)), "q: shape .*next_n"),
        (dict(kv_cache=torch.zeros(9, 64, 132, dtype=torch.uint8)), "kv_cache: shape"),
        (dict(kv_cache=torch.zeros(9, 32, 1, 132, dtype=torch.uint8)), "kv_cache: shape .*64"),
        (dict(kv_cache=torch.zeros(9, 64, 1, 132)), "kv_cache: dtype"),
        (
            dict(
                kv_cache=torch.zeros(90000, dtype=torch.uint8).as_strided(
                    (9, 64, 1, 132), (8452, 132, 132, 1)
                )
            ),
            r"kv_cache: stride\(0\) is 8452, allowed: multiples of 8 from 8448 on",
        ),
        (dict(weights=torch.zeros(1, 9)), "weights: shape"),
        (dict(weights=torch.zeros(2, 8)), "weights: shape .*rows=1"),
        (dict(context_lens=torch.zeros(1, 2, dtype=torch.int32)), "context_lens: shape"),
        (dict(context_lens=torch.zeros(2, dtype=torch.int32)), "context_lens: shape"),
        (dict(context_lens=torch.zeros(1, 1)), "context_lens: dtype"),
        (dict(block_tables=torch.zeros(2, 4, dtype=torch.int32)), "block_tables: shape"),
        (dict(block_tables=torch.zeros(1, 4, dtype=torch.int64)), "block_tables: dtype"),
        (dict(max_model_len=-1), "max_model_len: -1"),
        (dict(max_model_len=2.5), "max_model_len: 2.5"),
        (
            dict(block_tables=torch.zeros(1, 4, dtype=torch.int32, device="meta")),
            "block_tables: device meta",
        ),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        paged_mqa_logits.fp8_paged_mqa_logits(**{**Case([[3]]).arguments(), **change})
