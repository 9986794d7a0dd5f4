"""The start, the server's counters and its log: what is measured, unknown and judged."""

from __future__ import annotations

import pytest

from gates import logs
from gates.results import results
from gates.spec import load_gates
from gates.workloads.counters import grown
from tests.gates.conftest import gate
from tests.gates.fake_server import LATE, steady
from tests.gates.test_workloads import one, own


def startup():
    return gate(
        workload="startup",
        order=0,
        repeats=1,
        params={"prompt_tokens": 200, "max_tokens": 8},
        columns=[{"head": "R", "figure": "request"}],
    )


LOG = """\
INFO core.py: init engine (profile, create kv cache, warmup model) took 41.50 s (compilation: 2 s)
INFO kv: GPU KV cache size: 1,234,567 tokens
\rCapturing CUDA graphs (mixed prefill-decode, PIECEWISE):  50%|###  | 2/4 [00:01<00:01]\
\rCapturing CUDA graphs (mixed prefill-decode, PIECEWISE): 100%|#####| 49/49 [00:02<00:00]
\rCapturing CUDA graphs (decode, FULL): 100%|#####| 3/3 [00:01<00:00, 2.1it/s]
INFO runner: Graph capturing finished in 12 secs, took 0.51 GiB
"""


def test_the_first_request_after_the_start_comes_first(fake, run, tmp_path):
    log = tmp_path / "server.log"
    log.write_text(LOG)
    fake.counters["vllm:request_success"] = 0
    fake.play = lambda body, number: steady(0.5 if number == 0 else 0.02, 0.01, 2)
    start = {"ready_s": 61.5, "log": str(log), "command": ["x"]}
    result = one(run, startup(), options={"server_log": str(log), "start": start})
    first, second = (row.figures for row in result.rows)
    for row, sent in zip((first, second), fake.sent, strict=True):
        assert row["ttft_mean"] == pytest.approx(sent.ttft, abs=LATE)
    # Nothing was sent before it, not even a guard's request.
    assert "Archive" in str(fake.sent[0].body) and len(fake.sent) == 2
    told = {
        "ready_s": 61.5,
        "answered_before": 0,
        "init_s": 41.5,
        "graph_s": 12.0,
        "graphs_piecewise": 49,
        "graphs_full": 3,
        "kv_cache_tokens": 1234567,
        "log_errors": 0,
    }
    assert told.items() <= first.items()


def test_a_start_without_a_log_is_said_to_be_unmeasured(fake, run):
    result = one(run, own("startup"))
    assert result.status == "passed"
    said = [warning for warning in result.warnings if "could not be measured" in warning]
    assert len(said) == 2 and "log_errors" in said[0] and "ready_s" in said[1]


@pytest.mark.parametrize(
    ("more", "status"),
    [("", "passed"), ("Traceback (most recent call last):\n", "failed")],
)
def test_an_error_in_the_log_of_the_start_fails_it(fake, run, tmp_path, more, status):
    log = tmp_path / "server.log"
    log.write_text(LOG + more)
    start = {"ready_s": 61.5, "log": str(log), "command": ["x"]}
    result = one(run, own("startup"), options={"server_log": str(log), "start": start})
    assert result.status == status and result.warnings == []
    assert all("log_errors is 1, above 0" in why for why in result.why)


def test_errors_in_a_log_are_counted_by_kind():
    said = LOG + (
        "Traceback (most recent call last):\n"
        "torch.OutOfMemoryError: CUDA out of memory.\n"
        "RuntimeError: CUDA error: an illegal memory access was encountered\n"
        "EngineCore encountered a fatal error.\n"
    )
    found = {name: count for name, count in logs.errors(said).items() if count}
    assert found == {"traceback": 1, "out_of_memory": 1, "cuda": 1, "engine_dead": 1}
    assert sum(logs.errors(LOG).values()) == 0


def counters(**changes):
    return gate(
        workload="counters",
        order=999,
        repeats=1,
        params={},
        columns=[{"head": "E", "figure": "errors"}],
        thresholds=[{"figure": "errors", "max": 0.0, "why": "none"}],
        **changes,
    )


