"""How long the decode of running answers is traced: until each has grown, however slow they are."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from benchmarks.engine import measure


class Traced(measure.Bench):
    """Answers of a server whose steps take ``step_s``, and when its profiler ran."""

    def __init__(self, step_s: float, tokens: int) -> None:
        self.step_s, self.tokens = step_s, tokens
        self.answers: list[SimpleNamespace] = []
        self.seen: dict[str, list[int]] = {}
        self.kept: list[dict] = []

    async def ask(self, prompt, tokens, on_chunk=None):
        answer = SimpleNamespace(chunks=[], fault=None, detail="")
        # Prompts are read one after the other.
        await asyncio.sleep(3 * self.step_s * len(self.answers))
        self.answers.append(answer)
        for _ in range(self.tokens):
            await asyncio.sleep(self.step_s)
            answer.chunks.append(0)
            on_chunk(answer)
        return answer

    async def _trace(self, action):
        self.seen[action] = [len(answer.chunks) for answer in self.answers]

    def _profiled(self, key, answers):
        self.kept.append(key)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_each_answer_grows_while_it_is_traced(concurrency, monkeypatch):
    """A step takes ten times the seconds that are traced at least."""
    monkeypatch.setattr(measure, "PROFILE_S", 0.002)
    bench = Traced(0.02, 40)
    asyncio.run(bench.profile_decode(concurrency, measure.Plan()))
    assert len(bench.seen["start"]) == concurrency
    assert min(bench.seen["start"]) >= 2
    grown = [
        after - before
        for before, after in zip(bench.seen["start"], bench.seen["stop"], strict=True)
    ]
    assert min(grown) >= measure.PROFILE_CHUNKS
    assert max(grown) <= measure.PROFILE_CHUNKS + 3
    assert [key["concurrency"] for key in bench.kept] == [concurrency]


def test_answers_that_end_too_soon_are_named():
    bench = Traced(0.002, 3)
    with pytest.raises(measure.Failed, match="the answers ended before the profiler had begun"):
        asyncio.run(bench.profile_decode(2, measure.Plan()))
    assert not bench.kept
