"""The Triton kernel of decode logits: table, and real shapes on a GPU; small in ``emulated/``."""

from __future__ import annotations

import math

import pytest
import torch
from capture import record, replay_on_gpu
from logits_checks import assert_same_top_k, e4m3_values, score
from test_paged_mqa_logits import GARBAGE, LENS_IN_PAIRS, Case, alike

from vllm_sm12x import lowering
from vllm_sm12x.ops import paged_mqa_logits
from vllm_sm12x.ops.paged_mqa_logits import config

TOP_K = 512


def test_every_target_has_every_shape():
    assert set(config.TABLE) == {"sm_90", "sm_120", "sm_121"}
    for table in config.TABLE.values():
        assert set(table) == {(heads, rows) for heads in (32, 64) for rows in config.ROWS}


@pytest.mark.parametrize(
    ("target", "heads", "message"),
    [
        ("sm_120", 24, "q: 24 heads, allowed in the Triton paged logits kernel: 32, 64"),
        ("sm_80", 64, "target: 'sm_80', allowed: sm_120, sm_121, sm_90"),
    ],
)
def test_a_shape_without_a_row_is_an_error(target, heads, message):
    with pytest.raises(ValueError, match=message):
        config.row(1, heads, target)


@pytest.mark.parametrize("target", ["sm_90", "sm_120", "sm_121"])
@pytest.mark.parametrize("rows", [1, 3, 24, 200, 100_000])
@pytest.mark.parametrize("tiles", [1, 8, 256, 2048])
@pytest.mark.parametrize("multiprocessors", [48, 132, 170, 188])
def test_splits(rows, tiles, target, multiprocessors):
    """Never more than there are tiles; where all fits at a time, it does."""
    row = config.row(rows, 64, target)
    splits = config.splits(row, rows, tiles, multiprocessors)
    room = multiprocessors * row.programs
    assert 1 <= splits <= tiles
    if 8 * rows <= room:
        assert rows * splits <= room
        assert splits == tiles or rows * (splits + 1) > room


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation: 'cuda', allowed: reference, triton"):
        paged_mqa_logits.fp8_paged_mqa_logits(**Case([[3]]).arguments(), implementation="cuda")
    with pytest.raises(ValueError, match="implementation: 'cuda', allowed: reference, triton"):
        paged_mqa_logits.scratch_bytes(1, 1, 64, 1, 64, implementation="cuda")


def test_the_reference_is_the_default():
    given = Case([[70], [3]]).arguments() | dict(clean_logits=True)
    named = paged_mqa_logits.fp8_paged_mqa_logits(**given, implementation="reference")
    assert torch.equal(paged_mqa_logits.fp8_paged_mqa_logits(**given), named)


def test_tensors_on_no_gpu_are_refused():
    message = "q: device cpu, allowed in the Triton paged logits kernel"
    with pytest.raises(ValueError, match=message):
        run(Case([[3]], heads=64).arguments())


def test_the_kernel_takes_no_scratch():
    assert paged_mqa_logits.scratch_bytes(24, 1, 64, 512, 32_768, implementation="triton") == 0


def run(given: dict, clean_logits: bool = True) -> torch.Tensor:
    return paged_mqa_logits.fp8_paged_mqa_logits(
        **given, clean_logits=clean_logits, implementation="triton"
    )


