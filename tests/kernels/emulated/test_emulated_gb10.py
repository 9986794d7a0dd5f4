"""On a GB10: its table, its multiprocessors, and FP8 products by the e4m3 instruction."""

from __future__ import annotations

import pytest
from emulated_gpu import emulated_gpu
from emulator.errors import PtxError
from logits_checks import assert_logits, e4m3_values, score
from test_fp8_einsum import compare, draw
from test_mqa_logits import arguments, inside

from vllm_sm12x import lowering
from vllm_sm12x.ops import mqa_logits
from vllm_sm12x.ops.fp8_einsum import fp8_einsum_bhr_hdr

E4M3 = "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"


@pytest.fixture
def gb10():
    with emulated_gpu((12, 1)) as driver:
        yield driver


def einsum() -> None:
    operands = draw(24, 2, 256, 256)
    fp8_einsum_bhr_hdr(*operands, implementation="triton")
    compare(*operands)


def logits() -> None:
    given = arguments(m=9, heads=64, n=300)
    actual = mqa_logits.fp8_mqa_logits(**given, clean_logits=True, implementation="triton")
    scales = (given["k_scale"], given["weights"])
    expected, magnitude = score(given["q"], e4m3_values(given["k"]), *scales)
    assert_logits(actual, expected, magnitude, inside(given["ks"], given["ke"], 300), 64)


@pytest.mark.parametrize("operation", [einsum, logits])
def test_fp8_operations(gb10, operation):
    operation()
    for launched in gb10.launched:
        assert launched.counts.warps[E4M3] > 0


def test_without_the_lowering_the_instruction_is_another(gb10, monkeypatch):
    """Which is why there is one: Triton makes an f16 product of it."""
    monkeypatch.setenv(lowering.ENV, "native")
    lowering.clear_cache()
    with pytest.raises(PtxError, match=r"not known: mma\.sync.*\.f16\.f16"):
        einsum()
