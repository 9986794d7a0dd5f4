"""What each workload sends and makes of what comes back."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time

import pytest

from gates import client, launch, programs
from gates.answer import Answer
from gates.results import results
from gates.session import Cell
from gates.spec import load_gates
from gates.workloads import WORKLOADS, evaluation, logprobs, sessions
from gates.workloads.bench import read as read_bench
from stack.errors import StackError
from tests.gates.conftest import gate
from tests.gates.fake_server import End, Say, Status, steady


def one(run, *gates, **kept):
    """A run of one gate, its result."""
    (result,) = results(run(*gates, **kept))
    return result


def own(name, **params):
    """A gate of the suite in its short size, with some of its parameters replaced."""
    made = load_gates()[name].sized("short")
    return made.model_copy(update={"params": made.params | params})


def test_a_tables_prompt_tokens_are_those_of_usage(fake, run):
    """And what was found is a number where the heading says so."""
    # No tokenizer to count with, and a server that counts otherwise than was hoped.
    fake.tokenize_status = 404
    fake.usage = lambda prompt, completion: (1234, completion)
    fake.play = lambda body, number: steady(0, 0, 2)
    story = own("story-recall")
    told = one(run, story).rows[0]
    assert told.key["prompt_tokens"] == 3000 and told.figures["prompt_tokens_mean"] == 1234
    assert (told.figures["matched"], told.figures["matched_min"]) == (0, 0)


def test_the_number_matched_is_the_mean_and_the_least():
    answers = [
        {"wave": 0, "answer": Answer(), "note": {"found": found, "hidden": 16}}
        for found in (16, 13)
    ]
    told = WORKLOADS["load"].row([{"figures": {}, "answers": answers}])
    assert (told["matched"], told["matched_min"]) == (14.5, 13)
    assert (told["recalled"], told["recalled_min"]) == (14.5 / 16, 13 / 16)


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
        thresholds=load_gates()["logprobs"].model_dump()["thresholds"],
    ), options


def test_a_reference_is_written_and_compared_with(fake, run, tmp_path):
    path = tmp_path / "reference.json"
    fake.complete = lambda body: reply([0, -1.0, -2.0])
    made, options = against({"write_reference": str(path)})
    folder = run(made, options=options)
    assert results(folder)[0].rows[0].figures["written"] == 5
    # A reference that was written proves nothing of the server that wrote it.
    assert (results(folder)[0].status, results(folder)[0].why) == ("not run", ["reference written"])
    (tmp_path / "run").rename(tmp_path / "first")
    fake.complete = lambda body: reply([0, -1.0, -2.5])
    result = one(run, made, options={"reference": str(path)})
    assert result.status == "passed"
    assert result.rows[0].figures["difference_max"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        # Apart by 0.9 and by 1.1 in the mean of two positions.
        (reply([0, -1.9, -2.9]), ""),
        (reply([0, -2.1, -3.1]), "difference_mean is 1.1, above 1"),
        # The likeliest token is another at one of two positions, and at both.
        (reply([0, -1.0, -2.0], first=["t0", "other1", "t2", "x", "y"]), ""),
        (
            reply([0, -1.0, -2.0], first=["t0", "other1", "other2", "x", "y"]),
            "same_first is 0, below 0.5",
        ),
    ],
)
def test_another_model_than_the_references_fails(fake, run, tmp_path, mine, said):
    path = tmp_path / "reference.json"
    kept = logprobs.measured(reply([0, -1.0, -2.0]))
    logprobs.write(path, "archive 600", kept, "fake-model")
    fake.complete = lambda body: mine
    result = one(run, against({})[0], options={"reference": str(path)})
    assert result.status == ("failed" if said else "passed")
    assert all(said in why for why in result.why)


@pytest.mark.parametrize("broken", [None, float("nan"), float("-inf")])
def test_a_log_probability_that_is_no_number_is_said(fake, run, tmp_path, broken):
    fake.complete = lambda body: reply([0, -1.0, broken])
    options = {"write_reference": str(tmp_path / "reference.json")}
    result = one(run, against({})[0], options=options)
    assert result.status == "failed"
    assert "1 of 5 log-probabilities are no numbers, the first at position 2" in result.why[0]


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
    positions = {"spec_decode_per_position_acceptance_rates": [0.84, 0.51]}
    path.write_text(json.dumps(kept | positions))
    assert read_bench(path)["acceptance_by_position"] == [0.84, 0.51]
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


LM_EVAL = """\
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--output_path") + 1])
out.mkdir(parents=True, exist_ok=True)
values = {f"exact_match,{name}": 0.5 for name in ("strict-match", "flexible-extract")}
values["exact_match_stderr,flexible-extract"] = 0.25
counts = {"gsm8k": {"original": 9, "effective": COUNTED}}
kept = {"results": {"gsm8k": values}, "n-samples": counts}
(out / "results_x.json").write_text(json.dumps(kept))
"""


@pytest.mark.parametrize(("counted", "said"), [(4, ""), (3, "counted 3 questions, 4 were asked")])
def test_fewer_questions_than_asked_for_are_no_result(fake, run, tmp_path, counted, said):
    program = tmp_path / "lm_eval"
    program.write_text(f"#!{sys.executable}\n" + LM_EVAL.replace("COUNTED", str(counted)))
    program.chmod(0o755)
    result = one(run, own("gsm8k"), options={"lm_eval": str(program)})
    assert result.status == ("failed" if said else "passed")
    assert all(said in why for why in result.why)
    if not said:
        shown = {c.head: c.figure for c in result.gate.columns}
        assert result.rows[0].figures[shown["Questions"]] == 4


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
    for made in load_gates().values():
        for sized in (made, made.sized("short")):
            workload = WORKLOADS[made.workload]
            params = workload.Params.model_validate(sized.params)
            ids = [cell.id for row in workload.cells(sized, params) for cell in row]
            assert len(set(ids)) == len(ids) > 0, made.name
    assert Cell("a", {"b": 1}, 2, None, 0, 1).id == "a: b=1 #2"
