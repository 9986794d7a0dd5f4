"""The compile gate over our kernels: every configuration of every table, for both targets."""

from __future__ import annotations

import functools

import pytest

from vllm_sm12x import lowering
from vllm_sm12x.proof import discover, gate

CASES = [(name, case) for name, given in discover.cases().items() for case in given]
# Neighbours that are compiled together, so that the disassembler need not start for each.
TOGETHER = 4


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


@functools.cache
def reports_of(group):
    """By the number of the case and the target, of one group of neighbours."""
    numbers = range(group * TOGETHER, min((group + 1) * TOGETHER, len(CASES)))
    work = [(number, target) for number in numbers for target in gate.TARGETS]
    reports = gate.examine_all((CASES[number][1], target) for number, target in work)
    return dict(zip(work, reports, strict=True))


@pytest.mark.parametrize("target", gate.TARGETS)
@pytest.mark.parametrize(
    "number",
    [pytest.param(at, id=f"{name}: {case.label}") for at, (name, case) in enumerate(CASES)],
)
def test_a_kernel_passes(number, target):
    report = reports_of(number // TOGETHER)[number, target]
    assert (report.case, report.target) == (CASES[number][1], target)
    assert report.failures == ()
