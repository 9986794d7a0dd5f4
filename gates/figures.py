"""From arrivals to figures: the definitions, of one answer and of a row of answers.

All times in seconds, rates in tokens a second. A figure that cannot be told is left out, never
guessed.

* ``ttft``: from sending the request to the first chunk with a token or text.
* ``decode_tok_s``: the tokens after the first chunk, divided by the time from the first chunk to
  the last. Where the server does not say how many tokens the first chunk had, one is taken.
* ``tpot``: the inverse of that.
* inter-chunk gaps: from one chunk to the next, whatever they hold; ``tokens_per_chunk`` stands
  beside them.
* ``fairness``: the slowest answer's decode rate over the fastest one's, in a row.
* ``longest_stall``: the longest gap inside a running answer.
* ``succeeded``: the answers without a fault; with ``failures`` they make up ``requests``.
* ``prompt_tokens_mean``: what the server's ``usage`` counted, never the length that was asked for.
* ``output_tok_s``: all tokens of the row over the time from the first request to the last chunk,
  wave by wave.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import numpy as np

from gates.answer import Answer

Figures = dict[str, Any]
# What `row` can give; gate files may name these.
ROW = frozenset(
    [
        "requests",
        "succeeded",
        "failures",
        "prompt_tokens_mean",
        "prompt_tokens_max",
        "completion_tokens_mean",
        "ttft_mean",
        "ttft_median",
        "ttft_max",
        "ttft_p99",
        "tpot_mean",
        "tpot_median",
        "decode_mean",
        "decode_median",
        "decode_min",
        "decode_max",
        "fairness",
        "itl_mean",
        "itl_p50",
        "itl_p95",
        "itl_p99",
        "longest_stall",
        "tokens_per_chunk",
        "e2e_mean",
        "e2e_max",
        "output_tok_s",
        "input_tok_s",
        "cached_share",
        "slow",
    ]
)


def gaps(answer: Answer) -> list[float]:
    """The times between successive chunks."""
    return [later.at - earlier.at for earlier, later in pairwise(answer.chunks)]


def of_answer(answer: Answer) -> Figures:
    """The figures of one answer; those of its end only where it came to its end."""
    figures: Figures = {}
    if not answer.chunks:
        return figures
    first, last = answer.chunks[0], answer.chunks[-1]
    figures["ttft"] = first.at
    figures["longest_stall"] = max(gaps(answer), default=0.0)
    if answer.prompt_tokens and first.at > 0:
        figures["input_tok_s"] = answer.prompt_tokens / first.at
    if answer.fault:
        return figures
    figures["e2e"] = answer.ended
    if answer.completion_tokens:
        after_first = answer.completion_tokens - (first.tokens or 1)
        if after_first > 0 and last.at > first.at:
            figures["decode_tok_s"] = after_first / (last.at - first.at)
            figures["tpot"] = (last.at - first.at) / after_first
        figures["tokens_per_chunk"] = answer.completion_tokens / len(answer.chunks)
    return figures


def row(waves: Sequence[Sequence[Answer]], slow_stall: float | None = None) -> Figures:
    """The figures of a row: all answers of its waves, those that failed counted and left out.

    Args:
        waves: The answers of each wave; requests of one wave ran at the same time.
        slow_stall: Seconds; answers with a longer stall are counted as ``slow``.
    """
    answers = [answer for wave in waves for answer in wave]
    good = [answer for answer in answers if not answer.fault]
    single = [of_answer(answer) for answer in good]
    figures: Figures = {
        "requests": len(answers),
        "succeeded": len(good),
        "failures": len(answers) - len(good),
    }

    def spread(name: str, source: str, **functions: Any) -> None:
        values = [one[source] for one in single if source in one]
        for suffix, function in functions.items():
            if values:
                figures[f"{name}_{suffix}"] = function(values)

    spread("ttft", "ttft", mean=fmean, median=median, max=max, p99=_p(99))
    spread("tpot", "tpot", mean=fmean, median=median)
    spread("decode", "decode_tok_s", mean=fmean, median=median, min=min, max=max)
    spread("e2e", "e2e", mean=fmean, max=max)
    if "decode_max" in figures:
        figures["fairness"] = figures["decode_min"] / figures["decode_max"]
    between = [gap for answer in good for gap in gaps(answer)]
    if between:
        figures["itl_mean"] = fmean(between)
        for share in (50, 95, 99):
            figures[f"itl_p{share}"] = _p(share)(between)
        figures["longest_stall"] = max(between)
    if slow_stall is not None:
        figures["slow"] = sum(max(gaps(answer), default=0.0) > slow_stall for answer in good)
    figures.update(_counts(good))
    figures.update(_rates(waves))
    return figures


def _counts(good: Sequence[Answer]) -> Figures:
    figures: Figures = {}
    prompts = [a.prompt_tokens for a in good if a.prompt_tokens is not None]
    outputs = [a.completion_tokens for a in good if a.completion_tokens is not None]
    if prompts:
        figures["prompt_tokens_mean"] = fmean(prompts)
        figures["prompt_tokens_max"] = max(prompts)
    if outputs:
        figures["completion_tokens_mean"] = fmean(outputs)
        chunks = sum(len(a.chunks) for a in good if a.completion_tokens is not None)
        figures["tokens_per_chunk"] = sum(outputs) / chunks if chunks else 0.0
    cached = [(a.cached_tokens, a.prompt_tokens) for a in good if a.cached_tokens is not None]
    if cached and sum(total or 0 for _, total in cached):
        figures["cached_share"] = sum(hit for hit, _ in cached) / sum(t or 0 for _, t in cached)
    return figures


def _rates(waves: Sequence[Sequence[Answer]]) -> Figures:
    """Tokens a second over the waves' time; waves run one after another."""
    tokens = prompts = 0
    seconds = until_first = 0.0
    for wave in waves:
        good = [a for a in wave if not a.fault and a.chunks]
        if not good:
            continue
        start = min(a.sent_at for a in wave)
        seconds += max(a.sent_at + a.chunks[-1].at for a in good) - start
        until_first += max(a.sent_at + a.chunks[0].at for a in good) - start
        tokens += sum(a.completion_tokens or 0 for a in good)
        prompts += sum(a.prompt_tokens or 0 for a in good)
    figures: Figures = {}
    if tokens and seconds > 0:
        figures["output_tok_s"] = tokens / seconds
    if prompts and until_first > 0:
        figures["input_tok_s"] = prompts / until_first
    return figures


def _p(share: float) -> Any:
    """The percentile by linear interpolation, as vLLM's benchmark takes it."""
    return lambda values: float(np.percentile(values, share))


def repeated(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Over the repeats of a row: median, smallest and largest of each figure, and how many."""
    collected: dict[str, list[float]] = {}
    for figures in rows:
        for name, value in figures.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                collected.setdefault(name, []).append(value)
    return {
        name: {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}
        for name, values in collected.items()
    }
