"""The definitions, by hand: no clock in it, so that every figure is exact."""

from __future__ import annotations

import pytest

from gates import figures
from gates.answer import Answer, Chunk
from gates.server import acceptance


def answer(at, tokens, sent_at=100.0, prompt=1000, **more):
    chunks = [Chunk(*pair) for pair in zip(at, tokens, strict=True)]
    total = more.pop("completion", sum(t or 0 for t in tokens))
    return Answer(
        sent_at=sent_at,
        chunks=chunks,
        ended=at[-1] + 0.01 if at else 1.0,
        prompt_tokens=prompt,
        completion_tokens=total,
        **more,
    )


# First token after 2 s, then 3 tokens every 100 ms, and one gap of 400 ms.
ONE = answer([2.0, 2.1, 2.2, 2.6], [1, 3, 3, 3])


def test_one_answer():
    assert figures.of_answer(ONE) == pytest.approx(
        {
            "ttft": 2.0,
            "longest_stall": 0.4,
            "input_tok_s": 500.0,
            "e2e": 2.61,
            "decode_tok_s": 9 / 0.6,
            "tpot": 0.6 / 9,
            "tokens_per_chunk": 2.5,
        }
    )


def test_the_first_chunks_own_tokens_are_not_decoded():
    told = figures.of_answer(answer([1.0, 1.5], [4, 6]))
    assert told["decode_tok_s"] == pytest.approx(6 / 0.5)
    # Not known by chunk: one token is taken for the first.
    told = figures.of_answer(answer([1.0, 1.5], [None, None], completion=10))
    assert told["decode_tok_s"] == pytest.approx(9 / 0.5)


def test_what_cannot_be_told_is_left_out():
    assert figures.of_answer(Answer(fault="refused")) == {}
    assert figures.of_answer(answer([1.0], [1])).keys() == {
        "ttft",
        "longest_stall",
        "input_tok_s",
        "e2e",
        "tokens_per_chunk",
    }
    broken = answer([1.0, 1.2], [1, 1], fault="stall")
    assert "decode_tok_s" not in figures.of_answer(broken)


def test_a_row():
    # Wave 1: two at once, from 100.0; wave 2: one from 200.0, and one that failed.
    slow = answer([3.0, 4.0], [1, 5])
    second = answer([1.0, 2.0], [1, 10], sent_at=200.0, cached_tokens=250)
    failed = answer([1.0], [1], sent_at=200.0, fault="stall")
    told = figures.row([[ONE, slow], [second, failed]], slow_stall=0.9)
    # 10 + 6 tokens in 4 s, then 11 in 2 s.
    assert told["output_tok_s"] == pytest.approx(27 / 6)
    # 2,000 prompt tokens until 3 s, then 1,000 until 1 s.
    assert told["input_tok_s"] == pytest.approx(3000 / 4)
    assert (told["requests"], told["succeeded"], told["failures"]) == (4, 3, 1)
    assert told["slow"] == 2
    assert told["ttft_mean"] == pytest.approx(2.0)
    assert told["ttft_max"] == 3.0
    assert (told["decode_min"], told["decode_max"]) == pytest.approx((5.0, 15.0))
    assert told["fairness"] == pytest.approx(5 / 15)
    assert told["longest_stall"] == pytest.approx(1.0)
    assert told["tokens_per_chunk"] == pytest.approx(27 / 8)
    assert told["cached_share"] == pytest.approx(0.25)
    # Gaps 0.1, 0.1, 0.4, 1.0, 1.0; the 99th percentile lies between the last two.
    assert told["itl_p50"] == pytest.approx(0.4)
    assert told["itl_p99"] == pytest.approx(1.0)
    assert told["itl_mean"] == pytest.approx(2.6 / 5)
    assert told.keys() <= figures.ROW


def test_a_row_in_which_all_failed():
    told = figures.row([[answer([], [], fault="refused")]])
    assert told == {"requests": 1, "succeeded": 0, "failures": 1}


def test_the_spread_of_repeats():
    told = figures.repeated([{"ttft_mean": 3.0}, {"ttft_mean": 1.0}, {"ttft_mean": 8.0, "x": "a"}])
    assert told == {"ttft_mean": {"median": 3.0, "min": 1.0, "max": 8.0, "n": 3}}


def test_acceptance_between_two_readings():
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    positions = ("num_accepted_tokens_per_pos.0", "num_accepted_tokens_per_pos.1")
    before = dict.fromkeys((f"spec_decode_{name}" for name in (*names, *positions)), 10.0)
    grown = zip((*names, *positions), (100, 200, 150, 90, 60), strict=True)
    after = {f"spec_decode_{name}": 10.0 + more for name, more in grown}
    told = acceptance(before, after)
    assert told["acceptance_by_position"] == pytest.approx([0.9, 0.6])
    assert (told["acceptance"], told["acceptance_length"]) == pytest.approx((0.75, 2.5))
    assert acceptance(after, after) == {}
    assert acceptance(None, after) == {}
