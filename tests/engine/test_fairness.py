"""The simulation of fairness: a step's time against what it was fitted to, and short runs.

vLLM's scheduler wants a platform, so that it runs in a child process on the CPU's.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.fairness.step_time import (  # noqa: E402
    ACCEPTANCE,
    TOKENS_A_STEP,
    prompt_seconds,
    step_seconds,
)


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [
        (1_024, 0.16547),
        (4_096, 0.68397),
        (16_384, 2.97594),
        (58_980, 12.160),
        (65_536, 14.33738),
        (124_080, 30.990),
    ],
)
def test_prompts_take_what_was_measured(tokens, seconds):
    assert prompt_seconds(0, tokens) == pytest.approx(seconds, rel=0.07)
    halves = prompt_seconds(0, tokens // 2) + prompt_seconds(tokens // 2, tokens - tokens // 2)
    assert halves == pytest.approx(prompt_seconds(0, tokens))


@pytest.mark.parametrize(("requests", "milliseconds"), [(1, 14.05), (2, 17.89), (4, 23.88)])
def test_decode_steps_take_what_was_measured(requests, milliseconds):
    # Time per output token times acceptance length, short contexts.
    assert step_seconds([], [300] * requests) * 1e3 == pytest.approx(milliseconds, rel=0.05)


def test_a_long_context_decodes_at_the_measured_rate():
    assert TOKENS_A_STEP / step_seconds([], [124_080]) == pytest.approx(105.8, rel=0.02)


def test_drafts_give_the_measured_acceptance():
    mean = 1 + ACCEPTANCE + ACCEPTANCE**2
    assert mean == pytest.approx(TOKENS_A_STEP, rel=1e-3)


def test_what_a_mixed_step_takes():
    assert step_seconds([(0, 4096)], []) == prompt_seconds(0, 4096)
    assert step_seconds([(0, 1)], []) == pytest.approx(10.9e-3)  # the weights are read anyway
    mixed = step_seconds([(0, 4096)], [1000])
    assert mixed == pytest.approx(prompt_seconds(0, 4096) + 3.3e-3 + 0.087e-3)


RUN = """
import dataclasses, json
from benchmarks.fairness.simulate import Job, Settings, simulate
runs = {
    "alone": (Settings(), [Job(1.0, 10000, 50)]),
    "two": (Settings(), [Job(0.0, 10000, 50)] * 2),
    "threshold": (Settings(long_prefill_token_threshold=2048), [Job(0.0, 10000, 50)] * 2),
    "held": (Settings(prefill_beside_decode=0), [Job(0.0, 10000, 50)] * 2),
}
print(json.dumps({
    name: [[seen.times, seen.counts, seen.rate, seen.longest_stall] for seen in simulate(*run)]
    for name, run in runs.items()
}))
"""


@pytest.fixture(scope="module")
def runs():
    pytest.importorskip("vllm")
    kernels = [] if os.environ.get("TEST_INSTALLED_WHEEL") else [str(ROOT / "kernels")]
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = [str(ROOT), str(ROOT / "tests" / "upstream" / "platform"), *inherited, *kernels]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


READ = prompt_seconds(0, 10_000)


def test_a_request_alone(runs):
    ((times, counts, rate, _),) = runs["alone"]
    # Three steps of a prompt, whose times add up to the whole prompt's.
    assert times[0] == pytest.approx(1.0 + READ)
    assert counts[0] == 1 and counts[-1] == 50
    steps = [b - a for a, b in itertools.pairwise(times)]
    assert steps == pytest.approx([step_seconds([], [10_000])] * len(steps), rel=0.01)
    assert all(1 <= b - a <= 3 for a, b in itertools.pairwise(counts))
    assert rate == pytest.approx(49 / (times[-1] - times[0]))


def test_the_second_prompt_stalls_the_first_answer(runs):
    (first, _, slow, stall), (second, _, fast, _) = runs["two"]
    # Steps of 4,096, 4,096 and 1,808 tokens; the second prompt takes what the third has left.
    assert first[0] == pytest.approx(READ + prompt_seconds(0, 2288))
    assert second[0] == pytest.approx(2 * READ, rel=0.02)
    assert stall > prompt_seconds(2288, 4000)
    assert slow < 0.3 * fast


def test_a_threshold_of_half_the_budget_reads_both_prompts_together(runs):
    (first, _, one, _), (second, _, other, _) = runs["threshold"]
    assert first[0] == second[0] == pytest.approx(2 * READ)
    assert one == pytest.approx(other, rel=0.2)


def test_a_prompt_that_is_held_back_waits_for_the_answer(runs):
    (first, _, one, stall), (second, _, other, _) = runs["held"]
    assert stall < 0.02
    assert second[0] > first[-1]
    assert one == pytest.approx(other, rel=0.2)
