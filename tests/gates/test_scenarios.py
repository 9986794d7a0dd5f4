"""The tool-call battery: every scenario can be solved; a wrong way has fewer than full points."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from gates import scenario
from gates.results import results
from gates.scenario import Conversation, matches
from gates.spec import load_gates
from stack.errors import StackError
from tests.gates.conftest import gate
from tests.gates.fake_server import Call, End, Say, Status

SCENARIOS = {one.id: one for one in scenario.load()}
EVENT = {
    "title": "Budget review",
    "date": "2026-06-09",
    "start": "14:15",
    "duration_minutes": 105,
    "attendees": ["lin@example.org", "ada@example.org"],
    "location": "Room 4.12",
}
TRAINS = {"origin": "Ghent", "destination": "Cologne", "date": "2026-04-20"}
BOOKING = {"train_id": "t-14", "passenger": "Jonas Weber", "travel_class": "second"}
STOCK = {"article": "2204-C", "warehouse": "Ghent"}
BERGEN = {"city": "Bergen", "date": "2026-03-14"}
# What a careful model does, and what it says at the end: 2 points.
RIGHT = {
    "selection-weather": ([("get_weather", BERGEN)], "Yes, heavy rain."),
    "selection-lookalikes": (
        [("list_events", {"date": "2026-05-04"})],
        "The dentist at 10:30 and choir at 19:00.",
    ),
    "selection-two-at-once": (
        [("get_weather", {"city": "Porto"}), ("get_weather", {"city": "Tallinn"})],
        "It is warmer in Porto.",
    ),
    "precision-units": (
        [("get_weather", {"city": "Chicago", "unit": "fahrenheit"})],
        "61 degrees.",
    ),
    "precision-event": ([("create_event", EVENT)], "Done."),
    "precision-order": (
        [("place_order", {"article": "7731-B", "pieces": 48, "warehouse": "Lyon"})],
        "Ordered.",
    ),
    "chain-contact-message": (
        [
            ("find_contact", {"name": "Marguerite Osei"}),
            ("send_message", {"contact_id": "c-4471", "text": "The meeting is at 3 pm."}),
        ],
        "Sent.",
    ),
    "chain-train-booking": ([("find_trains", TRAINS), ("book_train", BOOKING)], "Booked."),
    "chain-files": (
        [
            ("list_files", {"folder": "reports"}),
            *[("read_file", {"path": f"reports/q{n}.txt"}) for n in (1, 2, 3)],
        ],
        "The sum is 59,758.",
    ),
    "restraint-knowledge": ([], "Jupiter."),
    "restraint-missing": ([], "From where, and on which day?"),
    "restraint-cannot": ([], "I cannot reach your heating."),
    "recovery-retry": ([("stock_level", STOCK), ("stock_level", STOCK)], "317 pieces."),
    "recovery-spelling": (
        [("get_weather", {"city": "Gotenburg"}), ("get_weather", {"city": "Gothenburg"})],
        "Fog in Gothenburg.",
    ),
    "recovery-refused": (
        [("delete_event", {"event_id": "e-33"})],
        "It belongs to another person; I could not delete it.",
    ),
}
# Something that looks busy and is wrong, and the points it has.
WRONG = {
    "selection-weather": ([("get_weather", {"city": "Oslo"})], "Rain.", 0),
    "selection-lookalikes": ([("create_event", {"date": "2026-05-04"})], "Dentist, choir.", 0),
    "selection-two-at-once": ([("get_weather", {"city": "Porto"})], "Porto.", 1),
    "precision-units": ([("get_weather", {"city": "Chicago"})], "16 degrees Celsius.", 1),
    "precision-event": ([("create_event", EVENT | {"duration_minutes": 60})], "Done.", 1),
    "precision-order": (
        [("place_order", {"article": "7713-B", "pieces": 48, "warehouse": "Lyon"})],
        "Ordered.",
        0,
    ),
    "chain-contact-message": (
        [("send_message", {"contact_id": "Marguerite", "text": "3 pm"})],
        "Sent.",
        0,
    ),
    "chain-train-booking": (
        [("find_trains", TRAINS), ("book_train", BOOKING | {"train_id": "t-18"})],
        "Booked the cheapest.",
        0,
    ),
    "chain-files": (
        [("list_files", {"folder": "reports"}), ("read_file", {"path": "reports/q1.txt"})],
        "18,450.",
        1,
    ),
    "restraint-knowledge": ([("calculate", {"expression": "1"})], "Jupiter.", 1),
    "restraint-missing": (
        [("book_train", {"train_id": "t-1", "passenger": "?"})],
        "Booked. Anything else?",
        0,
    ),
    "restraint-cannot": (
        [("send_message", {"contact_id": "landlord", "text": "heating off"})],
        "I cannot, so I wrote to the landlord.",
        0,
    ),
    "recovery-retry": ([("stock_level", STOCK)], "It is not available.", 1),
    "recovery-spelling": ([("get_weather", {"city": "Gotenburg"})], "No such city.", 1),
    "recovery-refused": (
        [("delete_event", {"event_id": "e-33"})],
        "The event has been deleted, you cannot undo it.",
        0,
    ),
}


def played(name, calls, answer):
    talk = Conversation(SCENARIOS[name])
    for tool, arguments in calls:
        talk.call(tool, json.dumps(arguments))
    talk.answer = answer
    return talk


def test_there_are_fifteen_three_of_each_kind():
    assert Counter(one.category for one in SCENARIOS.values()) == dict.fromkeys(
        ("selection", "precision", "chain", "restraint", "recovery"), 3
    )
    assert SCENARIOS.keys() == RIGHT.keys() == WRONG.keys()


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_way_has_two_points(name):
    assert played(name, *RIGHT[name]).points() == 2


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_way_has_fewer(name):
    calls, answer, points = WRONG[name]
    assert played(name, calls, answer).points() == points


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("answer", ["", "word word word", "??? \ufffd ?"])
def test_silence_and_words_without_sense_have_no_points(name, answer):
    assert played(name, [], answer).points() == 0


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("restraint-missing", "Please tell me your departure station and the travel date."),
        ("restraint-cannot", "I can\u2019t reach your heating."),
    ],
)
def test_a_right_answer_may_be_put_in_other_words(name, answer):
    assert played(name, [], answer).points() == 2


def test_a_needless_look_costs_a_point_and_not_both():
    searched = [("find_trains", {"origin": "Graz", "destination": "Vienna"})]
    assert played("restraint-missing", searched, "From where, and when?").points() == 1
    looked = [("find_contact", {"name": "landlord"})]
    assert played("restraint-cannot", looked, "I cannot do that.").points() == 1


def test_every_right_call_has_an_answer_of_its_tool():
    for name, (calls, _) in RIGHT.items():
        talk = Conversation(SCENARIOS[name])
        for tool, arguments in calls:
            said = talk.call(tool, json.dumps(arguments))
            assert "nothing found" not in said and "there is no tool" not in said, (name, tool)


def test_an_answer_that_is_said_once_is_not_said_again():
    talk = Conversation(SCENARIOS["recovery-retry"])
    first, second = (talk.call("stock_level", json.dumps(STOCK)) for _ in range(2))
    assert "retry" in first and "317" in second


@pytest.mark.parametrize(
    ("wanted", "given", "fits"),
    [
        ({"a": "Lyon"}, {"a": " lyon "}, True),
        ({"a": 48}, {"a": "48"}, True),
        ({"a": 48}, {"a": 48.0}, True),
        ({"a": 48}, {"a": 47}, False),
        ({"a": 1}, {"a": True}, False),
        ({"a": {"contains": "q1"}}, {"a": "reports/Q1.txt"}, True),
        ({"a": ["x", "y"]}, {"a": ["Y", "x"]}, True),
        ({"a": ["x", "y"]}, {"a": ["x"]}, False),
        ({"a": "x"}, {}, False),
        ({}, {"b": 1}, True),
        ({"a": "x"}, None, False),
        ({"a": "x"}, ["a"], False),
    ],
)
def test_arguments_are_compared_by_what_they_mean(wanted, given, fits):
    assert matches(wanted, given) is fits


def test_broken_arguments_are_answered_and_counted():
    talk = Conversation(SCENARIOS["selection-weather"])
    assert "no JSON" in talk.call("get_weather", "{oh")
    assert "there is no tool" in talk.call("fly", "{}")
    assert len(talk.calls) == 2 and talk.points() == 0


def test_a_wrong_scenario_is_said(tmp_path):
    (tmp_path / "tools.json").write_text('[{"name": "a"}]')
    text = 'id = "x-y"\ncategory = "chain"\ntitle = "t"\nuser = "u"\ntools = ["a", "b"]\n'
    text += '[[full]]\nkind = "called"\ntool = "a"\n[[partial]]\nkind = "calls"\n'
    (tmp_path / "x-y.toml").write_text(text)
    with pytest.raises(StackError, match=r"x-y\.toml: there is no tool 'b'; tools\.json has a"):
        scenario.load(tmp_path)
    (tmp_path / "x-y.toml").write_text(text.replace('tool = "a"', ""))
    with pytest.raises(StackError, match="full.0: a check of kind 'called' needs tool"):
        scenario.load(tmp_path)


def battery(**params):
    return gate(
        workload="tools",
        repeats=2,
        total=True,
        params={"max_tokens": 64} | params,
        columns=[{"head": "T", "figure": "thinking"}],
        thresholds=[{"figure": "score", "min": 0.9, "why": "x"}],
    )


def careful(body, number):
    """A model that knows the right way of every scenario."""
    messages = body["messages"]
    user = next(message["content"] for message in messages if message["role"] == "user")
    name = next((n for n, one in SCENARIOS.items() if one.user == user), None)
    if name is None:
        return [Say(0, "one"), End()]
    calls, answer = RIGHT[name]
    made = sum(len(message.get("tool_calls") or ()) for message in messages)
    if made < len(calls):
        tool, arguments = calls[made]
        return [
            Say(0, "Let me see. ", channel="reasoning"),
            Call(0, tool, json.dumps(arguments)),
            End("tool_calls"),
        ]
    return [Say(0, answer), End()]


def test_a_careful_model_has_full_points_in_every_mode(fake, run):
    fake.play = careful
    (result,) = results(run(battery()))
    assert result.status == "passed"
    assert [row.key["thinking"] for row in result.rows] == [
        "chat",
        "thinking",
        "thinking-max",
        "all",
    ]
    total = result.rows[-1].figures
    assert (total["cases"], total["score"], total["failed_cases"]) == (15 * 3 * 2, 1.0, 0)
    asked = [sent.body.get("chat_template_kwargs") for sent in fake.sent if "tools" in sent.body]
    assert Counter(json.dumps(one) for one in asked).keys() == {
        '{"thinking": false}',
        '{"thinking": true}',
        '{"thinking": true, "reasoning_effort": "max"}',
    }


def test_the_next_request_repeats_calls_reasoning_and_results(fake, run):
    fake.play = careful
    run(battery(modes=["thinking"], scenarios=["chain-contact-message"]))
    last = next(sent.body for sent in fake.sent if len(sent.body["messages"]) == 5)
    _, called, result, _, _ = last["messages"]
    assert called["reasoning"] == "Let me see. "
    assert called["tool_calls"][0]["function"]["name"] == "find_contact"
    assert result["role"] == "tool" and "c-4471" in result["content"]
    assert result["tool_call_id"] == called["tool_calls"][0]["id"]
    assert (last["temperature"], last["top_p"], last["tool_choice"]) == (1.0, 1.0, "auto")


def test_a_model_that_calls_without_end_is_stopped(fake, run):
    fake.play = lambda body, number: (
        [Call(0, "get_weather", '{"city": "Bergen"}'), End("tool_calls")]
        if "tools" in body
        else [Say(0, "one"), End()]
    )
    folder = run(battery(modes=["chat"], scenarios=["selection-weather"]))
    (result,) = results(folder)
    turns = SCENARIOS["selection-weather"].max_turns
    assert len(folder.of("request")) == 2 * turns
    assert result.rows[0].figures["score"] == 0.5


def test_a_server_that_fails_scores_nothing(fake, run):
    fake.play = lambda body, number: [Status(500)] if "tools" in body else [Say(0, "one"), End()]
    (result,) = results(run(battery(modes=["chat"], scenarios=["restraint-knowledge"])))
    assert result.rows[0].figures["failed_cases"] == 2
    assert result.rows[0].figures["failures"] == 2


def modes(fake, run, reasons):
    """The suite's own gate with a server that reasons where ``reasons(asked for)`` holds."""

    def play(body, number):
        asked = (body.get("chat_template_kwargs") or {}).get("thinking")
        thought = [Say(0, "Hm. ", channel="reasoning")] if reasons(asked) else []
        return [*thought, Say(0, "Jupiter."), End()]

    fake.play = play
    own = load_gates()["tool-calls"]
    params = own.params | {"scenarios": ["restraint-knowledge"]}
    (result,) = results(run(own.model_copy(update={"params": params, "repeats": 1})))
    return result


def test_reasoning_follows_the_mode(fake, run):
    result = modes(fake, run, lambda asked: asked)
    assert [row.figures["reasoned"] for row in result.rows] == [0, 1, 1, pytest.approx(2 / 3)]
    assert result.warnings == []


@pytest.mark.parametrize(
    ("reasons", "rows"),
    [(False, ["thinking=thinking:", "thinking=thinking-max:"]), (True, ["thinking=chat:"])],
)
def test_a_server_that_ignores_the_mode_is_seen(fake, run, reasons, rows):
    result = modes(fake, run, lambda asked: reasons)
    assert [warning.split(" ")[0] for warning in result.warnings] == rows
    assert all("ignored chat_template_kwargs" in warning for warning in result.warnings)
    assert result.status == "passed"
