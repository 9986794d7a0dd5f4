"""vLLM's whole engine on the emulated GPU: against the oracle, and with drafting against without.

Each engine is a process of its own; those that do not need one another run beside each other.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from drafting_judge import BASE, judge
from without_gpu import succeed

# Lengths of prompts: beyond the window of 128, two entries of C128A, twice
# the tiny indexer's 32 entries.
PROMPTS = "1,3,126,270"
# All but `eager` decode on graphs of whole steps.
DRAFTING = (
    *("mtp1-drafts", "mtp2-cache", "mtp2-drafts-cache", "mtp2-eager"),
    *("mtp3-drafts-chunks", "mtp2-preempted"),
)


def engine(*words: object) -> str:
    return succeed("tests.engine.emulated", *words)


def oracle(*words: object) -> str:
    return succeed("tests.oracle", "score", *words)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny checkpoint: exact, rounded as the engine's formats, faulty, and the engine's."""
    folder = tmp_path_factory.mktemp("runs")
    checkpoint = folder / "tiny"
    succeed("tests.checkpoint", "--size", "tiny", checkpoint)
    prompts = ["--prompts", PROMPTS]
    with ThreadPoolExecutor(2) as pool:
        ours = [
            pool.submit(engine, "score", checkpoint, "--out", folder / name, *prompts, "--tp", tp)
            for name, tp in (("engine.npz", 1), ("two ranks.npz", 2))
        ]
        oracle(checkpoint, "--out", folder / "exact.npz", *prompts)
        oracle(checkpoint, "--out", folder / "rounded.npz", *prompts, "--rounded")
        oracle(checkpoint, "--out", folder / "no sinks.npz", *prompts, "--fault", "no_sinks")
        for one in ours:
            one.result()
    return folder


@pytest.mark.parametrize("name", ["engine", "two ranks"])
def test_it_is_as_near_to_the_oracle_as_the_formats_allow(runs, name):
    exact, ours = runs / "exact.npz", runs / f"{name}.npz"
    printed = succeed(
        *("tests.oracle", "compare", exact, ours),
        *("--noise", runs / "rounded.npz", "--faults", runs / "no sinks.npz"),
    )
    assert re.search(r"^share of no_sinks: .*, absent$", printed, re.MULTILINE), printed


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("answers")
    names = (BASE, *DRAFTING)
    engine("answer", *names, "--out", folder, "--jobs", 2)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def test_drafting_changes_no_answer(answers):
    """Nor does anything compile after the start; prompts hit the cache, requests are preempted."""
    _, rows, checks = judge(answers)
    assert {row["run"] for row in rows} == {BASE, *DRAFTING}
    assert [vars(check) for check in checks if not check.holds] == []


def test_graphs_change_no_number(answers):
    """Three requests in a graph for four, fewer as they end; the same log-probabilities."""
    graphs, eager = answers["mtp2-cache"]["answers"], answers["mtp2-eager"]["answers"]
    assert eager["growing"] == graphs["growing"]
    assert eager["mixed"] == graphs["mixed"]
    assert answers["mtp2-drafts-cache"]["answers"] == graphs
