"""The rule of comparison and the form of the baseline, on outcomes made up here."""

from __future__ import annotations

import json

import pytest

from tests.rings.outcomes import FAILED, NEEDS_HUB, PASSED, SKIPPED, Outcome, read
from tests.upstream.compare import compare, load_baseline, pack, unpack
from tests.upstream.mapping import load


@pytest.mark.parametrize(
    ("stock", "ours", "holds"),
    [
        (PASSED, PASSED, True),
        (PASSED, SKIPPED, False),
        (PASSED, FAILED, False),
        (PASSED, None, False),
        (SKIPPED, PASSED, True),
        (SKIPPED, SKIPPED, True),
        (SKIPPED, FAILED, False),
        (SKIPPED, None, False),
        (FAILED, PASSED, True),
        (FAILED, SKIPPED, True),
        (FAILED, FAILED, True),
        (FAILED, None, False),
        (None, PASSED, False),
    ],
)
def test_no_outcome_may_be_worse(stock, ours, holds):
    sides = [{"a.py::t": Outcome(side)} if side else {} for side in (stock, ours)]
    assert compare(*sides).holds is holds


def test_a_worse_test_is_named_with_its_reason():
    result = compare(
        {"a.py::t[1]": Outcome(PASSED), "a.py::u": Outcome(FAILED, "old")},
        {"a.py::t[1]": Outcome(FAILED, "TypeError: new"), "a.py::u": Outcome(PASSED)},
    )
    assert len(result.worse) == 1
    assert "a.py::t[1]" in result.worse[0] and "TypeError: new" in result.worse[0]
    assert len(result.better) == 1 and "a.py::u" in result.better[0]
    assert (result.passed, result.not_run, result.failed_in_both) == (1, 0, 0)


def test_pack_and_unpack_are_inverses():
    outcomes = {
        "tests/a.py::test_x[a::b]": Outcome(PASSED),
        "tests/a.py::TestC::test_y": Outcome(FAILED, "boom"),
        "tests/a.py::test_z": Outcome(SKIPPED, "needs CUDA"),
        "tests/b.py": Outcome(FAILED, "cannot be collected"),
    }
    assert unpack(json.loads(json.dumps(pack(outcomes)))) == outcomes


def _log(tmp_path, *reports):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(report) + "\n" for report in reports))
    return path


def _test_report(when, outcome, longrepr=None):
    return {
        "$report_type": "TestReport",
        "nodeid": "a.py::t",
        "when": when,
        "outcome": outcome,
        "longrepr": longrepr,
    }


def _failure(message):
    return {"reprcrash": {"path": "a.py", "lineno": 1, "message": message}}


def test_a_failing_tear_down_fails_the_test(tmp_path):
    log = _log(
        tmp_path,
        {"$report_type": "SessionStart"},
        _test_report("setup", PASSED),
        _test_report("call", PASSED),
        _test_report("teardown", FAILED, _failure("OSError: left open")),
    )
    assert read(log) == {"a.py::t": Outcome(FAILED, "OSError: left open")}


def test_a_set_up_alone_is_no_pass(tmp_path):
    assert read(_log(tmp_path, _test_report("setup", PASSED))) == {}


def test_a_skip_keeps_its_reason(tmp_path):
    log = _log(tmp_path, _test_report("setup", SKIPPED, ["a.py", 3, "Skipped: needs CUDA"]))
    assert read(log) == {"a.py::t": Outcome(SKIPPED, "needs CUDA")}


def test_a_test_that_asks_a_hub_is_told_apart(tmp_path):
    message = "ValidationError: 1 error\n  Invalid repository ID or local directory: 'x/y'"
    log = _log(tmp_path, _test_report("call", FAILED, _failure(message)))
    assert read(log) == {"a.py::t": Outcome(FAILED, NEEDS_HUB)}


def test_a_file_that_cannot_be_collected_has_failed(tmp_path):
    log = _log(
        tmp_path,
        {
            "$report_type": "CollectReport",
            "nodeid": "a.py",
            "outcome": FAILED,
            "longrepr": "ImportError: no module named x",
        },
    )
    assert read(log) == {"a.py": Outcome(FAILED, "ImportError: no module named x")}


def test_a_reason_does_not_say_where_the_tests_lay(tmp_path):
    message = "ImportError while importing test module '/a b/c/tests/v1/test_it.py'."
    log = _log(
        tmp_path,
        {"$report_type": "CollectReport", "nodeid": "a.py", "outcome": FAILED}
        | {"longrepr": message},
    )
    expected = "ImportError while importing test module 'tests/v1/test_it.py'."
    assert read(log) == {"a.py": Outcome(FAILED, expected)}


def test_the_baseline_holds_every_mapped_file_and_no_other():
    wanted = load()
    assert set(load_baseline()["files"]) == {*wanted.cpu, *wanted.gpu}


def test_every_cpu_file_passes_something_with_upstreams_wheel():
    files = load_baseline()["files"]
    assert [file for file in load().cpu if not files[file].get(PASSED)] == []


def test_gpu_files_pass_nothing_without_a_gpu():
    files = load_baseline()["files"]
    assert [file for file in load().gpu if files[file].get(PASSED)] == []
