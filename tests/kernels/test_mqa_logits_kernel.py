"""The Triton kernel of prefill logits: table, and real shapes on a GPU; small in ``emulated/``."""

from __future__ import annotations

import math

import pytest
import torch
from capture import record, replay_on_gpu
from logits_checks import assert_logits, assert_same_top_k, e4m3_values, score
from test_mqa_logits import arguments, inside

from vllm_sm12x import lowering
from vllm_sm12x.ops import mqa_logits
from vllm_sm12x.ops.mqa_logits import config

TOP_K = 512


def test_every_target_has_every_number_of_heads():
    assert set(config.TABLE) == {"sm_90", "sm_120", "sm_121"}
    for table in config.TABLE.values():
        assert set(table) == {32, 64}


@pytest.mark.parametrize(
    ("target", "heads", "message"),
    [
        ("sm_120", 24, "q: 24 heads, allowed in the Triton logits kernel: 32, 64"),
        ("sm_80", 64, "target: 'sm_80', allowed: sm_120, sm_121, sm_90"),
    ],
)
def test_a_shape_without_a_row_is_an_error(target, heads, message):
    with pytest.raises(ValueError, match=message):
        config.row(heads, target)


@pytest.mark.parametrize("multiprocessors", [48, 132, 170, 188])
@pytest.mark.parametrize("tokens", [1, 15, 512, 4096, 10**6])
@pytest.mark.parametrize("key_tiles", [1, 64, 256, 8192])
def test_tokens_of_a_program(tokens, key_tiles, multiprocessors):
    """No more than the kernel looks at, and a grid that CUDA takes."""
    found = config.tokens_per_program(tokens, key_tiles, multiprocessors)
    assert 1 <= found <= config.MOST_TOKENS
    assert -(-tokens // found) <= 65_535


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation: 'cuda', allowed: reference, triton"):
        mqa_logits.fp8_mqa_logits(**arguments(), implementation="cuda")
    with pytest.raises(ValueError, match="implementation: 'cuda', allowed: reference, triton"):
        mqa_logits.scratch_bytes(1, 64, 1, implementation="cuda")


def test_the_reference_is_the_default():
    given = arguments()
    named = mqa_logits.fp8_mqa_logits(**given, clean_logits=True, implementation="reference")
    assert torch.equal(mqa_logits.fp8_mqa_logits(**given, clean_logits=True), named)


def test_tensors_on_no_gpu_are_refused():
    with pytest.raises(ValueError, match="q: device cpu, allowed in the Triton logits kernel"):
        mqa_logits.fp8_mqa_logits(**arguments(), implementation="triton")


def test_what_counts_as_the_same_choice():
    expected = torch.tensor([[1.0, 5.0, 4.0, 3.99, 9.0, 2.0], [3.0, 2.0, 1.0, 0.0, 0.0, 0.0]])
    inside = torch.tensor([[True, True, True, True, False, True], [True, False] + [False] * 4])
    swapped, wrong = expected.clone(), expected.clone()
    swapped[0, 2], swapped[0, 3] = 3.99, 4.0
    wrong[0, 5] = 4.5
    expected = expected.double()
    assert_same_top_k(expected.float(), expected, inside, 2, error=0.0)
    assert_same_top_k(swapped, expected, inside, 2, error=0.1)
    for actual, error in ((swapped, 0.001), (wrong, 0.1)):
        with pytest.raises(AssertionError, match="is not chosen|is chosen"):
            assert_same_top_k(actual, expected, inside, 2, error=error)


def test_the_kernel_takes_no_scratch():
    assert mqa_logits.scratch_bytes(4096, 64, 32_768, implementation="triton") == 0


def draw(m: int, n: int, heads: int = 64, *, seed: int = 0, whole: bool = False) -> dict:
    """On the GPU: causal ranges of two requests and empty ones; or whole numbers, see below."""
    generator = torch.Generator("cuda").manual_seed(seed)
    kinds = dict(generator=generator, device="cuda")
    if whole:
        q, k = (torch.randint(-2, 3, (*shape, 128), **kinds) for shape in ((m, heads), (n,)))
        weights = torch.randint(-3, 4, (m, heads), **kinds).float()
    else:
        q, k = (torch.randn(*shape, 128, **kinds) for shape in ((m, heads), (n,)))
        weights = torch.randn(m, heads, **kinds) * 0.01
    token = torch.arange(m, dtype=torch.int32, device="cuda")
    second = token >= m // 3
    starts = torch.where(second, n // 4, 0).int()
    ends = torch.where(second, n - (m - 1 - token) // 4, n // 4 - (m // 3 - token) // 4).int()
    ends[::41] = starts[::41]
    return dict(
        q=q.to(torch.float8_e4m3fn),
        k=k.to(torch.float8_e4m3fn),
        k_scale=torch.exp2(torch.randint(-9, -5, (n,), **kinds).float()),
        weights=weights,
        ks=starts,
        ke=ends,
    )


def run(given: dict, clean_logits: bool = True) -> torch.Tensor:
    return mqa_logits.fp8_mqa_logits(**given, clean_logits=clean_logits, implementation="triton")


def define(given: dict, rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits and magnitudes in float64, and which of them there are, of some tokens."""
    q = given["q"].view(torch.uint8)[rows].view(torch.float8_e4m3fn)
    found = score(q, e4m3_values(given["k"]), given["k_scale"], given["weights"][rows])
    column = torch.arange(len(given["k"]), device="cuda")
    seen = (column >= given["ks"][rows, None]) & (column < given["ke"][rows, None])
    return *found, seen


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [32, 64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (300, 5000), (4096, 2048)])
def test_whole_numbers_are_exact_on_a_gpu(lowered, heads, shape):
    """However few bits an FP8 matrix instruction keeps of a sum, it keeps these."""
    given = draw(*shape, heads, whole=True)
    rows = torch.arange(0, shape[0], max(1, shape[0] // 300), device="cuda")
    expected, _, seen = define(given, rows)
    assert torch.equal(run(given)[rows].double(), expected.masked_fill(~seen, -math.inf))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 32_768), (700, 9000)])
def test_the_same_keys_are_chosen_on_a_gpu(lowered, shape):
    """Random numbers: small errors, and they choose the keys that the definition chooses."""
    given = draw(*shape)
    rows = torch.arange(1, shape[0], max(1, shape[0] // 48), device="cuda")
    expected, _, seen = define(given, rows)
    actual = run(given, clean_logits=False)[rows]
    size = expected[seen].square().mean().sqrt()
    error = (actual - expected)[seen].square().mean().sqrt()
    assert error <= 2**-10 * size
    assert_same_top_k(actual, expected, seen, TOP_K, error=2**-7 * float(size))


@pytest.mark.gpu
def test_float32_sums_by_sm120s_instructions_on_a_gpu(monkeypatch):
    """Hopper computes them as f16 products in float32, so that float32's bound holds."""
    monkeypatch.setenv(lowering.ENV, "sm120")
    lowering.clear_cache()
    given = draw(64, 3000)
    expected, magnitude, seen = define(given, slice(None))
    assert_logits(run(given), expected, magnitude, seen, 64)
    lowering.clear_cache()


@pytest.mark.gpu
def test_as_deep_gemm_on_a_gpu(lowered):
    deep_gemm = pytest.importorskip("vllm.third_party.deep_gemm")
    given = draw(1024, 8192)
    theirs = deep_gemm.fp8_fp4_mqa_logits(
        (given["q"], None),
        (given["k"], given["k_scale"]),
        given["weights"],
        given["ks"],
        given["ke"],
        clean_logits=False,
    )
    seen = inside(given["ks"].cpu(), given["ke"].cpu(), 8192).cuda()
    ours = run(given, clean_logits=False)
    size = theirs[seen].square().mean().sqrt()
    assert (ours - theirs)[seen].square().mean().sqrt() <= 2**-10 * size
    assert_same_top_k(ours, theirs.double(), seen, TOP_K, error=2**-7 * float(size))


@pytest.mark.gpu
def test_queries_beyond_two_to_the_31_bytes_on_a_gpu(lowered):
    given = draw(270_000, 64, whole=True)
    rows = torch.tensor([0, 1, 262_143, 262_144, 262_145, 269_999], device="cuda")
    given["ks"].zero_()
    given["ke"].fill_(64)
    assert torch.equal(run(given)[rows].double(), define(given, rows)[0])


@pytest.mark.gpu
def test_logits_beyond_two_to_the_31_on_a_gpu(lowered):
    given = draw(70_000, 32_768, whole=True)
    rows = torch.tensor([100, 65_535, 65_536, 69_999], device="cuda")
    given["ke"].zero_()
    given["ks"][rows], given["ke"][rows] = 30_000, 32_768
    expected, _, seen = define(given, rows)
    assert torch.equal(run(given)[rows].double(), expected.masked_fill(~seen, -math.inf))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["q", "k", "k_scale", "weights"])
def test_nan_in_what_is_seen_shows_on_a_gpu(lowered, name):
    given = draw(5, 300)
    given["ks"].zero_()
    given["ke"].fill_(300)
    if name in ("q", "k"):
        given[name].view(torch.uint8)[2, ..., 5] = 0x7F
    else:
        given[name][2] = math.nan
    expected = torch.zeros(5, 300, dtype=torch.bool, device="cuda")
    expected[(slice(None), 2) if name.startswith("k") else 2] = True
    assert torch.equal(run(given).isnan(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("clean", [False, True])
def test_only_the_result_is_allocated_on_a_gpu(clean):
    given = draw(64, 200)
    assert record(run, given, clean).peak_bytes == 4 * 64 * 200


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs():
    first, given = (arguments(40, 64, 300, seed=seed) for seed in (1, 2))
    actual, _ = replay_on_gpu(lambda **inputs: run(inputs), first, given)
    whole = {name: tensor.cuda() for name, tensor in given.items()}
    expected, _, seen = define(whole, slice(None))
    actual = actual.cuda()
    assert actual[~seen].eq(-math.inf).all()
    error = (actual - expected)[seen].square().mean().sqrt()
    assert error <= 2**-10 * expected[seen].square().mean().sqrt()
