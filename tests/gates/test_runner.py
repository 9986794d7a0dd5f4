"""No fault makes a run hang, crash or lose rows; an interrupted one goes on where it was."""

from __future__ import annotations

import json
import threading
import time

import pytest

from gates.results import results
from gates.runner import Runner
from gates.store import RunFolder
from gates.workloads import WORKLOADS
from stack.errors import StackError
from tests.gates.conftest import Run, gate
from tests.gates.fake_server import LATE, Disconnect, End, Hang, Raw, Say, Status, steady


def sentinels(body):
    """The three codes that a prompt of the archive hides."""
    text = body["messages"][0]["content"]
    return " ".join(line.split()[-1].rstrip(".") for line in text.split("\n") if "code of" in line)


def well(body, number):
    return [Say(0.01, sentinels(body) + " "), *steady(0.01, 0.002, 5)]


def test_a_good_run_measures_every_cell(fake, run):
    fake.play = well
    folder = run(gate(thresholds=[{"figure": "recalled_min", "min": 1.0, "why": "all"}]))
    cells = folder.of("cell")
    # Two rows, two repeats, the second backwards.
    assert [(c["key"]["concurrency"], c["repeat"]) for c in cells] == [
        (1, 1),
        (2, 1),
        (2, 2),
        (1, 2),
    ]
    assert {c["status"] for c in cells} == {"measured"}
    assert len(folder.of("request")) == 2 * (1 + 2)
    (result,) = results(folder)
    assert (result.status, result.why) == ("passed", [])
    assert [row.figures["requests"] for row in result.rows] == [2, 4]
    assert result.rows[1].spread["ttft_mean"]["n"] == 2


def test_prompts_are_cold_and_as_long_as_asked(fake, run):
    fake.play = well
    folder = run(gate())
    prompts = [
        sent.body["messages"][0]["content"] for sent in fake.sent if "Archive" in str(sent.body)
    ]
    assert len({prompt[:40] for prompt in prompts}) == len(prompts) == 6
    for row in folder.of("request"):
        assert abs(row["answer"]["prompt_tokens"] - 200) <= 4
        assert row["note"]["counted_tokens"] == row["answer"]["prompt_tokens"]


