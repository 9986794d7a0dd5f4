"""What each workload sends and makes of what comes back."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time

import pytest

from gates import client, launch, logs, programs
from gates.results import results
from gates.session import Cell
from gates.workloads import WORKLOADS, evaluation, logprobs, sessions
from gates.workloads.bench import read as read_bench
from stack.errors import StackError
from tests.gates.conftest import gate
from tests.gates.fake_server import LATE, End, Hang, Say, Status, steady


def one(run, *gates, **kept):
    """A run of one gate, its result."""
    (result,) = results(run(*gates, **kept))
    return result


def arrival(*streams, **changes):
    return gate(
        workload="arrival",
        repeats=1,
        params={"cases": [{"name": "case", "streams": list(streams)}]},
        columns=[{"head": "Case", "figure": "case"}],
        **changes,
    )


PRIMARY = {"role": "primary", "prompt_tokens": 200, "max_tokens": 64}
SECONDARY = {"role": "secondary", "prompt_tokens": 300, "max_tokens": 32}


def is_long(sent):
    return len(str(sent.body)) > 1400


def test_the_second_arrives_after_the_firsts_first_token(fake, run):
    def play(body, number):
        if "Archive" not in str(body):
            return steady(0, 0, 2)
        # The primary waits 0.4 s, then stalls for 0.6 s while the secondary is read.
        if len(str(body)) > 1400:
            return steady(0.1, 0.01, 3)
        return [Say(0.4), Say(0.02), Say(0.6), Say(0.02), End()]

    fake.play = play
    result = one(run, arrival(PRIMARY, SECONDARY | {"after_first_token_of": "primary"}))
    first, second = (sent for sent in fake.sent if "Archive" in str(sent.body))
    assert not is_long(first) and is_long(second)
    assert 0 <= second.came - first.chunks[0][0] < LATE
    figures = result.rows[0].figures
    for role, sent in (("primary", first), ("secondary", second)):
        assert figures[f"{role}_ttft_mean"] == pytest.approx(sent.ttft, abs=LATE)
        assert figures[f"{role}_longest_stall"] == pytest.approx(sent.longest_stall, abs=LATE)
    assert (figures["requests"], figures["failures"], figures["slow"]) == (2, 0, 0)


def test_the_second_is_sent_even_if_the_first_never_speaks(fake, run):
    fake.play = lambda body, number: (
        [Hang()] if "Archive" in str(body) and len(str(body)) < 1400 else steady(0.01, 0.01, 3)
    )
    limits = {"first_token_s": 2.5, "stall_s": 2.5, "total_s": 8.0}
    result = one(
        run, arrival(PRIMARY, SECONDARY | {"after_first_token_of": "primary"}, timeouts=limits)
    )
    figures = result.rows[0].figures
    assert (figures["primary_failures"], figures["secondary_failures"]) == (1, 0)
    assert result.status == "failed"


def test_streams_arrive_at_their_times(fake, run):
    fake.play = lambda body, number: steady(0.01, 0.002, 3)
    one(run, arrival(PRIMARY | {"count": 3, "every_s": 0.4}, SECONDARY | {"at_s": 0.8}))
    came = [sent.came for sent in fake.sent if "Archive" in str(sent.body)]
    begin = min(came)
    late = sorted(at - begin for at in came)
    assert late == pytest.approx([0.0, 0.4, 0.8, 0.8], abs=LATE)


def talk(**changes):
    return gate(
        workload="sessions",
        repeats=1,
        params={"fillers": [10], "sessions": 2, "turns": 3, "max_tokens": 32},
        columns=[{"head": "Filler", "figure": "filler"}],
        **changes,
    )


def remembers(body, number):
    """An answer that knows every number it was told."""
    told = dict(re.findall(r"number of the (\w+) is (\d+)", str(body["messages"])))
    asked = re.findall(r"Which number does the (\w+) have", str(body["messages"][-1]))
    return [Say(0.01, f"It is {told[asked[0]]}." if asked else "one two"), End()]


def test_conversations_share_their_beginning_and_recall(fake, run):
    fake.play = remembers
    result = one(run, talk())
    figures = result.rows[0].figures
    assert (figures["requests"], figures["failures"], figures["recalled"]) == (6, 0, 1.0)
    sent = [s.body["messages"] for s in fake.sent if s.body["messages"][0]["role"] == "system"]
    assert len({messages[0]["content"] for messages in sent}) == 1
    assert sorted(len(messages) for messages in sent) == [2, 2, 4, 4, 6, 6]
    # Two conversations never hear the same number.
    assert len({messages[1]["content"] for messages in sent}) == 2


def test_a_conversation_that_forgets_is_seen(fake, run):
    def forgets(body, number):
        return [Say(0.01, "It is 1."), End()] if len(body["messages"]) > 4 else remembers(body, 0)

    fake.play = forgets
    result = one(run, talk())
    assert result.rows[0].figures["recalled"] == pytest.approx(4 / 6)


def test_a_conversation_that_breaks_off_has_failed_in_all_that_is_left(fake, run):
    fake.play = lambda body, number: (
        [Status(500)] if len(body["messages"]) == 4 else remembers(body, number)
    )
    result = one(run, talk())
    # Of 3 turns each the second fails and the third is never asked.
    assert result.rows[0].figures["failures"] == 4
    assert result.status == "failed"


def test_the_shared_beginning_is_as_long_as_asked():
    text = sessions.shared("seed", 40)
    assert 40 <= text.count(".") <= 46
    assert sessions.shared("other", 40)[60:] == text[60:]
    assert sessions.shared("other", 40)[:60] != text[:60]


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
    from gates.workloads.counters import grown

    assert grown([{"num_preemptions": 50.0}], {"num_preemptions": 4.0})["preemptions"] == 4


def reply(values, answer=("x", "y"), first=None):
    """An answer of ``/v1/completions`` with echo; the prompt has as many tokens as values."""
    tokens = [f"t{n}" for n in range(len(values))] + list(answer)
    first = first or tokens
    return {
        "choices": [
            {
                "logprobs": {
                    "tokens": tokens,
                    "token_logprobs": [None, *values[1:], *[-0.1] * len(answer)],
                    "top_logprobs": [None, *({name: -0.1, "other": -9.0} for name in first[1:])],
                }
            }
        ],
        "usage": {"prompt_tokens": len(values)},
    }


def test_log_probabilities_by_hand():
    theirs = logprobs.measured(reply([0, -1.0, -2.0, -3.0, -4.0], answer=("a", "b", "c", "d")))
    mine = logprobs.measured(
        reply(
            [0, -1.5, -1.9, -3.0, -4.1],
            answer=("a", "b", "z", "d"),
            first=["t0", "t1", "other1", "t3", "t4", "a", "b", "z", "d"],
        )
    )
    told = logprobs.compare(mine, theirs)
    # Differences -0.5, +0.1, 0, -0.1.
    assert told["positions"] == 4
    assert told["difference_mean"] == pytest.approx(0.7 / 4)
    assert told["difference_max"] == pytest.approx(0.5)
    assert told["bias"] == pytest.approx(1 / 4 - 2 / 4)
    assert told["same_first"] == pytest.approx(3 / 4)
    assert told["answer_same"] == pytest.approx(2 / 4)
    other = logprobs.measured(reply([0, -1.0, -2.0]))
    with pytest.raises(ValueError, match="other tokens"):
        logprobs.compare(other, theirs)


@pytest.mark.parametrize("broken", [{}, {"choices": []}, reply([0]), {"choices": [{}]}])
def test_an_answer_without_log_probabilities_is_an_error(broken):
    with pytest.raises(ValueError):
        logprobs.measured(broken)


def against(options):
    return gate(
        workload="logprobs",
        repeats=1,
        params={"prompts": [{"kind": "archive", "characters": 600}], "answer_tokens": 2},
        columns=[{"head": "P", "figure": "prompt"}],
    ), options


def test_a_reference_is_written_and_compared_with(fake, run, tmp_path):
    path = tmp_path / "reference.json"
    fake.complete = lambda body: reply([0, -1.0, -2.0])
    made, options = against({"write_reference": str(path)})
    folder = run(made, options=options)
    assert results(folder)[0].rows[0].figures["written"] == 5
    (tmp_path / "run").rename(tmp_path / "first")
    fake.complete = lambda body: reply([0, -1.0, -2.5])
    result = one(run, made, options={"reference": str(path)})
    assert result.status == "passed"
    assert result.rows[0].figures["difference_max"] == pytest.approx(0.5)


def test_without_a_reference_it_is_not_run(fake, run):
    result = one(run, against({})[0])
    assert result.status == "not run" and "--write-reference" in result.why[0]


def test_a_file_that_is_no_reference_is_refused(fake, run, tmp_path):
    (tmp_path / "x.json").write_text('{"format": 99, "prompts": {}}')
    fake.complete = lambda body: reply([0, -1.0, -2.0])
    result = one(run, against({})[0], options={"reference": str(tmp_path / "x.json")})
    assert result.status == "failed" and "its format is 99" in result.why[0]


def test_the_benchs_figures_are_in_seconds_and_shares(tmp_path):
    # The keys and units of a result file of vLLM 0.22.1, with drafting.
    kept = {
        "completed": 79,
        "failed": 1,
        "output_throughput": 154.26,
        "mean_ttft_ms": 93.83,
        "median_ttft_ms": 90.0,
        "mean_tpot_ms": 5.98,
        "p99_itl_ms": 22.0,
        "spec_decode_acceptance_rate": 67.69,
        "spec_decode_acceptance_length": 2.35,
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps(kept))
    assert read_bench(path) == pytest.approx(
        {
            "requests": 80,
            "failures": 1,
            "output_tok_s": 154.26,
            "ttft_mean": 0.09383,
            "ttft_median": 0.09,
            "tpot_mean": 0.00598,
            "itl_p99": 0.022,
            "acceptance": 0.6769,
            "acceptance_length": 2.35,
        }
    )
    path.write_text("{}")
    with pytest.raises(StackError, match="no result of vllm bench serve"):
        read_bench(path)


def test_lm_evals_figures_and_data(tmp_path):
    # The keys of a results file of lm_eval 0.4.13.
    kept = {
        "results": {
            "gsm8k": {
                "exact_match,strict-match": 0.5,
                "exact_match,flexible-extract": 0.75,
                "exact_match_stderr,flexible-extract": 0.25,
            },
            "gsm8k_local": {"alias": "gsm8k_local"},
        },
        "n-samples": {"gsm8k": {"original": 4, "effective": 4}},
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "results_2026.json").write_text(json.dumps(kept))
    assert evaluation.read(tmp_path) == {
        "exact_match_flexible": 0.75,
        "exact_match_strict": 0.5,
        "stderr": 0.25,
        "requests": 4,
    }
    with pytest.raises(StackError, match="no result of lm_eval"):
        evaluation.read(tmp_path / "nothing")
    with pytest.raises(StackError, match=r"neither train\.jsonl and test\.jsonl nor"):
        evaluation.data_files(tmp_path)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").touch()
    assert evaluation.data_files(tmp_path)[0] == "json"
    (tmp_path / "p" / "main").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "p" / "main" / f"{split}-00000-of-00001.parquet").touch()
    assert evaluation.data_files(tmp_path / "p")[0] == "parquet"


@pytest.mark.parametrize("name", ["bench", "evaluation"])
def test_a_missing_program_is_said_and_the_gate_not_run(fake, run, name):
    params = {"bench": {"concurrency": [1], "temperature": 0.0}, "evaluation": {}}[name]
    figure = {"bench": "failures", "evaluation": "exact_match_strict"}[name]
    made = gate(
        workload=name,
        params=params,
        columns=[{"head": "F", "figure": figure}],
        thresholds=[{"figure": figure, "max": 1.0, "why": "x"}],
    )
    option = {"bench": "vllm", "evaluation": "lm_eval"}[name]
    result = one(run, made, options={option: "/nowhere/program"})
    assert result.status == "not run" and "/nowhere/program was not found" in result.why[0]


def python(text):
    return [sys.executable, "-c", text]


def test_a_program_that_fails_says_its_last_lines(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(StackError, match="status 3: first / last"):
        asyncio.run(programs.run(python("print('first\\nlast'); exit(3)"), log, 20))
    asyncio.run(programs.run(python("print('well')"), log, 20))
    assert log.read_text() == "well\n"


def test_a_program_that_takes_too_long_is_ended_with_its_children(tmp_path):
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', "
    child += "'import time; time.sleep(60)']); print(p.pid, flush=True); time.sleep(60)"
    log, began = tmp_path / "log", time.monotonic()
    with pytest.raises(StackError, match="longer than 1 s"):
        asyncio.run(programs.run(python(child), log, 1))
    assert time.monotonic() - began < 15
    assert not _runs(int(log.read_text()))


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] not in "ZX"
    except FileNotFoundError:
        return False


SERVER = """
import http.server, sys, time
time.sleep(0.3)
print("loading", flush=True)
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), H).serve_forever()
"""


@pytest.fixture
def port():
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(command, port, log, within=20.0):
    async def hold():
        async with (
            client.http(f"http://127.0.0.1:{port}") as http,
            launch.launched(command, http, log, within, lambda text: None) as started,
        ):
            return started, await launch.server.healthy(http)

    return asyncio.run(hold())


def test_a_server_is_started_timed_and_stopped(tmp_path, port):
    started, healthy = start([*python(SERVER), str(port)], port, tmp_path / "log")
    assert healthy and 0.3 <= started["ready_s"] < 10
    assert "loading" in (tmp_path / "log").read_text()

    async def gone():
        async with client.http(f"http://127.0.0.1:{port}") as http:
            return await launch.server.healthy(http)

    assert asyncio.run(gone()) is False


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_python_of_a_server_is_the_one_it_runs_on(tmp_path, port, wrapped):
    """Whatever started it, and with the environment it belongs to: not what the path links to."""
    own = tmp_path / "venv" / "bin" / "python3"
    own.parent.mkdir(parents=True)
    own.symlink_to(sys.executable)
    program = tmp_path / "vllm"
    program.write_text(f'#!/bin/sh\n"{own}" "$0.py" "$@"\n' if wrapped else f"#!{own}\n{SERVER}")
    (tmp_path / "vllm.py").write_text(SERVER)
    program.chmod(0o755)
    started, healthy = start([str(program), str(port)], port, tmp_path / "log")
    assert healthy and started["python"] == str(own)


def test_a_process_on_no_python_has_none():
    with subprocess.Popen(["sleep", "60"]) as process:
        assert launch.python_of(process.pid) is None
        process.kill()
    assert launch.python_of(process.pid) is None


def test_a_server_that_dies_or_never_answers_is_said(tmp_path, port):
    with pytest.raises(StackError, match="ended with status 4: no memory"):
        start(python("print('no memory'); exit(4)"), port, tmp_path / "log")
    with pytest.raises(StackError, match="no server after 0.5 s"):
        start(python("import time; time.sleep(60)"), port, tmp_path / "log", 0.5)
    with pytest.raises(StackError, match="did not start"):
        start(["/nowhere/vllm"], port, tmp_path / "log")


def test_a_second_server_at_the_same_place_is_refused(fake, tmp_path):
    with pytest.raises(StackError, match="answers at .* already"):
        start(python("x"), fake.url.rpartition(":")[2], tmp_path / "log")


def test_every_cell_has_an_id_of_its_own():
    from gates.spec import load_gates

    for made in load_gates().values():
        for sized in (made, made.sized("short")):
            workload = WORKLOADS[made.workload]
            params = workload.Params.model_validate(sized.params)
            ids = [cell.id for row in workload.cells(sized, params) for cell in row]
            assert len(set(ids)) == len(ids) > 0, made.name
    assert Cell("a", {"b": 1}, 2, None, 0, 1).id == "a: b=1 #2"
