"""After its start a server compiles no kernel for a request; vLLM's own monitor judges."""

from __future__ import annotations

import inspect
import itertools
import random
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serving.checks import NAMED, SCHEMA, TOOL, ask
from tests.serving.served import Served

ACTIVE = "Kernel JIT monitor activated"
COMPILED = "Triton kernel JIT compilation during inference: "
TOKENS = 24
# Ids that every checkpoint here has.
WORDS = (64, 256)
SAMPLED = {"temperature": 1.0}
JSON = {"type": "json_schema", "json_schema": {"name": "light", "schema": SCHEMA}}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    SAMPLED,
    SAMPLED | {"top_p": 0.9},
    SAMPLED | {"extra_body": {"top_k": 5}},
    SAMPLED | {"top_p": 0.9, "extra_body": {"top_k": 5}},
    SAMPLED | {"top_p": 0.9, "seed": 7},
    SAMPLED | {"seed": 8, "extra_body": {"top_k": 5}},
    SAMPLED | {"top_p": 0.9, "seed": 9, "extra_body": {"top_k": 5}},
    {"logprobs": True, "top_logprobs": 3},
    {"extra_body": {"prompt_logprobs": 2}},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"extra_body": {"repetition_penalty": 1.2, "min_tokens": 5, "bad_words": ["a"]}},
    {"response_format": JSON},
    {"tools": [TOOL], "tool_choice": NAMED},
    {"stop": "never said"},
)
# Requests at once: one, a few, and as many as the server takes.
TOGETHER = (1, 3, 8, 16)
# Tokens of a prompt; and the most that the server takes.
LENGTHS = (1, 2, 7, 64, 127, 129, 256, 1001, 4095, 8193, 20_000)


def compiled(log: str) -> set[str]:
    """Kernels that were compiled in requests, by a server's log."""
    assert ACTIVE in log, "vLLM's monitor did not watch"
    return set(re.findall(rf"{re.escape(COMPILED)}(\w+)", log))


def ask_for_everything(served: Served) -> None:
    """Each option for all requests of a batch, and all options in one batch."""
    with ThreadPoolExecutor(max(TOGETHER)) as pool:
        for together in TOGETHER:
            batches = [[options] * together for options in OPTIONS]
            batches.append([OPTIONS[number % len(OPTIONS)] for number in range(together)])
            for batch in batches:
                asked = [
                    pool.submit(ask, served, f"{number}. Say.", max_tokens=TOKENS, **options)
                    for number, options in enumerate(batch)
                ]
                for reply in asked:
                    assert reply.result().usage.completion_tokens > 0


def ask_at_all_lengths(served: Served) -> None:
    """Prompts from one token to the longest, one to eight at once: some are read, others decode."""
    draw = random.Random(20261129)
    lengths = itertools.cycle([*LENGTHS, served.max_model_len - TOKENS])

    def one(prompt: list[int]) -> None:
        answer = served.client.completions.create(
            model=served.model,
            prompt=prompt,
            max_tokens=TOKENS,
            extra_body={"ignore_eos": True},
        )
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), TOKENS)

    for together in range(1, 9):
        prompts = [
            [draw.randrange(*WORDS) for _ in range(length)]
            for length in itertools.islice(lengths, together)
        ]
        with ThreadPoolExecutor(together) as pool:
            list(pool.map(one, prompts))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_request_compiles(served):
    ask_for_everything(served)
    ask_at_all_lengths(served)
    if served.exact:
        pytest.skip("no kernel runs without a GPU; the requests were answered")
    assert compiled(served.said()) == set()


def test_what_the_monitor_says_is_read():
    jit_monitor = pytest.importorskip("vllm.triton_utils.jit_monitor")
    source = inspect.getsource(jit_monitor)
    assert f'"{ACTIVE}' in source
    assert f'"{COMPILED}%s. "' in source
    log = f"INFO {ACTIVE} - x\nWARNING {COMPILED}some_kernel. This\nWARNING {COMPILED}b2. This\n"
    assert compiled(log) == {"some_kernel", "b2"}
    with pytest.raises(AssertionError, match="did not watch"):
        compiled(f"WARNING {COMPILED}some_kernel. This\n")
