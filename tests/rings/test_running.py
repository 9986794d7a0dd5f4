"""The parts and the command line, with small test folders in place of the real ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stack.git import git
from stack.pin import ROOT
from tests.rings import __main__ as rings
from tests.rings import running
from tests.rings.parts import NAMES, PARTS, Part
from tests.rings.running import Selection

PART = Part("sample", "checks", 0, "nothing")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty checkout whose check environment is the interpreter that runs this."""
    (tmp_path / "tests" / "sample").mkdir(parents=True)
    monkeypatch.setattr(running, "ROOT", tmp_path)
    monkeypatch.setattr(running, "OUTCOMES", tmp_path / "outcomes")
    monkeypatch.setattr(running, "CHECK_ENV", Path(sys.prefix))
    return tmp_path


def run(checkout, text, **selected):
    if text is not None:
        (checkout / "tests" / "sample" / "test_it.py").write_text(text)
    return running.run_part(PART, Selection(**selected), checkout / "log.txt")


def test_passes_failures_and_skips_are_counted(checkout):
    result = run(
        checkout,
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert False\n"
        "@pytest.mark.skip\ndef test_c(): pass\n",
    )
    assert (result.passed, result.failed, result.skipped, result.ok) == (1, 1, 1, False)


def test_a_crash_is_a_failure(checkout):
    result = run(checkout, "import os\ndef test_a(): pass\ndef test_b(): os._exit(0)\n")
    # The process said 0, but the test that ended it has no outcome.
    assert not result.ok


def test_a_killed_part_is_a_failure(checkout):
    result = run(checkout, "import os\ndef test_a(): pass\ndef test_b(): os.abort()\n")
    assert not result.ok and result.failed == 1


def test_an_empty_part_is_a_failure(checkout):
    assert not run(checkout, "").ok


def test_a_missing_part_is_a_failure(checkout):
    (checkout / "tests" / "sample").rmdir()
    assert not run(checkout, None).ok


def test_a_file_that_cannot_be_imported_is_a_failure(checkout):
    assert not run(checkout, "import no_such_module\n").ok


def test_a_selection_may_leave_a_part_out(checkout):
    text = "def test_a(): pass\ndef test_b(): pass\n"
    assert run(checkout, text, keyword="test_b").passed == 1
    assert run(checkout, text, keyword="nothing_like_it") is None


