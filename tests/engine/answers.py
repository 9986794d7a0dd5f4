"""Greedy answers of an engine, and how two answers to the same prompt differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# Alternatives kept for each token of an answer, to judge a fork by.
ALTERNATIVES = 5


@dataclass
class Answer:
    """Greedy tokens, and for each step the log-probabilities of the likeliest tokens."""

    tokens: list[int]
    steps: list[dict[int, float]]

    @classmethod
    def of(cls, output: Any) -> Answer:
        """Of a vLLM ``RequestOutput`` whose request asked for log-probabilities."""
        first = output.outputs[0]
        steps = [{token: one.logprob for token, one in step.items()} for step in first.logprobs]
        return cls(list(first.token_ids), steps)

    @property
    def logprobs(self) -> list[float]:
        return [step[token] for token, step in zip(self.tokens, self.steps, strict=True)]

    def tail(self, first: int) -> Answer:
        return Answer(self.tokens[first:], self.steps[first:])


@dataclass
class Difference:
    """Two answers to the same prompt, up to where they part.

    ``gap`` is the largest difference of a log-probability before that. ``fork`` is how much
    likelier the first answer's token was than the second's, in the first answer's eyes; ``inf``
    where the second's was not among the alternatives; None where they do not part.
    """

    gap: float
    fork: float | None


def difference(first: Answer, second: Answer) -> Difference:
    gap = 0.0
    for token, other, step, step2 in zip(
        first.tokens, second.tokens, first.steps, second.steps, strict=False
    ):
        if token != other:
            return Difference(gap, step[token] - step.get(other, -math.inf))
        gap = max(gap, abs(step[token] - step2[token]))
    return Difference(gap, None)