def draw(lens, heads: int = 64, *, columns: int = 32_768, whole: bool = False, seed=0) -> dict:
    """On the GPU; pages that no request has are NaN, and table entries that none reaches garbage.

    Args:
        whole: Whole numbers, see below.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    kinds = dict(generator=generator, device="cuda")
    lens = torch.tensor(lens, dtype=torch.int32)
    requests, next_n = lens.shape
    needed = (lens.amax(1).clamp(min=0) + 63) // 64
    blocks = int(needed.sum()) + 3
    raw = torch.full((blocks, 8640), 0xFF, dtype=torch.uint8, device="cuda")
    order = torch.randperm(blocks, **kinds).int()
    used = order[3:].long()
    numbers = (
        torch.randint(-2, 3, (len(used), 8192), **kinds).float()
        if whole
        else torch.randn(len(used), 8192, **kinds) * 60
    )
    raw[used, :8192] = numbers.to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.exp2(torch.randint(-9, -5, (len(used), 64), **kinds).float())
    raw[used, 8192:8448] = scales.view(torch.uint8)
    table = torch.tensor(GARBAGE, dtype=torch.int32).repeat(requests, -(-columns // 256))
    table = table[:, : -(-columns // 64)].cuda()
    first = 3
    for b, count in enumerate(needed.tolist()):
        table[b, :count] = order[first : first + count]
        first += count
    shape = (requests, next_n, heads, 128)
    if whole:
        q = torch.randint(-2, 3, shape, **kinds).float()
        weights = torch.randint(-3, 4, (requests * next_n, heads), **kinds).float()
    else:
        q = torch.randn(shape, **kinds)
        weights = torch.randn(requests * next_n, heads, **kinds) * 0.01
    return dict(
        q=q.to(torch.float8_e4m3fn),
        kv_cache=raw.as_strided((blocks, 64, 1, 132), (8640, 132, 132, 1)),
        weights=weights,
        context_lens=lens.cuda(),
        block_tables=table,
        max_model_len=columns,
    )


def define(given: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in float64, and which of them there are."""
    lens = given["context_lens"]
    requests, next_n = lens.shape
    columns = given["max_model_len"]
    raw = given["kv_cache"].as_strided((given["kv_cache"].shape[0], 8448), (8640, 1))
    logits = torch.zeros(requests * next_n, columns, dtype=torch.float64, device="cuda")
    for b in range(requests):
        count = max(0, int(lens[b].max()))
        pages = raw[given["block_tables"][b, : -(-count // 64)].long()]
        keys = e4m3_values(pages[:, :8192].reshape(-1, 128))[:count]
        scales = pages[:, 8192:].contiguous().view(torch.float32).reshape(-1)[:count]
        rows = slice(b * next_n, (b + 1) * next_n)
        logits[rows, :count] = score(given["q"][b], keys, scales, given["weights"][rows])[0]
    return logits, torch.arange(columns, device="cuda") < lens.reshape(-1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [32, 64])
@pytest.mark.parametrize(
    "lens",
    [
        [[1]],
        [[32_768]],
        [[127], [0], [128], [-1], [129], [5000], [64], [9999]],
        [[4000 + 517 * i] for i in range(24)],
        [[500 + i, 501 + i, 502 + i] for i in range(40)],
        [[i] for i in range(700)],
    ],
)
def test_whole_numbers_are_exact_on_a_gpu(lowered, heads, lens):
    """However few bits an FP8 matrix instruction keeps of a sum, it keeps these."""
    given = draw(lens, heads, whole=True)
    expected, seen = define(given)
    assert torch.equal(run(given).double(), expected.masked_fill(~seen, -math.inf))


@pytest.mark.gpu
@pytest.mark.parametrize("lens", [[[32_768]], [[3000 + 1237 * i] for i in range(24)]])
def test_the_same_keys_are_chosen_on_a_gpu(lowered, lens):
    """Random numbers: small errors, and they choose the keys that the definition chooses."""
    given = draw(lens)
    expected, seen = define(given)
    actual = run(given, clean_logits=False)
    size = expected[seen].square().mean().sqrt()
    assert (actual - expected)[seen].square().mean().sqrt() <= 2**-10 * size
    assert_same_top_k(actual, expected, seen, TOP_K, error=2**-7 * float(size))


@pytest.mark.gpu
@pytest.mark.parametrize("lens", [[[32_768]], [[3000 + 1237 * i] for i in range(24)]])
def test_as_deep_gemm_on_a_gpu(lowered, lens):
    deep_gemm = pytest.importorskip("vllm.third_party.deep_gemm")
    given = draw(lens)
    given["block_tables"].clamp_(0, given["kv_cache"].shape[0] - 1)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    theirs = deep_gemm.fp8_fp4_paged_mqa_logits(
        (given["q"], None),
        given["kv_cache"],
        given["weights"],
        given["context_lens"],
        given["block_tables"],
        deep_gemm.get_paged_mqa_logits_metadata(given["context_lens"], 64, processors),
        given["max_model_len"],
        clean_logits=False,
    )
    _, seen = define(given)
    ours = run(given, clean_logits=False)
    size = theirs[seen].square().mean().sqrt()
    assert (ours - theirs)[seen].square().mean().sqrt() <= 2**-10 * size
    assert_same_top_k(ours, theirs.double(), seen, TOP_K, error=2**-7 * float(size))


@pytest.mark.gpu
def test_a_million_tokens_on_a_gpu(lowered):
    """262,144 compressed keys of one request beside short ones."""
    given = draw([[262_144], [0], [77]], columns=262_144, whole=True)
    expected, seen = define(given)
    assert torch.equal(run(given).double(), expected.masked_fill(~seen, -math.inf))


@pytest.mark.gpu
def test_pages_beyond_two_to_the_31_bytes_on_a_gpu(lowered):
    given = draw([[300]], columns=320, whole=True)
    expected, seen = define(given)
    small, blocks = given["kv_cache"], 250_000
    raw = torch.empty(blocks * 8640, dtype=torch.uint8, device="cuda")
    cache = raw.as_strided((blocks, 64, 1, 132), (8640, 132, 132, 1))
    cache[-len(small) :] = small
    given["kv_cache"] = cache
    given["block_tables"][:, :5] += blocks - len(small)
    assert torch.equal(run(given).double(), expected.masked_fill(~seen, -math.inf))


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["query", "key", "scale", "weight"])
def test_nan_in_what_is_seen_shows_on_a_gpu(lowered, what):
    given = draw([[100], [70]], columns=128)
    expected = torch.zeros(2, 128, dtype=torch.bool, device="cuda")
    page = given["kv_cache"].as_strided((given["kv_cache"].shape[0], 8448), (8640, 1))[
        int(given["block_tables"][1, 1])
    ]
    if what == "query":
        given["q"].view(torch.uint8)[1, 0, 7, 5] = 0x7F
    elif what == "weight":
        given["weights"][1, 7] = math.nan
    elif what == "key":
        page[3 * 128 + 5] = 0x7F
    else:
        page[8192 + 3 * 4 : 8192 + 4 * 4].view(torch.float32).fill_(math.nan)
    if what in ("query", "weight"):
        expected[1, :70] = True
    else:
        expected[1, 64 + 3] = True
    assert torch.equal(run(given).isnan(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("clean", [False, True])
def test_only_the_result_is_allocated_on_a_gpu(clean):
    given = draw([[100], [70]], columns=128)
    assert record(run, given, clean).peak_bytes == 4 * 2 * 128


@pytest.mark.gpu
@pytest.mark.parametrize("lens", LENS_IN_PAIRS)
def test_a_captured_graph_follows_its_inputs(monkeypatch, lens):
    """Captured with (almost) nothing cached, as vLLM captures; replayed with more."""
    monkeypatch.setenv(lowering.ENV, "sm120")
    lowering.clear_cache()
    first, second = alike(lens, heads=64)
    actual, _ = replay_on_gpu(lambda **given: run(given), first.arguments(), second.arguments())
    second.assert_defined(actual)
    lowering.clear_cache()
