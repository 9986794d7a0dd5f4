"""Every figure of a stream against the timeline that the fake server was told to play."""

from __future__ import annotations

import asyncio

import pytest

from gates import client, figures
from gates.answer import FAULTS, Answer, Chunk
from gates.spec import Timeouts
from tests.gates.fake_server import LATE, Call, Disconnect, End, Hang, Raw, Say, Status, steady

# Long enough for a good answer on a busy machine.
SOON = Timeouts(first_token_s=2.0, stall_s=1.5, total_s=4.0)


def ask(fake, steps, timeouts=SOON, max_tokens=64, **body):
    fake.play = lambda sent, number: steps
    sent = {
        "model": "fake-model",
        "messages": [{"role": "user", "content": "one two three"}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }

    async def once():
        async with client.http(fake.url) as http:
            return await client.stream(http, sent | body, timeouts)

    return asyncio.run(once())


def test_times_and_tokens_are_the_timelines(fake):
    answer = ask(fake, steady(0.5, 0.2, 5, tokens=3), Timeouts())
    assert answer.fault == ""
    assert [chunk.tokens for chunk in answer.chunks] == [1, 3, 3, 3, 3]
    assert (answer.prompt_tokens, answer.completion_tokens) == (3 + 7, 13)
    assert (answer.text, answer.finish_reason) == ("word " * 5, "stop")
    # To the server's own record of when each chunk went out, closer than to the plan.
    sent = fake.sent[0]
    for chunk, (at, _) in zip(answer.chunks, sent.chunks, strict=True):
        assert answer.sent_at + chunk.at == pytest.approx(at, abs=LATE)
    told = figures.of_answer(answer)
    assert told["ttft"] == pytest.approx(sent.ttft, abs=LATE)
    assert told["longest_stall"] == pytest.approx(sent.longest_stall, abs=LATE)
    assert told["decode_tok_s"] == pytest.approx(12 / sent.span, rel=LATE / 0.8)
    assert told["tpot"] == pytest.approx(sent.span / 12, abs=LATE / 12)
    assert told["tokens_per_chunk"] == pytest.approx(13 / 5)
    assert told["e2e"] >= told["ttft"] + sent.span - LATE


def test_an_uneven_stream_shows_its_longest_stall(fake):
    answer = ask(fake, [Say(0.02), Say(0.02), Say(0.5), Say(0.02), End()], Timeouts())
    assert answer.fault == ""
    gaps = figures.gaps(answer)
    assert gaps.index(max(gaps)) == 1
    played = fake.sent[0].longest_stall
    assert figures.of_answer(answer)["longest_stall"] == pytest.approx(played, abs=LATE)


def test_without_counts_by_chunk_the_total_still_holds(fake):
    fake.continuous = False
    answer = ask(fake, steady(0.02, 0.01, 4, tokens=5), Timeouts())
    assert answer.fault == ""
    assert [chunk.tokens for chunk in answer.chunks] == [None] * 4
    assert answer.completion_tokens == 16


def test_counts_in_the_finishing_event_alone_are_no_arrival(fake):
    """As `transformers serve` sends them: beside the finish_reason, and without [DONE]."""
    fake.continuous = False
    last = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}], '
    last += b'"usage": {"prompt_tokens": 10, "completion_tokens": 9, "total_tokens": 19}}\n\n'
    answer = ask(fake, [Say(0.01, tokens=4), Say(0.01, tokens=5), Raw(0.5, last)], Timeouts())
    assert (answer.fault, answer.completion_tokens) == ("", 9)
    assert [chunk.tokens for chunk in answer.chunks] == [None, None]
    arrived = fake.sent[0].chunks[-1][0]
    assert answer.sent_at + answer.chunks[-1].at == pytest.approx(arrived, abs=LATE)


def test_both_names_of_reasoning_are_read(fake):
    steps = [Say(0, "a", channel="reasoning"), Say(0, "b", channel="reasoning_content"), End()]
    answer = ask(fake, [*steps[:2], Say(0, "c"), End()])
    assert (answer.reasoning, answer.text, answer.fault) == ("ab", "c", "")
    assert len(answer.chunks) == 3


