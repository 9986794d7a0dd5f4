"""The prefill kernels, Triton's and Gluon's, against the definition, as compiled for SM12x."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from prefill_checks import attend, check_tokens
from test_sparse_mla import SCALE, Prefill, define
from tolerance import assert_unbiased

from vllm_sm12x.ops import sparse_mla
from vllm_sm12x.ops.sparse_mla import config_prefill, prefill_kernel
from vllm_sm12x.ops.sparse_mla.config_prefill import PREFILL_TABLE, PrefillConfig

HEADS = (8, 16, 32, 64, 128)
# Around every tile of 16, 32 and 64 keys.
LENS = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 130]
ROWS = sorted(
    {
        (heads, config)
        for target, table in PREFILL_TABLE.items()
        for heads, config in table.items()
        if target != "sm_90"
    },
    key=repr,
)


@pytest.fixture(autouse=True, params=["triton", "gluon"])
def kernel(monkeypatch, request):
    """Each test for both kernels."""
    rows = PREFILL_TABLE["triton"]
    if request.param == "gluon":
        gluon = PREFILL_TABLE["sm_120"][32]
        rows = {heads: replace(gluon, block_h=min(64, max(16, heads))) for heads in HEADS}
    monkeypatch.setitem(config_prefill.PREFILL_TABLE, "sm_120", rows)


def run(case: Prefill, config: PrefillConfig | None = None, scale: float = SCALE) -> None:
    arguments = (case.q, case.kv, case.indices, case.lens, case.sink, scale, case.out)
    if config is None:
        sparse_mla.sparse_mla_prefill(*arguments, lse=case.lse, implementation="triton")
    else:
        prefill_kernel.sparse_mla_prefill(*arguments, lse=case.lse, config=config)


def check(case: Prefill, config: PrefillConfig | None = None, scale: float = SCALE) -> None:
    run(case, config, scale)
    check_tokens(
        case.q,
        case.kv,
        case.indices,
        case.lens,
        case.sink,
        scale,
        case.out,
        case.lse,
        range(len(case.q)),
    )


def test_the_vectorised_definition_is_the_definition():
    case = Prefill([9, 0, 30], 32)
    expected, _, lse = define(case.q, case.keys(), case.sink, SCALE)
    for t, keys in enumerate(case.keys()):
        found, _, found_lse, _ = attend(case.q[t], keys, case.sink, SCALE)
        assert torch.allclose(found, expected[t], rtol=1e-12, atol=1e-14)
        assert torch.allclose(found_lse, lse[t], rtol=1e-12)


@pytest.mark.parametrize("kernel", ["triton"], indirect=True)  # a row says which itself
@pytest.mark.parametrize(("heads", "config"), ROWS)
def test_every_row_of_the_table(heads, config):
    check(Prefill(LENS, 128, heads=heads), config)


@pytest.mark.parametrize(
    "shape",
    [
        dict(lens=[1], width=1, heads=8),
        dict(lens=[640, 5], width=640, heads=64),
        dict(lens=[512 + 128, 639], width=640, heads=32),
        dict(lens=[-1, 9, 0, 13, 2**31 - 1, -(2**31)], width=11, heads=16),
        dict(lens=[7, 0], width=0, heads=8),
        dict(lens=[128, 77], width=128, heads=128),
    ],
)
def test_shapes(shape):
    check(Prefill(**shape))


@pytest.mark.parametrize("heads", [8, 64])
def test_absent_keys(heads):
    case = Prefill([100, 100, 100, 100], 128, heads=heads)
    case.indices[0, ::2] = -1
    case.indices[0, 1] = 60  # the first row beyond the keys
    case.indices[0, 3] = 2**31 - 1
    case.indices[0, 5] = -(2**31)
    case.indices[1, :70] = -1  # whole tiles before the first key
    case.indices[2, 5:] = -1  # and after the last
    case.indices[3] = -1
    case.sink[0], case.sink[1] = -math.inf, 1e30
    check(case)


@pytest.mark.parametrize("heads", [16, 32])
def test_padding_rows(heads):
    """A token without a key gives zeros, whatever its query holds."""
    case = Prefill([40, 0, -3], 64, heads=heads)
    case.indices[0] = -1
    case.q.fill_(math.nan)
    run(case)
    assert torch.equal(case.out, torch.zeros_like(case.out))
    assert case.lse.eq(-math.inf).all()


@pytest.mark.parametrize("heads", [8, 64])
def test_no_rows_and_no_tokens(heads):
    case = Prefill([3, 0], 8, heads=heads)
    case.kv = case.kv[:0]
    run(case)
    assert torch.equal(case.out, torch.zeros_like(case.out))
    run(Prefill([], 8, heads=heads))


@pytest.mark.parametrize("heads", [8, 64])
def test_a_key_named_twice_counts_twice(heads):
    """One-hot keys show each weight as one number of the result."""
    case = Prefill([5], 6, heads=heads)
    case.kv = torch.eye(4, 512).bfloat16()
    case.indices = torch.tensor([[2, 0, 2, 3, 2, 1]], dtype=torch.int32)
    case.q.zero_()
    case.sink.fill_(math.log(3.0))
    run(case)
    # Weights 1 for each entry of the five, 3 for the sink.
    expected = torch.zeros(heads, 512)
    expected[:, [0, 2, 3]] = torch.tensor([1 / 8, 3 / 8, 1 / 8])
    assert torch.allclose(case.out[0].float(), expected, atol=1e-6)


@pytest.mark.parametrize("value", [-math.inf, -1e30, -50.0, 0.0, 20.0, 100.0, 1e30])
def test_sinks(value):
    case = Prefill([5, 0, 1, 40], 48, heads=16)
    case.sink[::2] = value
    check(case)


@pytest.mark.parametrize("magnitude", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("heads", [16, 64])
def test_realistic_and_peaked_scores(heads, magnitude):
    """Each head looks for a key: queries near keys give scores far apart, the largest anywhere."""
    case = Prefill([100, 128], 128, heads=heads)
    case.kv = (case.kv.double() * magnitude).bfloat16()
    keys = case.keys()
    for t in range(2):
        for h in range(heads):
            key = keys[t][h * 11 % 100]
            case.q[t, h] = (magnitude * (22.0 * key / key.norm() + case.q[t, h])).bfloat16()
    check(case)


@pytest.mark.parametrize("scale", [0.25, 1e-3, -SCALE])
def test_the_scale(scale):
    check(Prefill([30, 50], 64, heads=64), scale=scale)


@pytest.mark.parametrize("heads", [8, 64])
def test_nan_in_a_key_that_is_named_shows(heads):
    case = Prefill([3, 70, 1], 128, heads=heads)
    case.indices[0, 1] = 0  # row 0 is NaN
    case.indices[1, 66] = 0
    case.indices[2, 0] = 0  # no score is a number
    run(case)
    assert case.out.isnan().all()


def test_rows_beyond_two_to_the_31_elements():
    case = Prefill([4], 8)
    rows = 4_194_304 + 100
    kv = torch.empty(rows, 512, dtype=torch.bfloat16)  # its pages are never touched
    for number, row in enumerate((rows - 1, 5, 4_194_304, 2_097_153)):
        kv[row] = torch.randn(512, generator=torch.Generator().manual_seed(number)).bfloat16()
        case.indices[0, number] = row
    case.kv = kv
    check(case)


@pytest.mark.parametrize("heads", [8, 32])
def test_strided_arguments(heads):
    case, plain = Prefill([5, 40], 48, heads=heads), Prefill([5, 40], 48, heads=heads)
    run(plain)
    wide = torch.full((2, heads + 5, 512), math.nan, dtype=torch.bfloat16)
    wide[:, 2 : 2 + heads] = case.q
    case.q = wide[:, 2 : 2 + heads]
    out = torch.full((2, heads + 3, 512), math.nan, dtype=torch.bfloat16)
    case.out = out[:, 1 : 1 + heads]
    lse = torch.full((heads, 5), math.nan)
    case.lse = lse[:, 1:5:2].T
    for name, beside, columns in (("kv", math.nan, 16), ("indices", 99_999, 9)):
        tensor = getattr(case, name)
        buffer = torch.full((len(tensor), tensor.shape[1] + columns), beside, dtype=tensor.dtype)
        buffer[:, : tensor.shape[1]] = tensor
        setattr(case, name, buffer[:, : tensor.shape[1]])
    case.lens = torch.stack([case.lens, case.lens + 7], 1)[:, 0]
    case.sink = torch.stack([case.sink, case.sink + 7], 1)[:, 0]
    run(case)
    assert torch.equal(case.out, plain.out) and torch.equal(case.lse, plain.lse)
    assert out[:, 0].isnan().all() and out[:, 1 + heads :].isnan().all(), "beside `out`"
    assert lse[:, ::2].isnan().all(), "beside `lse`"


def test_rows_that_are_not_aligned(request):
    """The Triton kernel takes them; the Gluon kernel has no copy for them and says so."""
    case = Prefill([5, 40], 48, heads=32)
    case.kv = torch.nn.functional.pad(case.kv, (0, 9))[:, :512]
    if "gluon" in request.node.callspec.id:
        with pytest.raises(ValueError, match=r"kv: address .*stride\(0\) 521, allowed .* of 16"):
            run(case)
        assert case.out.isnan().all()
    else:
        check(case)


def test_without_lse():
    case, plain = Prefill([5, 40], 48, heads=64), Prefill([5, 40], 48, heads=64)
    run(plain)
    case.lse = None
    run(case)
    assert torch.equal(case.out, plain.out)


@pytest.mark.parametrize("heads", [16, 64])
def test_results_are_not_biased(heads):
    """One column a token and head: the others share the roundings of the weights."""
    case = Prefill([128, 90] * (512 // heads), 128, heads=heads)
    run(case)
    expected = [attend(case.q[t], keys, case.sink, SCALE)[0] for t, keys in enumerate(case.keys())]
    assert_unbiased(case.out[:, :, 77], torch.stack(expected)[:, :, 77])


def test_a_number_of_heads_without_a_row_is_refused():
    case = Prefill([3], 8, heads=12)
    with pytest.raises(ValueError, match="q: 12 heads, allowed .*: 8, 16, 32, 64, 128"):
        run(case)
    assert case.out.isnan().all()
