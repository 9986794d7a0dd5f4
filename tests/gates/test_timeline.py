"""Two answers at once, from the timelines that were played to the figures of the report's row."""

from __future__ import annotations

import pytest

from gates.results import results
from tests.gates.conftest import Run, gate
from tests.gates.fake_server import End, FakeServer, Say, steady, words

# One answers steadily: 1 token after 0.6 s, then 9 chunks of 2 tokens every 0.2 s.
EVEN = steady(0.6, 0.2, 10, tokens=2)
# The other at half the pace: after 1.0 s, then every 0.4 s, but the sixth chunk only after 1.2 s.
UNEVEN = [
    Say(1.0),
    *(Say(0.4, tokens=2) for _ in range(4)),
    Say(1.2, tokens=2),
    *(Say(0.4, tokens=2) for _ in range(4)),
    End(),
]
# By hand. Tokens after the first chunk, over the seconds from it to the last:
EVEN_RATE, UNEVEN_RATE = 18 / (9 * 0.2), 18 / (8 * 0.4 + 1.2)
# Both begin together; the uneven one is the last to begin and to end.
LAST_FIRST, LAST_CHUNK = 1.0, 1.0 + 8 * 0.4 + 1.2
# 18 gaps in order: nine of 0.2, eight of 0.4, one of 1.2. A percentile p lies at 17 p / 100.
PERCENTILES = {
    "itl_p50": (0.2 + 0.4) / 2,  # at 8.5
    "itl_p95": 0.4 + 0.15 * 0.8,  # at 16.15
    "itl_p99": 0.4 + 0.83 * 0.8,  # at 16.83
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The row's figures, and the tokens of both prompts."""
    params = {
        "cases": [{"prompt": "archive", "prompt_tokens": 200, "concurrency": [2], "max_tokens": 64}]
    }
    limits = {"first_token_s": 5.0, "stall_s": 5.0, "total_s": 20.0}
    with FakeServer() as fake:

        def asked():
            return [sent.body for sent in fake.sent if "Archive" in str(sent.body)]

        def play(body, number):
            if "Archive" not in str(body):
                return steady(0.01, 0.002, 4)
            return EVEN if len(asked()) == 1 else UNEVEN

        fake.play = play
        path = tmp_path_factory.mktemp("timeline") / "run"
        run = Run(fake, path, [gate(repeats=1, params=params, timeouts=limits)])
        (result,) = results(run())
        (row,) = result.rows
        return row.figures, sum(words(body["messages"]) for body in asked())


# A busy machine moves a chunk, and so a rate, by a tenth; what is played differs by more.
NEAR = {"rel": 0.1}


def test_decode_rates_and_fairness(told):
    figures, _ = told
    assert figures["decode_max"] == pytest.approx(EVEN_RATE, **NEAR)
    assert figures["decode_min"] == pytest.approx(UNEVEN_RATE, **NEAR)
    assert figures["decode_mean"] == pytest.approx((EVEN_RATE + UNEVEN_RATE) / 2, **NEAR)
    assert figures["fairness"] == pytest.approx(UNEVEN_RATE / EVEN_RATE, **NEAR)
    assert figures["tpot_mean"] == pytest.approx((1 / EVEN_RATE + 1 / UNEVEN_RATE) / 2, **NEAR)


def test_rates_of_output_and_input(told):
    figures, prompts = told
    assert figures["output_tok_s"] == pytest.approx(2 * 19 / LAST_CHUNK, **NEAR)
    assert prompts == pytest.approx(400, abs=8)
    assert figures["input_tok_s"] == pytest.approx(prompts / LAST_FIRST, **NEAR)


def test_first_tokens_and_gaps(told):
    figures, _ = told
    assert figures["ttft_mean"] == pytest.approx((0.6 + 1.0) / 2, **NEAR)
    assert figures["ttft_max"] == pytest.approx(1.0, **NEAR)
    for name, wanted in PERCENTILES.items():
        assert figures[name] == pytest.approx(wanted, **NEAR), name
    assert figures["longest_stall"] == pytest.approx(1.2, **NEAR)
    assert figures["tokens_per_chunk"] == 2 * 19 / 20
