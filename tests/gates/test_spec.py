"""Gate files and profiles: what is wrong is said with its file, its key and what is allowed."""

from __future__ import annotations

import pytest

from gates.spec import load_gate, load_gates, load_profiles
from stack.errors import StackError

GOOD = """
name = "small"
title = "Small"
why = "A test."
workload = "load"
order = 1
columns = [{ head = "C", figure = "concurrency", unit = "int" }]

[params]
cases = [{ prompt = "archive", prompt_tokens = 200, concurrency = [1, 2], max_tokens = 8 }]

[short]
repeats = 1

[[thresholds]]
figure = "failures"
max = 0
why = "none may fail"
"""


def load(tmp_path, text):
    path = tmp_path / "small.toml"
    path.write_text(text)
    return load_gate(path)


def test_a_good_file_is_read_and_has_its_sizes(tmp_path):
    gate = load(tmp_path, GOOD)
    assert (gate.repeats, gate.sized("short").repeats) == (5, 1)
    assert gate.sized("full") is gate
    assert gate.sized("short").params == gate.params


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "small"', 'name = "other"', ["name: must be 'small'", "'other'"]),
        ('workload = "load"', 'workload = "lode"', ["workload: must be one of", "load", "'lode'"]),
        ("order = 1", "order = 1\nodrer = 2", ["odrer: there is no such key; allowed:", "order"]),
        ("order = 1", 'order = "1"', ["order: must be a valid integer", "'1'"]),
        ("order = 1", "", ["order: this key is required"]),
        ('unit = "int"', 'unit = "hours"', ["columns.0.unit: must be", "'tok/s'", "'hours'"]),
        (
            'figure = "concurrency"',
            'figure = "concurency"',
            ["columns.0.figure", "'concurency'", "concurrency"],
        ),
        ('figure = "failures"', 'figure = "failure"', ["thresholds.0.figure", "failures"]),
        ("max = 0\n", "", ["thresholds.0: a threshold needs min, max or both"]),
        (
            'prompt = "archive"',
            'prompt = "novel"',
            ["params.cases.0.prompt", "'archive'", "'novel'"],
        ),
        ("max_tokens = 8", "max_token = 8", ["params.cases.0.max_token:", "max_tokens"]),
        ("prompt_tokens = 200, ", "", ["params.cases.0: a case needs one of prompt_tokens"]),
        ("repeats = 1", "repeats = 0", ["short.repeats: must be at least 1"]),
        ("repeats = 1", "cases = []", ["short.cases:", "at least 1 item"]),
        ("[params]", "[params", ["small.toml"]),
        (
            "max = 0\n",
            "max = 0\nwhere = { colour = 1 }\n",
            ["thresholds.0.where", "'colour'", "prompt_tokens"],
        ),
        (
            "max = 0\n",
            'max = 0\nwhere = { concurrency = "1" }\n',
            ["thresholds.0.where.concurrency: no row has '1'; allowed: 1, 2"],
        ),
        (
            "max = 0\n",
            "max = 0\nwhere = { frontier = 300 }\n",
            ["thresholds.0.where.frontier: no row has 300; allowed: none"],
        ),
        (
            "max = 0\n",
            'max = 0\nprofile = "h100"\n',
            ["thresholds.0.profile: must be one of", "h200", "'h100'"],
        ),
        (
            "[[thresholds]]",
            '[[expected]]\nprofile = "h100"\nfigures = { requests = 1 }\nsource = "x"\n'
            "[[thresholds]]",
            ["expected.0.profile: must be one of", "2x-rtx-pro-6000", "'h100'"],
        ),
        (
            "[[thresholds]]",
            '[[expected]]\nprofile = "h200"\nfigures = { requests = 1 }\nsource = "x"\n'
            "where = { temperature = 0.5 }\n[[thresholds]]",
            ["expected.0.where.temperature: no row has 0.5; allowed: 0.0"],
        ),
        (
            "concurrency = [1, 2]",
            "concurrency = [1, 2, 1]",
            ["params.cases.0.concurrency: each may be there once", "[1, 2, 1]"],
        ),
        (
            "max_tokens = 8 }",
            'max_tokens = 8 }, { prompt = "archive", prompt_tokens = 200, max_tokens = 8 }',
            ["params: two rows are alike", "prompt_tokens = 200, concurrency = 1"],
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path, old, new, said):
    assert GOOD.count(old) == 1
    with pytest.raises(StackError) as error:
        load(tmp_path, GOOD.replace(old, new))
    assert "small.toml" in error.value.message
    for part in said:
        assert part in error.value.message


def test_a_bound_may_name_rows_of_either_size_and_the_total(tmp_path):
    short = 'cases = [{ prompt = "story", prompt_tokens = 100, concurrency = [4], max_tokens = 8 }]'
    good = GOOD.replace("repeats = 1\n", f"repeats = 1\n{short}\n")
    for where in ("concurrency = 2", "concurrency = 4", 'prompt = "all"'):
        text = good.replace("order = 1", "order = 1\ntotal = true")
        load(tmp_path, text.replace("max = 0\n", f"max = 0\nwhere = {{ {where} }}\n"))
    # Each of the two is a row's, but of no row both.
    where = "where = { concurrency = 4, prompt_tokens = 200 }"
    with pytest.raises(StackError, match="no row has concurrency = 4, prompt_tokens = 200 at once"):
        load(tmp_path, good.replace("max = 0\n", f"max = 0\n{where}\n"))


def test_a_column_of_counted_tokens_shows_what_was_counted():
    """A heading of tokens over the wish would state a length that nobody counted."""
    for made in load_gates().values():
        for column in made.columns:
            if column.head in ("Prompt tokens", "Input tokens"):
                assert column.figure == "prompt_tokens_mean", made.name
            if column.figure == "prompt_tokens":
                assert column.head == "Target tokens", made.name
            if "uccess" in column.head:
                assert column.figure == "succeeded", made.name
            if column.head == "Matched of 16":
                assert (column.figure, column.unit) == ("matched", "number")


def test_every_gate_that_times_has_five_repeats():
    """Startup has one start, and what judges answers is not timed."""
    untimed = {"startup", "gsm8k", "tool-calls", "logprobs", "runtime-errors"}
    for made in load_gates().values():
        assert made.repeats >= 5 or made.name in untimed, made.name


def test_every_wrong_key_has_its_line(tmp_path):
    with pytest.raises(StackError) as error:
        load(tmp_path, GOOD.replace("order = 1", 'order = "x"\nextra = 1'))
    assert len(error.value.message.splitlines()) == 2


def test_a_missing_file_and_an_empty_folder_are_said(tmp_path):
    with pytest.raises(StackError, match=r"small\.toml: there is no such file"):
        load_gate(tmp_path / "small.toml")
    with pytest.raises(StackError, match="no gate file"):
        load_gates(tmp_path)


def test_every_gate_and_profile_of_the_suite_is_whole():
    profiles = load_profiles()
    for gate in load_gates().values():
        assert gate.short, f"{gate.name} has no short size"
        for one in gate.expected:
            assert one.profile in profiles, f"{gate.name} expects of {one.profile}"
        assert any(threshold.level == "fail" for threshold in gate.thresholds), gate.name