def metrics(finished, errors, preempted):
    return (
        f'vllm:request_success_total{{finished_reason="stop"}} {finished}\n'
        f'vllm:request_success_total{{finished_reason="error"}} {errors}\n'
        f"vllm:num_preemptions_total {preempted}\n"
        'http_requests_total{handler="/x",status="5xx"} 0\n'
        "vllm:some_gauge NaN\n"
    )


def test_counters_are_of_the_run_and_not_of_before(fake, run):
    fake.metrics_text = metrics(100, 7, 3)
    small = gate(repeats=1, order=2)

    def play(body, number):
        fake.metrics_text = metrics(110, 9, 3)
        return steady(0.01, 0.01, 2)

    fake.play = play
    result = results(run(small, counters()))[1]
    figures = result.rows[0].figures
    assert (figures["finished"], figures["errors"], figures["preemptions"]) == (12, 2, 0)
    assert result.status == "failed" and "errors is 2" in result.why[0]


def test_a_server_that_started_anew_counts_from_zero():
    assert grown({"num_preemptions": 50.0}, {"num_preemptions": 4.0}) == {"preemptions": 4}


@pytest.mark.parametrize(
    ("after", "told"),
    [
        # Not vLLM: it counts something, and none of these.
        ({"up": 1.0}, {}),
        # Without VLLM_COMPUTE_NANS_IN_LOGITS nobody counts corrupted requests.
        ({"num_preemptions": 0.0}, {"preemptions": 0}),
        ({"corrupted_requests": 0.0}, {"corrupted_requests": 0}),
        # A label comes to be with its first increment: its family without it says zero.
        ({"http_2xx": 9.0}, {"http_5xx": 0}),
        ({"http_200": 9.0, "http_502": 2.0, "http_503": 1.0}, {"http_5xx": 3}),
        (
            {"request_success": 5.0, "request_success.stop": 5.0},
            {"finished": 5, "aborted": 0, "errors": 0},
        ),
        # A sum without reasons: how many of them were aborted is not known.
        ({"request_success": 5.0}, {"finished": 5}),
    ],
)
def test_a_counter_that_the_server_has_not_is_unknown_and_not_zero(after, told):
    assert grown({}, after) == told


NO_METRICS = "{{{\n"
QUIET = metrics(10, 0, 0)
ERROR = "RuntimeError: CUDA error: an illegal memory access was encountered\n"


@pytest.mark.parametrize(
    ("text", "log", "status", "said"),
    [
        (QUIET, LOG, "passed", ""),
        (QUIET, None, "passed", ""),
        (NO_METRICS, LOG, "passed", ""),
        (NO_METRICS, None, "failed", "neither /metrics nor --server-log says anything"),
        (QUIET, LOG + ERROR, "failed", "log_cuda is 1, above 0"),
        (NO_METRICS, LOG + ERROR, "failed", "log_cuda is 1, above 0"),
        (QUIET, LOG + "Traceback (most recent call last):\n", "failed", "log_traceback is 1"),
        (QUIET, LOG + "EngineCore died unexpectedly\n", "failed", "log_engine_dead is 1"),
    ],
)
def test_the_log_and_the_counters_are_both_judged_where_they_are(
    fake, run, tmp_path, text, log, status, said
):
    fake.metrics_text, options = text, {}
    if log is not None:
        (tmp_path / "server.log").write_text(log)
        options["server_log"] = str(tmp_path / "server.log")
    result = one(run, own("runtime-errors"), options=options)
    assert result.status == status and len(result.why) == bool(said)
    assert all(said in why for why in result.why)


def test_every_kind_of_error_in_the_log_has_a_bound():
    bounds = {one.figure: one for one in load_gates()["runtime-errors"].thresholds}
    for kind in logs.ERRORS:
        assert (bounds[f"log_{kind}"].max, bounds[f"log_{kind}"].level) == (0, "fail")


def test_a_server_whose_metrics_are_gone_has_not_passed_by_its_log(fake, run, tmp_path):
    (tmp_path / "server.log").write_text(LOG + ERROR)
    fake.metrics_text = QUIET

    def play(body, number):
        fake.metrics_text = NO_METRICS
        return steady(0.01, 0.01, 2)

    fake.play = play
    options = {"server_log": str(tmp_path / "server.log")}
    result = results(run(gate(repeats=1, order=2), own("runtime-errors"), options=options))[1]
    assert result.status == "failed"
    assert "does not now; the log has log_cuda 1" in result.why[0]
