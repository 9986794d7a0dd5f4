"""Verdicts: what passes, fails, is only said, and is not judged."""

from __future__ import annotations

import pytest

from gates.results import RowResult, expected_of, judge, results
from gates.spec import Threshold, load_gates
from gates.workloads.base import Workload
from tests.gates.conftest import gate
from tests.gates.test_report import made


def row(**figures):
    return RowResult({"concurrency": 2, "temperature": 0.0}, figures, {}, [])


def judged(figures, profile="h200", **threshold):
    one = row(**figures)
    judge(one, Threshold(**{"figure": "fairness", "why": "a reason"} | threshold), profile)
    return one


@pytest.mark.parametrize(
    ("value", "bounds", "said"),
    [
        (0.5, {"min": 0.5}, ""),
        (0.49, {"min": 0.5}, "fairness is 0.49, below 0.5 (a reason)"),
        (0.5, {"max": 0.5}, ""),
        (0.51, {"max": 0.5}, "fairness is 0.51, above 0.5 (a reason)"),
        (0.5, {"min": 0.1, "max": 0.4}, "above 0.4"),
    ],
)
def test_bounds_are_inclusive(value, bounds, said):
    problems = judged({"fairness": value}, **bounds).problems
    assert bool(problems) is bool(said)
    assert all(said in problem for problem in problems)


def test_a_figure_that_could_not_be_measured_does_not_pass():
    (problem,) = judged({}, min=0.5).problems
    assert problem == ("concurrency=2 temperature=0.0: fairness could not be measured (a reason)")


def test_an_optional_figure_is_judged_where_it_is_there():
    assert not judged({}, min=0.5, optional=True).problems
    assert judged({"fairness": 0.1}, min=0.5, optional=True).problems


def test_what_proves_nothing_was_not_run_and_a_failure_still_is_one(tmp_path, monkeypatch):
    folder = made(tmp_path / "a", ["long-context-latency"], [1.0])
    monkeypatch.setattr(Workload, "unproven", lambda self, rows: f"{len(rows)} rows prove nothing")
    (result,) = results(folder)
    assert (result.status, result.why) == ("not run", ["1 rows prove nothing"])
    for line in folder.of("request"):
        line["note"]["found"] = 0
    (result,) = results(folder)
    assert result.status == "failed" and "recalled_min" in result.why[0]


def test_a_threshold_holds_for_its_rows_and_profile_alone():
    wrong = {"fairness": 0.1}
    assert judged(wrong, min=0.5, where={"concurrency": 2}).problems
    assert judged(wrong, min=0.5, where={"temperature": 0}).problems
    assert not judged(wrong, min=0.5, where={"concurrency": 4}).problems
    assert judged(wrong, min=0.5, profile="h200").problems
    one = row(**wrong)
    judge(one, Threshold(figure="fairness", min=0.5, profile="1x-gb10", why="x"), "h200")
    assert not one.problems


def test_a_warning_is_said_and_does_not_fail():
    one = judged({"fairness": 0.1}, min=0.5, level="warn")
    assert one.warnings and not one.problems


def test_what_made_up_weights_say_is_not_judged(tmp_path):
    folder = made(tmp_path / "a", ["long-context-latency"], [1.0])
    for line in folder.of("request"):
        line["note"]["found"] = 0
    (failed,) = results(folder)
    assert failed.status == "failed" and "recalled_min" in failed.why[0]
    folder.about["made_weights"] = True
    (passed,) = results(folder)
    assert passed.status == "passed"
    assert any("recalled_min: not judged" in warning for warning in passed.warnings)


def test_expected_values_are_of_a_profile_a_variant_and_a_row():
    chosen = load_gates()["random-8k-1k"]
    one = row(output_tok_s=1.0)

    def found(profile, variant):
        return [e.figures["output_tok_s"] for e in expected_of(chosen, one, profile, variant)]

    assert found("2x-rtx-pro-6000", "MTP=2") == [220.51]
    assert found("2x-rtx-pro-6000", "no-MTP") == [142.91]
    assert found("h200", "MTP=2") == []
    one.key["temperature"] = 1.0
    assert found("2x-rtx-pro-6000", "MTP=2") == [160.55]


def test_a_total_is_over_everything_measured(tmp_path):
    folder = made(tmp_path / "a", ["streaming-pressure"], [1.0, 3.0])
    (result,) = results(folder)
    total = result.rows[-1]
    assert total.key == {"case": "all"}
    assert (total.figures["requests"], total.figures["ttft_max"]) == (4, 3.0)


def test_thresholds_on_what_the_model_says_are_marked_so():
    said = {"recalled", "recalled_min", "score", "exact_match_strict", "acceptance"}
    for one in load_gates().values():
        for threshold in one.thresholds:
            if threshold.figure in said and threshold.level == "fail":
                assert threshold.content, f"{one.name}: {threshold.figure}"
    assert gate().thresholds[0].content is False
