"""The prefill kernels: tables, and real shapes on a GPU. Small ones are in ``emulated/``."""

from __future__ import annotations

import pytest
import torch
from capture import record, replay_on_gpu
from prefill_checks import attend, check_tokens, named_rows
from tolerance import assert_unbiased

from vllm_sm12x.ops import sparse_mla
from vllm_sm12x.ops.sparse_mla.config_prefill import PREFILL_TABLE, prefill_config

SCALE = 512**-0.5


def test_every_target_has_every_number_of_heads():
    assert set(PREFILL_TABLE) == {"sm_90", "sm_120", "sm_121", "triton"}
    for target in PREFILL_TABLE:
        assert set(PREFILL_TABLE[target]) == {8, 16, 32, 64, 128}


@pytest.mark.parametrize(
    ("target", "heads", "message"),
    [
        ("sm_120", 24, "q: 24 heads, allowed .* on sm_120: 8, 16, 32, 64, 128"),
        ("sm_80", 64, "target: 'sm_80', allowed: sm_120, sm_121, sm_90, triton"),
    ],
)
def test_a_shape_without_a_row_is_an_error(target, heads, message):
    with pytest.raises(ValueError, match=message):
        prefill_config(target, heads)


def arguments(
    tokens: int, heads: int, width: int, *, rows: int = 8192, seed: int = 0, device: str = "cpu"
) -> dict:
    """A chunk as the engine gives it: lengths that grow, absent keys here and there, NaN around."""
    generator = torch.Generator(device).manual_seed(seed)
    kinds = dict(generator=generator, device=device)
    kv = torch.randn(rows, 512, **kinds).bfloat16()
    kv[::97] = torch.nan  # rows that nobody names
    indices = torch.randint(rows, (tokens, width), dtype=torch.int32, **kinds)
    indices[indices % 97 == 0] = -1
    lens = torch.randint(width + 1, (tokens,), dtype=torch.int32, **kinds)
    lens[tokens // 2 :] = width
    lens[: tokens // 8] = torch.arange(tokens // 8, dtype=torch.int32, device=device)
    return dict(
        q=torch.randn(tokens, heads, 512, **kinds).bfloat16(),
        kv=kv,
        indices=indices,
        lens=lens,
        attn_sink=torch.randn(max(heads, 64), **kinds),
        softmax_scale=SCALE,
        out=torch.full((tokens, heads, 512), torch.nan, dtype=torch.bfloat16, device=device),
        lse=torch.full((tokens, heads), torch.nan, device=device),
    )


def check(given: dict, tokens) -> None:
    check_tokens(
        given["q"],
        given["kv"],
        given["indices"],
        given["lens"],
        given["attn_sink"],
        SCALE,
        given["out"],
        given["lse"],
        tokens,
    )


@pytest.mark.parametrize("operation", ["sparse_mla_prefill", "prefill_scratch_bytes"])
def test_an_unknown_implementation_is_refused(operation):
    given = (
        arguments(2, 8, 16)
        if operation == "sparse_mla_prefill"
        else dict(tokens=2, heads=8, keys=1)
    )
    with pytest.raises(ValueError, match="implementation: 'cuda', allowed: reference, triton"):
        getattr(sparse_mla, operation)(**given, implementation="cuda")
    if "out" in given:
        assert given["out"].isnan().all(), "nothing is written before the checks"


def test_the_reference_is_the_default():
    given, named = arguments(4, 8, 40), arguments(4, 8, 40)
    sparse_mla.sparse_mla_prefill(**given)
    sparse_mla.sparse_mla_prefill(**named, implementation="reference")
    assert torch.equal(given["out"], named["out"])
    check(given, range(4))


def test_tensors_on_no_gpu_are_refused():
    given = arguments(2, 8, 16)
    with pytest.raises(ValueError, match="q: device cpu, allowed in the Triton prefill kernel"):
        sparse_mla.sparse_mla_prefill(**given, implementation="triton")
    assert given["out"].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
def test_every_number_of_heads_on_a_gpu(lowered, heads):
    given = arguments(96, heads, 200, device="cuda")
    sparse_mla.sparse_mla_prefill(**given, implementation="triton")
    check(given, range(96))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [32, 64])
def test_a_full_chunk_on_a_gpu(lowered, heads):
    """4,096 tokens of 640 keys: right and not biased."""
    given = arguments(4096, heads, 640, rows=40_000, device="cuda")
    sparse_mla.sparse_mla_prefill(**given, implementation="triton")
    assert given["out"].isfinite().all()
    tokens = [*range(0, 64), *range(64, 4096, 37), 4095]
    check(given, tokens)
    expected = []
    for t in tokens:
        rows = named_rows(given["indices"], given["lens"], t, 40_000)
        sink = given["attn_sink"][:heads]
        expected.append(attend(given["q"][t], given["kv"][rows], sink, SCALE)[0][:, 77])
    # One column a token and head: the others share the roundings of the weights.
    assert_unbiased(given["out"][tokens][:, :, 77], torch.stack(expected))


@pytest.mark.gpu
def test_rows_far_apart_on_a_gpu(lowered):
    """Offsets beyond 2**31 elements."""
    given = arguments(8, 64, 64, rows=4_194_304 + 100, device="cuda")
    given["indices"][:, ::2] = given["indices"][:, ::2] % 97 + 4_194_304
    given["indices"][given["indices"] % 97 == 0] = -1
    sparse_mla.sparse_mla_prefill(**given, implementation="triton")
    check(given, range(8))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 64])
def test_nan_in_a_key_that_is_named_shows_on_a_gpu(lowered, heads):
    """Also where no score of the token is a number."""
    given = arguments(3, heads, 128, device="cuda")
    given["lens"].copy_(torch.tensor([1, 3, 70]))
    for t, entry in enumerate((0, 1, 66)):
        given["indices"][t, entry] = 97
    sparse_mla.sparse_mla_prefill(**given, implementation="triton")
    assert given["out"].isnan().all()


@pytest.mark.gpu
def test_nothing_is_allocated_on_a_gpu():
    given = arguments(64, 64, 128, device="cuda")
    recorder = record(sparse_mla.sparse_mla_prefill, **given, implementation="triton")
    assert recorder.peak_bytes == sparse_mla.prefill_scratch_bytes(
        64, 64, 128, implementation="triton"
    )


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs():
    _, after = replay_on_gpu(
        lambda **given: sparse_mla.sparse_mla_prefill(**given, implementation="triton"),
        arguments(40, 64, 128, seed=1),
        arguments(40, 64, 128, seed=2),
    )
    check({**arguments(40, 64, 128, seed=2), **{n: after[n] for n in ("out", "lse")}}, range(40))
