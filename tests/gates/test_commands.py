"""The command line as a person uses it, on the fake server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from gates import runner
from gates.__main__ import main
from gates.commands import resume
from gates.commands.run import recorded
from gates.doctor import examination
from gates.report import receipt
from gates.store import RunFolder
from stack.errors import StackError
from stack.pin import ROOT
from tests.gates.fake_server import Say, Status
from tests.gates.test_runner import well

PROFILE = ("--profile", "2x-rtx-pro-6000", "--size", "short", "--gate", "long-context-latency")


@pytest.fixture
def measured(fake, tmp_path):
    """A run by the command line; returns its exit status and folder."""

    def start(*more):
        fake.play = well
        out = tmp_path / "run"
        return main(["run", "--url", fake.url, *PROFILE, "--out", str(out), *more]), out

    return start


def test_a_run_leaves_its_rows_report_page_and_receipt(measured, capsys):
    status, out = measured()
    assert status == 0
    said = capsys.readouterr().err
    assert "passed" in said and "report.html" in said
    report = (out / "report.md").read_text()
    # The prompts' own tokens, concurrency, the tokens asked for, requests.
    assert re.search(r"^\| 4,0\d\d \| 1 \| 4,047 \| 2 \|", report, re.M)
    assert "Verdict: **passed**" in report
    receipt = json.loads((out / "receipt.json").read_text())
    assert [gate["status"] for gate in receipt["gates"]] == ["passed"]
    assert receipt["server"]["version"] == "0.22.1" and "python" in receipt["machine"]


def test_the_report_says_first_what_its_figures_are_for(measured):
    _, out = measured("--made-weights")
    for name in ("report.md", "report.html"):
        head = (out / name).read_text().split("Long-context latency")[0]
        assert "Size short: it shows that everything works" in head
        assert "The weights are made up" in head
        assert "--python names the Python that serves" in head


def test_the_receipt_names_a_log_of_the_run_as_seen_from_its_folder(tmp_path):
    given = {"server_log": str(tmp_path / "run" / "logs" / "server.log"), "start": {}}
    told = {"server_log": "logs/server.log"}
    assert recorded(given, tmp_path / "run") == told
    other = {"server_log": str(tmp_path / "server.log")}
    assert recorded(other, tmp_path / "run") == other
    assert recorded({"server_log": None}, tmp_path / "run") == {"server_log": None}


def test_the_same_folder_twice_needs_resume(measured, capsys):
    _, out = measured()
    rows = (out / "rows.jsonl").read_bytes()
    status, _ = measured()
    assert status == 1 and "--resume" in capsys.readouterr().err
    status, _ = measured("--resume")
    assert status == 0 and (out / "rows.jsonl").read_bytes() == rows


def test_another_run_cannot_be_resumed(measured, capsys):
    measured()
    assert measured("--resume", "--repeats", "3")[0] == 1
    assert "gates differ" in capsys.readouterr().err


def asked(**changes):
    server = dict.fromkeys(("model", "version", "max_model_len", "prefix_cache", "speculation"))
    machine = {"settings": {"VLLM_X": "0"}, "gates_commit": "a"}
    made = {"size": "full", "variant": "", "made_weights": False, "gates": [], "server": server}
    made |= {"profile": {"name": "h200"}, "serve": ["vllm", "--port", "80"], "machine": machine}
    return made | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"serve": ["vllm", "--port", "81"]},
            ["the serve command (then: 80; now: 81)"],
        ),
        ({"serve": []}, ["the serve command (then: vllm --port 80; now: nothing)"]),
        (
            {"machine": {"settings": {"VLLM_X": "1"}, "gates_commit": "a"}},
            ["the settings of the environment (then: VLLM_X=0; now: VLLM_X=1)"],
        ),
    ],
)
def test_another_server_or_setting_is_refused_and_named(changes, said):
    with pytest.raises(StackError) as refused:
        resume.same(asked(), asked(**changes))
    assert [part for part in said if part not in refused.value.message] == []


def test_the_same_run_is_gone_on_with_whatever_the_shell_of_a_running_server_has():
    resume.same(asked(), asked())
    running = asked(serve=[], machine={"settings": {"VLLM_X": "1"}, "gates_commit": "a"})
    resume.same(asked(serve=[]), running)


def test_a_resumed_run_of_two_commits_says_so(measured, monkeypatch):
    _, out = measured()
    monkeypatch.setattr(receipt, "_commit", lambda: "another")
    for _ in range(2):
        assert measured("--resume")[0] == 0
        report = (out / "report.md").read_text()
        assert report.count("WARNING: begun with the suite at") == 1
        assert "with another: the figures are of both" in report
    assert "the figures are of both" in (out / "report.html").read_text()
    assert "the figures are of both" in json.loads((out / "receipt.json").read_text())["notes"][-1]


def test_no_secret_of_the_serve_command_is_kept(tmp_path, capsys):
    """Neither on disk nor in what is said."""
    script = tmp_path / "serve.py"
    script.write_text(
        "import asyncio, socket, sys\n"
        "from aiohttp import web\n"
        "async def models(request):\n"
        "    return web.json_response({'data': [{'id': 'm'}]})\n"
        "app = web.Application()\n"
        "app.add_routes([web.get('/v1/models', models)])\n"
        "web.run_app(app, host='127.0.0.1', port=int(sys.argv[1]), print=None)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    command = [sys.executable, str(script), str(port), "--api-key", "hush", "--hf-token=hush"]
    argv = ["run", "--url", f"http://127.0.0.1:{port}/v1/", *PROFILE[:4], "--gate", "acceptance"]
    main([*argv, "--out", str(out), "--", *command])
    said = capsys.readouterr()
    assert "hush" not in said.out + said.err
    for path in out.rglob("*"):
        assert path.is_dir() or "hush" not in path.read_text(), path
    kept = json.loads((out / "run.json").read_text())
    assert kept["serve"][3:] == ["--api-key", "***", "--hf-token=***"]
    assert kept["server"]["url"] == f"http://127.0.0.1:{port}"


def test_a_failed_gate_is_an_exit_status_of_its_own(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "GUARD_WAIT_S", 0.01)
    fake.play = lambda body, number: [Status(500)] if "Archive" in str(body) else well(body, 0)
    assert main(["run", "--url", fake.url, *PROFILE, "--out", str(tmp_path / "r")]) == 3
    assert "failed" in capsys.readouterr().err


def test_a_dry_run_sends_nothing(fake, measured, capsys):
    status, out = measured("--dry-run")
    assert (status, fake.sent, out.exists()) == (0, [], False)
    assert "long-context-latency" in capsys.readouterr().out


def test_the_report_is_made_anew_and_of_two_variants(measured, tmp_path):
    _, out = measured("--variant", "MTP=2")
    kept = (out / "report.md").read_text()
    (out / "report.md").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.md").read_text() == kept
    assert main(["report", str(out), str(out), "--out", str(tmp_path / "both")]) == 0
    rows = (tmp_path / "both" / "report.md").read_text().split("Verdict (MTP=2)")[0]
    assert len(re.findall(r"^\| MTP=2 \| 4,0\d\d \| 1 \|", rows, re.M)) == 2


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--profile", "a-laptop", "--out", "x"], ["--profile", "a-laptop", "2x-rtx-pro-6000"]),
        ([*PROFILE[:2], "--gate", "no", "--out", "x"], ["--gate", "no", "long-context-latency"]),
        ([*PROFILE], ["--out"]),
        ([*PROFILE, "--out", "x", "--repeats", "0"], ["--repeats", "0"]),
        ([*PROFILE, "--out", "x", "--resume"], ["--resume", "no run"]),
        ([*PROFILE, "--out", "x", "--url", "http://127.0.0.1:9"], ["no list of models", "--url"]),
    ],
)
def test_wrong_usage_is_said_in_a_line(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", *argv]) == 1
    error = capsys.readouterr().err
    assert [part for part in said if part not in error] == []


def test_a_model_that_is_not_there_is_said(fake, tmp_path, capsys):
    argv = ["run", "--url", fake.url, *PROFILE, "--out", str(tmp_path / "r"), "--model", "other"]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert "other" in said and "fake-model" in said


def test_help_needs_no_package():
    """On a bare Python: without the packages of requirements.txt."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "gates", "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Measure how a build serves" in done.stdout
    assert "python -m gates run --profile 2x-rtx-pro-6000" in done.stdout
    assert "add_parser" not in done.stdout, "that is for those who change the suite"


