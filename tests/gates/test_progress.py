"""What a person sees while a run goes, on a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gates.answer import Answer, Chunk
from gates.plan import Phase
from gates.progress import Display, Remaining, said
from gates.session import Cell
from gates.spec import Column, load_gates
from tests.gates.conftest import gate

CELL = Cell("small", {"concurrency": 2}, 1, None, 50.0, 2)
ANSWER = Answer(
    chunks=[Chunk(0.5, 1), Chunk(1.5, 20)], ended=1.5, prompt_tokens=10, completion_tokens=21
)


class Clock:
    """A clock that goes on when it is told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def shown(terminal):
    output = io.StringIO()
    clock = Clock()
    display = Display(Console(file=output, force_terminal=terminal, width=160), clock)
    with display:
        display.total(100.0, 25.0)
        display.phase(Phase(gate(), [[CELL]], [CELL]), 1, 3)
        display.cell(CELL)
        display.answer(ANSWER)
        display._bar.refresh()
        clock.now += 90.0
        display.done(CELL, {"ttft_mean": 0.5, "failures": 1, "requests": 2}, "")
        display._bar.refresh()
    return output.getvalue()


def test_a_terminal_has_a_bar_with_what_runs_and_the_last_figures():
    text = shown(terminal=True)
    assert "small: concurrency=2 #1" in text and "25%" in text
    assert "TTFT 0.500 s, 20.0 tok/s" in text


def test_a_log_has_lines_and_no_control_characters():
    text = shown(terminal=False)
    assert "\x1b" not in text and "\r" not in text
    assert text.splitlines() == [
        "[1/3] Small: 1 cell, 2 requests",
        "  small: concurrency=2 #1: 1 of 2 FAILED, TTFT 0.500 s; about 0:00:45 left",
    ]


def test_a_terminal_says_how_long_still_after_the_first_cell():
    text = shown(terminal=True)
    assert "time left: not known yet" in text
    # 50 of weight in 90 s, and 25 are left: what was there from before took none of the time.
    assert "about 0:00:45 left" in text.split("not known yet")[-1]


def test_the_time_left_follows_from_weight_and_clock():
    clock = Clock()
    remaining = Remaining(clock)
    remaining.begin(400.0)
    clock.now += 60.0
    assert remaining.seconds() is None, "nothing tells the pace before the first cell has ended"
    remaining.ended(100.0)
    # 100 in a minute, 300 are left.
    assert remaining.seconds() == 180.0
    remaining.running = 200.0
    clock.now += 30.0
    assert remaining.seconds() == 150.0
    clock.now += 3600.0
    assert remaining.seconds() == 60.0, "the cells after a slow one are still to come"


def test_what_will_not_be_measured_takes_no_time():
    clock = Clock()
    display = Display(Console(file=io.StringIO(), force_terminal=False), clock)
    display.total(200.0, 0.0)
    clock.now += 50.0
    display.done(CELL, {}, "")
    assert display.remaining.seconds() == 150.0
    display.dropped(100.0)
    assert display.remaining.seconds() == 50.0


def test_a_fault_is_said_before_figures():
    assert said({"ttft": 1.0}, "stall") == "FAULT stall, TTFT 1.000 s"
    assert said({}, "") == "no figures"


def test_a_gate_that_times_nothing_shows_the_first_of_its_own_figures():
    columns = [
        Column(head="Task", figure="task"),
        Column(head="Right", figure="right", unit="percent"),
        *(Column(head=f"More {n}", figure=f"more_{n}", unit="int") for n in range(5)),
    ]
    result = {"right": 0.935, "requests": 4} | {f"more_{n}": n for n in range(5)}
    assert said(result, "", columns) == "Right 93.50%, More 0 0, More 1 1, More 2 2"
    assert said(result | {"ttft_mean": 1.0}, "", columns) == "TTFT 1.000 s"
    assert said({"requests": 4}, "", columns) == "no figures"


@pytest.mark.parametrize("name", ["gsm8k", "logprobs", "runtime-errors"])
def test_every_gate_that_times_nothing_has_figures_to_show(name):
    told = dict.fromkeys((column.figure for column in load_gates()[name].columns), 0)
    assert said(told, "", load_gates()[name].columns) != "no figures"