def test_a_tool_call_in_parts_is_put_together(fake):
    answer = ask(
        fake,
        [
            Call(0, "find", '{"a":'),
            Call(0, "", "1}"),
            Call(0, "other", "{}", index=1),
            End("tool_calls"),
        ],
    )
    assert [(c["name"], c["arguments"]) for c in answer.tool_calls] == [
        ("find", '{"a":1}'),
        ("other", "{}"),
    ]
    assert answer.fault == "" and answer.finish_reason == "tool_calls"


FAULTY = {
    "an HTTP error": ([Status(500)], "http", 0),
    "no first token": ([Hang()], "first_token", 0),
    "a stall": ([Say(0.01), Say(0.01), Hang()], "stall", 2),
    "no end": ([Say(0.05)] * 100, "total", None),
    "a disconnect at once": ([Disconnect()], "disconnected", 0),
    "a disconnect in the middle": ([Say(0.01), Say(0.01), Disconnect(0.05)], "disconnected", 2),
    "no closing event": ([Say(0.01), Say(0.01)], "cut_off", 2),
    "no JSON": ([Say(0.01), Raw(0.01, b"data: {oh no\n\n"), Say(0.01), End()], "garbled", 2),
    "no UTF-8": ([Say(0.01), Raw(0.01, b"data: \xff\xfe{}\n\n"), Say(0.01), End()], "garbled", 2),
    "another shape": ([Raw(0.01, b'data: {"choices": 3}\n\n'), Say(0.01), End()], "garbled", 1),
    "a list": ([Raw(0.01, b"data: [1]\n\n"), Say(0.01), End()], "garbled", 1),
    "an error event": (
        [Say(0.01), Raw(0.01, b'data: {"error": {"message": "out of memory"}}\n\n'), End()],
        "server_error",
        1,
    ),
    "nothing at all": ([End()], "empty", 0),
    "empty chunks": ([Say(0.01, "", 0), Say(0.01, "", 0), End()], "empty", 0),
    "more than was asked for": ([Say(0.01, tokens=65), End()], "usage", 1),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_is_named_and_what_came_is_kept(fake, name):
    steps, fault, chunks = FAULTY[name]
    answer = ask(fake, steps)
    assert answer.fault == fault, answer.detail
    assert fault in FAULTS
    if chunks is not None:
        assert len(answer.chunks) == chunks
    assert answer.ended < SOON.total_s + 5 * LATE


def test_every_word_for_a_fault_of_a_server_is_shown_by_a_test():
    assert set(FAULTS) - {fault for _, fault, _ in FAULTY.values()} == {"refused", "client"}


def test_nobody_listens():
    class Nobody:
        url = "http://127.0.0.1:9"
        sent: list = []

    assert ask(Nobody(), []).fault == "refused"


@pytest.mark.parametrize(
    ("usage", "detail"),
    [
        (lambda prompt, out: (prompt, 0), "0 completion tokens"),
        (lambda prompt, out: (0, out), "0 prompt"),
        (lambda prompt, out: (prompt, -out), "went down"),
        (lambda prompt, out: (prompt, 1000 * out), "more than max_tokens"),
    ],
)
def test_counts_that_cannot_be_are_a_fault(fake, usage, detail):
    fake.usage = usage
    answer = ask(fake, steady(0.01, 0.01, 3))
    assert answer.fault == "usage" and detail in answer.detail


def test_a_stream_without_counts_is_a_fault(fake):
    fake.continuous = False
    answer = ask(fake, [Say(0.01), End(usage=False)])
    assert answer.fault == "usage" and "no token counts" in answer.detail


def test_pings_do_not_hide_a_stall(fake):
    answer = ask(fake, [Say(0.01), *[Raw(0.05, b": ping\n\n")] * 60, End()])
    assert answer.fault == "stall"


def test_a_given_up_request_is_closed(fake):
    ask(fake, [Say(0.01), Hang()])
    assert fake.sent[0].ended is None


def test_a_record_gives_the_answer_back():
    answer = Answer(5.0, [Chunk(0.5, 1), Chunk(0.75, None)], 1.0, "a", "b", [{"name": "n"}])
    answer.fail("stall", "x")
    answer.fail("http", "later")
    back = Answer.from_record(answer.record())
    assert back == answer and back.fault == "stall"
    with pytest.raises(ValueError, match="nonsense"):
        answer.fail("nonsense")
