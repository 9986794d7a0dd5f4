"""``python -m benchmarks.engine``, whole: its own server, with the scripted worker for a model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.engine.rows import read
from tests.serving.import_log import imported
from tests.serving.served import PLATFORM, ROOT, WORKER


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The rows of a short run, what its report says, and the server's log."""
    place = tmp_path_factory.mktemp("speed")
    caches, out = place / "caches", place / "rows.jsonl"
    # vLLM asks for the model's classes in a process of its own and keeps the answer.
    known = Path.home() / ".cache" / "vllm" / "modelinfos"
    if known.is_dir():
        shutil.copytree(known, caches / "vllm" / "modelinfos")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.engine", "--path", "portable"),
            *("--lowering", "sm120", "--caches", str(caches), "--out", str(out)),
            *("--log", str(place / "server.log"), "--profile", str(place / "traces")),
            *("--ttft", "512,5000", "--concurrency", "1,4", "--repeats", "2"),
            *("--random", "2", "--requests", "3", "--commit", "abc", "--budget", "420"),
            *("--", "--worker-cls", WORKER),
            *("--middleware", "tests.serving.import_log.ImportLog"),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(PLATFORM), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=480,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine", "--report", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return read([out]), report, place / "server.log"


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def of(rows, kind):
    return [row for row in rows if row["kind"] == kind]


def test_every_cell_was_measured(measured):
    rows, _, _ = measured
    assert [row["prompt_tokens"] for row in of(rows, "ttft")] == [512, 5000]
    assert [row["concurrency"] for row in of(rows, "decode")] == [1, 4]
    assert [row["number"] for row in of(rows, "request")] == [1, 2]
    (random,) = of(rows, "random")
    assert (random["requests"], random["prompt_tokens_mean"]) == (3, 8192)
    assert {row["variant"] for row in rows} == {"portable, sm120"}
    assert not [row for row in rows if row.get("fault")]


def test_the_start_was_cut_into_stages_of_vllms_own_log(measured):
    (start,) = of(measured[0], "start")
    names = [stage["stage"] for stage in start["stages"]]
    # What a server without a model says; the rest needs a GPU.
    assert names == [
        "server: imports, arguments",
        "server: the model's classes",
        "configuration; engine: process, imports",
        "KV cache",
        "sampler, the rest of the engine",
        "server: until it answers",
    ]
    assert sum(stage["s"] for stage in start["stages"]) == pytest.approx(start["ready_s"], abs=0.1)


def test_the_first_request_imports_nothing(measured):
    """What the server imports when it is asked, it imports for two requests of its own."""
    log = measured[2]
    assert "Answered 2 of 2 requests of the server's own" in log.read_text(errors="replace")
    own, _, *others = imported(log)
    assert own and len(others) > 8
    assert others == [[]] * len(others)


def test_drafts_count_as_the_worker_makes_them(measured):
    """Of its first drafts a third is wrong, of the second half; a step gives two tokens or so."""
    for row in of(measured[0], "decode"):
        assert 1.5 < row["acceptance_length"] < 2.5
        # A step sleeps 4 ms at least. Not by the arrivals: a busy machine sends many at once.
        steps = row["completion_tokens_mean"] / row["acceptance_length"]
        assert row["e2e_mean"] > 0.004 * steps


def test_traces_were_taken_of_decode_and_of_prefill(measured):
    decode, eight, prefill = of(measured[0], "profile")
    assert (decode["of"], decode["concurrency"], eight["concurrency"]) == ("decode", 1, 8)
    assert decode["steps"] > 3
    # 8,192 tokens in chunks of at most 4,096.
    assert (prefill["of"], prefill["steps"]) == ("prefill", 2)
    assert [share["operation"] for share in decode["shares"]] == ["paged_mqa_logits"]


def test_the_report_has_a_table_of_each(measured):
    for title in (
        "Where it goes, s",
        "First request after the start, s",
        "Time to first token, ms",
        "Time per output token, ms",
        "Random 8,192/1,024, temperature 0, 3 requests",
        "a decode step at concurrency 8",
        "a chunk of a prompt of 8,192 tokens",
    ):
        assert title in measured[1]
