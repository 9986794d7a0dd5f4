"""The compile gate over our kernels: every configuration of every table, for both targets."""

from __future__ import annotations

import pytest

from vllm_sm12x import lowering
from vllm_sm12x.proof import discover, gate

CASES = [(name, case) for name, given in discover.cases().items() for case in given]


@pytest.fixture(autouse=True)
def as_shipped(monkeypatch, tmp_path_factory):
    """The lowering that nobody has set, and a cache that holds nothing from elsewhere."""
    monkeypatch.delenv(lowering.ENV, raising=False)
    cache = tmp_path_factory.getbasetemp() / "compile-gate"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    lowering.clear_cache()
    yield
    lowering.clear_cache()


def test_every_kernel_and_every_row_has_a_case():
    assert discover.gaps() == []


@pytest.mark.parametrize("target", gate.TARGETS)
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{name}: {case.label}") for name, case in CASES]
)
def test_a_kernel_passes(case, target):
    report = gate.examine(case, target)
    assert report.failures == ()
