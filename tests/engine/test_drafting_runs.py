"""What the runs ask of vLLM, and the program around them, with a stand-in for the engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import compare_drafting
from drafting_runs import (
    GROWING,
    MAX_NUM_SEQS,
    REQUESTS,
    SHORT_MODEL_LEN,
    Run,
    draw_requests,
    save,
)
from test_drafting_judge import PLAIN, base, result


def test_a_name_says_how_to_run():
    run = Run.of("mtp2-piecewise-cache")
    assert (run.mtp, run.flags) == (2, {"piecewise", "cache"})
    assert Run.of("mtp0") == Run(0, frozenset())


@pytest.mark.parametrize(
    "name",
    [
        "mtp",
        "plain",
        "mtp2-fast",
        "mtp2-cache-cache",
        "mtp2-",
        "mtp2-eager-piecewise",
        "mtp2-drafts-eager",
    ],
)
def test_another_name_is_refused(name):
    with pytest.raises(ValueError, match=f"run: '{name}', allowed: "):
        Run.of(name)


@pytest.mark.parametrize(
    "name", ["mtp0", "mtp0-piecewise", "mtp3-eager-chunks", "mtp2-cache-preempted"]
)
def test_vllm_knows_every_option(name, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    options = Run.of(name).options(tmp_path, blocks=100)
    assert EngineArgs(**options).max_num_seqs == MAX_NUM_SEQS


def test_graphs_are_padded_and_requests_join():
    options = Run.of("mtp2").options(Path("x"))
    sizes = options["compilation_config"]["cudagraph_capture_sizes"]
    assert sizes == [3, 6, 12, 18]
    # Three and five requests have no graph of their own; more wait and join.
    assert 3 * 3 not in sizes and 3 * 5 not in sizes
    # vLLM captures a full graph for no more tokens than all requests together have.
    assert sizes[-1] <= 3 * MAX_NUM_SEQS
    assert len(REQUESTS) > MAX_NUM_SEQS
    assert len({tokens for _, tokens in REQUESTS}) > 3


def test_preemption_needs_what_mtp0_used():
    run = Run.of("mtp2-preempted")
    assert run.options(Path("x"), blocks=100)["num_gpu_blocks_override"] == 80
    with pytest.raises(ValueError, match="blocks: None, allowed with preemption"):
        run.options(Path("x"))


def test_full_graphs_are_forced_or_forbidden():
    full, drafts = "SM12X_MTP_FULL_GRAPHS", "SM12X_DRAFT_GRAPHS"
    assert Run.of("mtp2").environment() == {full: "always", drafts: "never"}
    assert Run.of("mtp2-piecewise").environment() == {full: "never", drafts: "never"}
    assert Run.of("mtp2-drafts").environment() == {full: "always", drafts: "always"}
    assert (
        Run.of("mtp0-piecewise").options(Path("x"))["compilation_config"]["cudagraph_mode"]
        == "PIECEWISE"
    )


def test_batches_are_the_same_each_time_unless_asked_otherwise():
    assert Run.of("mtp2").options(Path("x"))["async_scheduling"] is False
    assert Run.of("mtp2-async").options(Path("x"))["async_scheduling"] is True


def test_requests_are_the_same_each_time():
    first, second = draw_requests(REQUESTS, 1000), draw_requests(REQUESTS, 1000)
    assert first == second
    assert [len(request["prompt"]) for request in first] == [length for length, _ in REQUESTS]


def test_growing_answers_are_preempted_with_the_blocks_that_are_left():
    root = Path(__file__).resolve().parents[2]
    paths = [root, root / "tests/engine", root / "tests/upstream/platform"]
    before = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        [sys.executable, str(root / "tests/engine/scheduled_blocks.py")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, paths), before])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["plenty"]["preemptions"] == 0
    assert seen["scarce"]["preemptions"] > 0
    # The longest request that the engine then allows is answered too.
    assert max(sum(lengths) for lengths in GROWING) < SHORT_MODEL_LEN
    assert seen["longest"]["used"] > 0


@pytest.fixture
def program(monkeypatch, tmp_path, capsys):
    """Runs the program on what the given runs would give, without an engine."""
    made = []

    def go(gives: dict, *options: str) -> tuple[int, str]:
        def start(command, **_):
            name = command[command.index("--one") + 1]
            made.append(name)
            if name in gives:
                asked = {
                    "SM12X_PORTABLE": "all",
                    "SM12X_KERNELS": command[command.index("--kernels") + 1],
                    "SM12X_LOWERING": command[command.index("--lowering") + 1],
                }
                save(gives[name] | asked, tmp_path / f"{name}.json")
            return subprocess.CompletedProcess(command, 0 if name in gives else 1)

        monkeypatch.setattr(compare_drafting.subprocess, "run", start)
        monkeypatch.setattr(sys, "argv", ["compare_drafting.py", str(tmp_path), *options])
        code = compare_drafting.main()
        return code, capsys.readouterr().out

    go.made = made
    go.folder = tmp_path
    return go


GOOD = {"mtp0": base(), "mtp2": result({"mixed": [PLAIN, PLAIN]})}


def test_all_runs_are_made_and_judged(program):
    code, printed = program(GOOD, "--runs", "mtp2")
    assert code == 0, printed
    assert program.made == ["mtp0", "mtp2"]
    assert "4 checks hold, 0 do not, 0 runs are missing" in printed
    report = json.loads((program.folder / "report.json").read_text())
    assert report["noise"]["gap"] == pytest.approx(0.1)
    assert report["rows"][-1]["identical"] == 2
    assert "answers" not in report["runs"]["mtp2"]


def test_what_is_there_is_not_made_again(program):
    program(GOOD, "--runs", "mtp2")
    program.made.clear()
    code, printed = program(GOOD, "--runs", "mtp0", "mtp2")
    assert code == 0 and program.made == []
    assert "mtp2: there" in printed


def test_runs_of_another_setting_are_not_mixed(program, capsys):
    program(GOOD, "--runs", "mtp2", "--kernels", "all")
    program.made.clear()
    with pytest.raises(SystemExit):
        program(GOOD, "--runs", "mtp2", "--kernels", "none")
    assert program.made == []
    message = "mtp0 was made with SM12X_KERNELS=all, and none is asked for; allowed: a folder"
    assert message in capsys.readouterr().err


def test_a_run_that_fails_is_named_and_the_next_is_made(program):
    code, printed = program(GOOD, "--runs", "mtp1", "mtp2")
    assert code == 1
    assert program.made == ["mtp0", "mtp1", "mtp2"]
    assert "mtp1: FAILED" in printed and "FAIL mtp1: not run" in printed
    assert "see mtp1.log" in printed


def test_nothing_is_begun_after_the_time(program):
    code, printed = program(GOOD, "--runs", "mtp2", "--seconds", "-1")
    assert code == 1 and program.made == []
    assert "mtp2: not begun, -1 s are over" in printed


def test_without_mtp0_nothing_else_is_begun(program):
    code, printed = program({}, "--runs", "mtp2")
    assert code == 1 and program.made == ["mtp0"]
    assert "mtp2: not begun, mtp0 is missing" in printed


def test_a_bad_name_stops_before_anything(program, capsys):
    with pytest.raises(SystemExit):
        program(GOOD, "--runs", "mtp2-fast")
    assert "run: 'mtp2-fast', allowed: mtp0 to mtp9" in capsys.readouterr().err
