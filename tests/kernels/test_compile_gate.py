"""The compile gate over our kernels: every configuration of every table, for both targets."""

from __future__ import annotations

import functools

import pytest

from vllm_sm12x import lowering
from vllm_sm12x.proof import discover, gate

# Neighbours that are compiled together, so that the disassembler need not start for each.
TOGETHER = 4
GROUPS = {
    (name, at): given[at : at + TOGETHER]
    for name, given in discover.cases().items()
    for at in range(0, len(given), TOGETHER)
}
PLACES = [
    pytest.param(group, place, id=f"{group[0]}: {case.label}")
    for group, given in GROUPS.items()
    for place, case in enumerate(given)
]


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
    """By target, those of the cases of a group."""
    work = [(case, target) for target in gate.TARGETS for case in GROUPS[group]]
    reports = list(gate.examine_all(work))
    return {
        target: [report for report in reports if report.target == target] for target in gate.TARGETS
    }


@pytest.mark.parametrize("target", gate.TARGETS)
@pytest.mark.parametrize(("group", "place"), PLACES)
def test_a_kernel_passes(group, place, target):
    report = reports_of(group)[target][place]
    assert report.case is GROUPS[group][place]
    assert report.failures == ()