FAULTS = {
    "http": [Status(500)],
    "first_token": [Hang()],
    "stall": [Say(0.01), Hang()],
    "disconnected": [Say(0.01), Disconnect()],
    "garbled": [Say(0.01), Raw(0, b"data: }{\n\n"), End()],
    "empty": [End()],
    "cut_off": [Say(0.01)],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_second_request_is_faulty(fake, run, fault):
    """Each fault beside good answers: all rows are there, and the figures are of the good ones."""
    # Long enough for a good answer on a busy machine.
    limits = {"first_token_s": 2.5, "stall_s": 2.5, "total_s": 8.0}

    def play(body, number):
        asked = [sent for sent in fake.sent if "Archive" in str(sent.body)]
        faulty = "Archive" in str(body) and len(asked) % 2 == 0
        return FAULTS[fault] if faulty else well(body, number)

    fake.play = play
    began = time.monotonic()
    folder = run(gate(timeouts=limits))
    assert time.monotonic() - began < 40
    kept = [row["answer"]["fault"] for row in folder.of("request")]
    assert len(kept) == 6 and kept.count(fault) == 3 and kept.count("") == 3
    assert len(folder.of("cell")) == 4
    (result,) = results(folder)
    assert result.status == "failed" and "failures" in result.why[0]
    assert sum(row.figures["failures"] for row in result.rows) == 3


def test_wrong_counts_are_a_failure_and_not_a_figure(fake, run):
    fake.play, fake.usage = well, lambda prompt, out: (prompt + 5, out)
    folder = run(gate())
    rows = folder.of("request")
    assert {row["answer"]["fault"] for row in rows} == {"usage"}
    assert "/tokenize counted" in rows[0]["answer"]["detail"]


def test_a_slow_tokenizer_costs_time_and_no_row(fake, run):
    fake.play, fake.tokenize_delay = well, 0.3
    folder = run(gate())
    assert len(folder.of("request")) == 6
    # The wait is not the requests'.
    measured = sorted(row["answer"]["chunk_at"][0] for row in folder.of("request"))
    played = sorted(sent.ttft for sent in fake.sent if "Archive" in str(sent.body))
    assert measured == pytest.approx(played, abs=LATE)


def test_a_broken_tokenizer_leaves_lengths_unverified(fake, run):
    fake.play, fake.tokenize_status = well, 500
    folder = run(gate())
    rows = folder.of("request")
    assert {row["note"]["counted_tokens"] for row in rows} == {None}
    assert {row["answer"]["fault"] for row in rows} == {""}


def test_a_dead_server_ends_its_phase_and_no_other_is_lost(fake, run):
    dead = threading.Event()

    def play(body, number):
        if len(fake.sent) == 4:
            dead.set()
        return [Status(503)] if dead.is_set() else well(body, number)

    fake.play = play
    folder = run(gate(), gate(name="other", order=2))
    first, second = results(folder)
    assert first.status == "failed"
    assert any("stopped generating" in line for line in first.why)
    assert second.status == "not run" and "did not generate before it" in second.why[0]
    # Three tries each, and nothing between them but those.
    assert len(folder.of("guard", gate="other")) == 3


def test_a_cell_whose_server_had_died_is_measured_again(fake, tmp_path):
    """On resume; what was measured stays in the file and counts no more."""
    dead = threading.Event()

    def play(body, number):
        if sum("Archive" in str(sent.body) for sent in fake.sent) == 2:
            dead.set()
        return [Status(503)] if dead.is_set() else well(body, number)

    fake.play = play
    run = Run(fake, tmp_path / "run", [gate()])
    folder = run()
    stopped = folder.of("cell")[-1]
    assert len(folder.of("cell")) == 2 and "stopped generating" in folder.of("phase")[-1]["why"]
    fake.play = well
    folder = run()
    again = folder.of("cell", cell=stopped["cell"])
    assert [cell["attempt"] for cell in again] == [1, 2] and again[0] == stopped
    assert len(folder.of("cell")) == 5
    assert {row["attempt"] for row in folder.of("request", cell=stopped["cell"])} == {1, 2}
    (result,) = results(folder)
    assert (result.status, result.why) == ("passed", [])
    assert [row.figures["requests"] for row in result.rows] == [2, 4]
    before = len(folder.rows)
    assert len(run().rows) == before


def test_a_failed_cell_of_a_living_server_is_not_measured_again(fake, tmp_path):
    fake.play = lambda body, number: [Status(500)] if "Archive" in str(body) else well(body, 0)
    run = Run(fake, tmp_path / "run", [gate()])
    before = len(run().rows)
    assert len(run().rows) == before


def test_a_strict_server_is_sent_nothing_of_vllm(fake, run):
    fake.play, fake.version, fake.strict, fake.tokenize_status = well, None, True, 404
    folder = run(gate())
    assert {row["answer"]["fault"] for row in folder.of("request")} == {""}


def test_a_phase_that_raises_does_not_stop_the_next(fake, run, monkeypatch):
    fake.play = well
    measure = type(WORKLOADS["load"]).measure

    async def broken(self, session):
        if session.gate.name == "small":
            raise RuntimeError("a fault of ours")
        return await measure(self, session)

    monkeypatch.setattr(type(WORKLOADS["load"]), "measure", broken)
    folder = run(gate(), gate(name="other", order=2))
    first, second = results(folder)
    assert first.status == "failed" and "a fault of ours" in first.why[0]
    assert second.status == "passed"


def test_an_interrupted_run_goes_on(fake, tmp_path, monkeypatch):
    fake.play = well
    cell, seen = Runner._cell, []

    async def interrupted(self, made, one):
        seen.append(one.id)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return await cell(self, made, one)

    run = Run(fake, tmp_path / "run", [gate()])
    monkeypatch.setattr(Runner, "_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    kept = RunFolder.read(tmp_path / "run")
    assert len(kept.of("cell")) == 2
    (result,) = results(kept)
    assert result.status == "not run" and "interrupted" in result.why[-1]
    # What a crash in the middle of a line leaves:
    with (tmp_path / "run" / "rows.jsonl").open("a") as file:
        file.write('{"kind": "cell", "gate')
    monkeypatch.setattr(Runner, "_cell", cell)
    folder = run()
    assert len(folder.of("cell")) == 4
    assert len({c["cell"] for c in folder.of("cell")}) == 4
    assert [result.status for result in results(RunFolder.read(tmp_path / "run"))] == ["passed"]
    before = len(folder.rows)
    assert len(run().rows) == before, "a run that is whole has nothing left to do"


def test_requests_of_an_attempt_that_was_cut_short_do_not_count(fake, tmp_path, monkeypatch):
    fake.play = well
    run = Run(fake, tmp_path / "run", [gate(repeats=1)])
    write, count = RunFolder.write, []

    def cut(self, kind, **row):
        if kind == "request":
            count.append(1)
            if len(count) == 3:
                raise KeyboardInterrupt
        return write(self, kind, **row)

    monkeypatch.setattr(RunFolder, "write", cut)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(RunFolder, "write", write)
    folder = run()
    assert len(folder.of("request")) == 1 + 1 + 2
    (result,) = results(folder)
    assert [row.figures["requests"] for row in result.rows] == [1, 2]


def test_a_row_is_on_disk_before_the_next_begins(fake, tmp_path):
    path, seen = tmp_path / "run" / "rows.jsonl", []

    def play(body, number):
        # The guard asks for fewer tokens, and again where a busy machine made it wait.
        if body["max_tokens"] == 64:
            text = path.read_text()
            seen.append(sum(json.loads(line)["kind"] == "request" for line in text.splitlines()))
        return well(body, number)

    fake.play = play
    Run(fake, tmp_path / "run", [gate(repeats=2, params=one_at_a_time())])()
    assert seen == [0, 1]


def one_at_a_time():
    return {"cases": [{"prompt": "archive", "prompt_tokens": 200, "max_tokens": 64}]}


def test_what_does_not_fit_is_left_out_and_said(fake, run):
    fake.play, fake.max_model_len = well, 1000
    params = one_at_a_time()
    params["cases"].append({"prompt": "archive", "prompt_tokens": 2000, "max_tokens": 64})
    folder = run(gate(params=params))
    (result,) = results(folder)
    assert result.status == "passed" and len(result.rows) == 1
    assert "needs 2,064 tokens, the server takes 1,000" in result.left_out[0]


def test_a_gate_whose_needs_are_not_met_is_not_run(fake, run):
    folder = run(gate(needs={"prefix_cache": "on"}))
    (result,) = results(folder)
    assert result.status == "not run" and "--enable-prefix-caching" in result.why[0]
    assert fake.sent == []


def test_two_runs_do_not_share_a_folder(tmp_path):
    folder = RunFolder.create(tmp_path / "a", {"gates": []})
    with pytest.raises(StackError, match="holds a run already"):
        RunFolder.create(tmp_path / "a", {})
    with pytest.raises(StackError, match="another process writes"):
        RunFolder.resume(tmp_path / "a")
    folder.close()
    RunFolder.resume(tmp_path / "a").close()


def test_a_damaged_line_is_named_and_not_dropped(tmp_path):
    RunFolder.create(tmp_path / "a", {}).close()
    (tmp_path / "a" / "rows.jsonl").write_text('{"kind": "x"}\n{oh\n{"kind": "y"}\n')
    with pytest.raises(StackError, match=r"rows\.jsonl:2"):
        RunFolder.read(tmp_path / "a")


def test_rows_hold_no_number_that_json_lacks(tmp_path):
    folder = RunFolder.create(tmp_path / "a", {})
    with pytest.raises(ValueError):
        folder.write("x", value=float("nan"))
    folder.close()