def test_a_run_says_what_the_doctor_has_against_the_machine(measured, monkeypatch, capsys):
    def findings(profile, serve, python, made_weights):
        return [f"doctor: warn: {profile.name}"]

    monkeypatch.setattr(examination, "findings", findings)
    assert measured()[0] == 0
    assert capsys.readouterr().err.startswith("doctor: warn: 2x-rtx-pro-6000\n")


def cells_on_disk(out):
    path = out / "rows.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(json.loads(line)["kind"] == "cell" for line in lines if line.endswith("}"))


def interrupt_after(cells, out, process, within_s=30.0):
    """Send the signal of Ctrl-C once so many cells are on disk."""
    end = time.monotonic() + within_s
    while time.monotonic() < end and process.poll() is None:
        if cells_on_disk(out) >= cells:
            process.send_signal(signal.SIGINT)
            return
        time.sleep(0.02)
    raise AssertionError("it never came so far")


@pytest.fixture
def heeds_interrupts():
    """A process that began in the background ignores Ctrl-C, and so would its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_an_interrupt_keeps_rows_writes_the_report_and_can_be_resumed(fake, tmp_path):
    out = tmp_path / "run"

    def play(body, number):
        # After two of the four cells nothing goes on, however late the signal comes.
        wait = 20.0 if cells_on_disk(out) >= 2 else 0.01
        return [Say(wait, "word "), *well(body, number)[1:]]

    fake.play = play
    command = [sys.executable, "-m", "gates", "run", "--url", fake.url, *PROFILE, "--out", str(out)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        interrupt_after(2, out, process)
        said = process.communicate(timeout=30)[0]
    assert process.returncode == 130, said
    assert "interrupted" in said and "Traceback" not in said
    assert "it was interrupted before its end" in (out / "report.md").read_text()
    kept = RunFolder.read(out).of("cell")
    assert 2 <= len(kept) < 4
    fake.play = well
    assert main([*command[3:], "--resume", "--out", str(out)]) == 3
    cells = RunFolder.read(out).of("cell")
    assert cells[: len(kept)] == kept and len(cells) == 4
