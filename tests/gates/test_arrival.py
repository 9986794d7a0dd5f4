"""Requests that arrive beside others: when they are sent, and whether they did run together."""

from __future__ import annotations

import pytest

from gates.answer import Answer, Chunk
from gates.spec import load_gates
from gates.workloads.arrival import overlapped
from tests.gates.conftest import gate
from tests.gates.fake_server import LATE, End, Hang, Say, steady
from tests.gates.test_workloads import one, own


def arrival(*streams, **changes):
    return gate(
        workload="arrival",
        repeats=1,
        params={"cases": [{"name": "case", "streams": list(streams)}]},
        columns=[{"head": "Case", "figure": "case"}],
        **changes,
    )


PRIMARY = {"role": "primary", "prompt_tokens": 200, "max_tokens": 64}
SECONDARY = {"role": "secondary", "prompt_tokens": 300, "max_tokens": 32}


def is_long(sent):
    return len(str(sent.body)) > 1400


def test_the_second_arrives_after_the_firsts_first_token(fake, run):
    def play(body, number):
        if "Archive" not in str(body):
            return steady(0, 0, 2)
        # The primary waits 0.4 s, then stalls for 0.6 s while the secondary is read.
        if len(str(body)) > 1400:
            return steady(0.1, 0.01, 3)
        return [Say(0.4), Say(0.02), Say(0.6), Say(0.02), End()]

    fake.play = play
    result = one(run, arrival(PRIMARY, SECONDARY | {"after_first_token_of": "primary"}))
    first, second = (sent for sent in fake.sent if "Archive" in str(sent.body))
    assert not is_long(first) and is_long(second)
    assert 0 <= second.came - first.chunks[0][0] < LATE
    figures = result.rows[0].figures
    for role, sent in (("primary", first), ("secondary", second)):
        assert figures[f"{role}_ttft_mean"] == pytest.approx(sent.ttft, abs=LATE)
        assert figures[f"{role}_longest_stall"] == pytest.approx(sent.longest_stall, abs=LATE)
    assert (figures["requests"], figures["failures"], figures["slow"]) == (2, 0, 0)


def test_the_second_is_sent_even_if_the_first_never_speaks(fake, run):
    fake.play = lambda body, number: (
        [Hang()] if "Archive" in str(body) and len(str(body)) < 1400 else steady(0.01, 0.01, 3)
    )
    limits = {"first_token_s": 2.5, "stall_s": 2.5, "total_s": 8.0}
    result = one(
        run, arrival(PRIMARY, SECONDARY | {"after_first_token_of": "primary"}, timeouts=limits)
    )
    figures = result.rows[0].figures
    assert (figures["primary_failures"], figures["secondary_failures"]) == (1, 0)
    assert result.status == "failed"


def test_streams_arrive_at_their_times(fake, run):
    fake.play = lambda body, number: steady(0.01, 0.002, 3)
    one(run, arrival(PRIMARY | {"count": 3, "every_s": 0.4}, SECONDARY | {"at_s": 0.8}))
    came = [sent.came for sent in fake.sent if "Archive" in str(sent.body)]
    begin = min(came)
    late = sorted(at - begin for at in came)
    assert late == pytest.approx([0.0, 0.4, 0.8, 0.8], abs=LATE)


def entry(role, sent_at, at):
    """An answer of a role with chunks so many seconds after it was sent."""
    chunks = [Chunk(one, 1) for one in at]
    return {
        "role": role,
        "answer": Answer(sent_at=sent_at, chunks=chunks, ended=max(at, default=0)),
    }


@pytest.mark.parametrize(
    ("primaries", "secondaries", "share"),
    [
        # It runs from 100 to 109; the other's first token comes at 108, or at 110.
        ([(100, [1, 9])], [(102, [6, 7])], 1.0),
        ([(100, [1, 9])], [(102, [8, 9])], 0.0),
        # Not yet speaking is running, too: it is being read.
        ([(100, [5, 9])], [(101, [1, 2])], 1.0),
        # Of two secondaries one comes too late; of two primaries one is enough.
        ([(100, [1, 9])], [(102, [6, 7]), (104, [6, 7])], 0.5),
        ([(100, [1, 2]), (100, [1, 9])], [(102, [6, 7])], 1.0),
        ([(100, [])], [(102, [6])], None),
        ([(100, [1])], [(102, [])], None),
        ([(100, [1])], [], None),
    ],
)
def test_a_primary_runs_until_its_last_token(primaries, secondaries, share):
    entries = [entry("primary", *one) for one in primaries]
    assert overlapped(entries + [entry("secondary", *one) for one in secondaries]) == share


@pytest.mark.parametrize(("chunks", "status"), [(80, "passed"), (2, "failed")])
def test_a_primary_that_ended_before_the_second_spoke_fails_the_gate(fake, run, chunks, status):
    def play(body, number):
        if "Archive" not in str(body):
            return steady(0, 0, 2)
        return steady(0.01, 0.01, chunks) if body["max_tokens"] == 96 else steady(0.4, 0.01, 3)

    fake.play = play
    mixed = own("mixed-arrival")
    cases = [case for case in mixed.params["cases"] if case["name"] == "decode_then_59k"]
    result = one(run, own("mixed-arrival", cases=cases).model_copy(update={"repeats": 1}))
    assert result.rows[0].figures["overlapped"] == (1 if status == "passed" else 0)
    assert result.status == status
    assert all("overlapped is 0, below 1" in why for why in result.why)
    asked = {
        s.body["max_tokens"]: s.body.get("ignore_eos") for s in fake.sent if "Ar" in str(s.body)
    }
    assert (asked[96], asked[32]) == (True, None)


@pytest.mark.parametrize("size", ["full", "short"])
def test_every_case_of_mixed_arrival_is_in_both_sizes_and_its_primary_cannot_end_early(size):
    cases = load_gates()["mixed-arrival"].sized(size).params["cases"]
    assert [case["name"] for case in cases] == [
        "decode_then_59k",
        "decode_then_124k",
        "long_then_short",
    ]
    for case in cases:
        primary, secondary = case["streams"]
        assert primary["ignore_eos"] and "ignore_eos" not in secondary