def test_the_shells_variables_do_not_reach_the_tests(checkout, monkeypatch):
    for name in ("SM12X_PORTABLE", "VLLM_USE_X", "PYTHONPATH", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")
    env = running.environment_of(PART, gpu=False)
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert not {"SM12X_PORTABLE", "VLLM_USE_X", "PYTHONPATH", "TRITON_INTERPRET"} & env.keys()
    assert env["PATH"] == os.environ["PATH"]


def test_the_gpu_is_hidden_from_ring_0_alone(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert running.environment_of(PART, gpu=True)["CUDA_VISIBLE_DEVICES"] == "3"


def test_parts_of_ring_0_have_one_thread_each(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert running.environment_of(PART, gpu=False)["OMP_NUM_THREADS"] == "1"
    assert running.environment_of(PART, gpu=True)["OMP_NUM_THREADS"] == "7"


def test_every_folder_with_tests_is_a_part():
    tracked = git("ls-files", "tests", cwd=ROOT).lines
    folders = {path.split("/")[1] for path in tracked if Path(path).match("test_*.py")}
    pytest_parts = {part.name for part in PARTS if part.kind in ("checks", "wheel", "gates")}
    assert folders == pytest_parts
    assert len(set(NAMES)) == len(NAMES)


def test_a_test_environment_that_takes_vllm_from_elsewhere_stops(tmp_path):
    """The check in tests/conftest.py, with a ``vllm`` beside the tests in place of a wheel's."""
    for name in ("vllm", "vllm_sm12x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_a.py").write_text("def test_a(): pass\n")

    def outcome(**env):
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_a.py"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)} | env,
            capture_output=True,
            text=True,
            check=False,
        )

    assert outcome().returncode == 0
    stopped = outcome(TEST_INSTALLED_WHEEL="1")
    assert stopped.returncode == 3
    assert "not from the wheel" in stopped.stdout + stopped.stderr


@pytest.mark.parametrize("argv", [["--ring", "2"], ["--only", "nothing"], ["--no-such-flag"]])
def test_wrong_usage_says_what_is_allowed(argv, capsys):
    with pytest.raises(SystemExit) as end:
        rings.main(argv)
    assert end.value.code == 2
    assert "usage: ./test.sh" in capsys.readouterr().err


def test_the_parts_are_listed(capsys):
    assert rings.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(NAMES)


def _answers(monkeypatch, results, gpu=None):
    monkeypatch.setattr(rings, "_prepare", lambda kinds: None)
    monkeypatch.setattr(rings, "_gpu", lambda python: gpu)
    monkeypatch.setattr(
        rings.running, "run_part", lambda part, selection, log, gpu=False: results(part)
    )


def test_a_run_ends_with_the_closing_line_and_its_status(monkeypatch, capsys):
    for failed in (0, 1):
        _answers(monkeypatch, lambda part, failed=failed: rings.Result(part.name, 2, failed, 1))
        assert rings.main([]) == failed
        out = capsys.readouterr().out.splitlines()
        assert (
            out[-1]
            == f"{2 * len(PARTS)} passed, {failed * len(PARTS)} failed, {len(PARTS)} skipped"
        )
        assert any(line.startswith("ring 1") and "./test.sh --ring 1" in line for line in out)
        assert any(line.startswith("ring 2") and "not run" in line for line in out)


def test_ring_1_without_a_gpu_is_an_error_and_not_a_pass(monkeypatch, capsys):
    _answers(monkeypatch, lambda part: rings.Result(part.name, 2))
    assert rings.main(["--ring", "1"]) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_a_named_environment_is_used_as_it_is(monkeypatch, capsys):
    used = []
    _answers(monkeypatch, lambda part: rings.Result(part.name, 1))
    monkeypatch.setattr(rings, "_prepare", lambda kinds: pytest.fail("made an environment"))
    monkeypatch.setattr(
        rings.running,
        "run_part",
        lambda part, selection, log, gpu=False: (
            used.append(selection.python) or rings.Result(part.name, 1)
        ),
    )
    assert rings.main(["--python", "/opt/env/bin/python"]) == 0
    assert set(used) == {Path("/opt/env/bin/python")}
    assert len(used) == len([part for part in PARTS if part.kind == "wheel"])


def test_ring_1_runs_the_gpu_tests_with_the_gpu(monkeypatch, capsys):
    asked = []
    _answers(monkeypatch, None, gpu=("H200", (9, 0)))
    monkeypatch.setattr(
        rings.running,
        "run_part",
        lambda part, selection, log, gpu=False: (
            asked.append((part.name, selection.mark, gpu)) or rings.Result(part.name, 1)
        ),
    )
    assert rings.main(["--ring", "1"]) == 0
    assert asked == [(part.name, "gpu", True) for part in PARTS if part.name in rings.GPU_PARTS]
    out = capsys.readouterr().out
    closing = f"{len(rings.GPU_PARTS)} passed, 0 failed, 0 skipped"
    assert "H200" in out and out.splitlines()[-1] == closing


def test_a_gpu_test_is_skipped_where_there_is_no_torch(checkout):
    (checkout / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    text = "import pytest\ndef test_a(): pass\n@pytest.mark.gpu\ndef test_b(): assert False\n"
    result = run(checkout, text)
    assert (result.passed, result.failed, result.skipped) == (1, 0, 1)


def test_a_selection_that_matches_nothing_is_a_failure(monkeypatch, capsys):
    _answers(monkeypatch, lambda part: None)
    assert rings.main(["-k", "nothing_like_it"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "0 passed, 0 failed, 0 skipped"
    assert "no test was selected" in captured.err
