"""What a server must do, seen through the OpenAI client: each check passes or raises.

The weights are random, so that no check asks for sense. A check of two answers that should be the
same takes them as the same where they part at tokens that were as likely as rounding allows
(``LOGPROB_TOLERANCE``): another batch or a cached prefix changes the order of sums. Without a model
(``Served.exact``) they must not part.
"""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import openai

from tests.serving.served import Served, within

# As in tests/engine/run_engine.py: a quarter of the standard deviation of the logits.
LOGPROB_TOLERANCE = 1.0
ALTERNATIVES = 5
CONCURRENT = 16
TOKENS = 24
# Seconds until a server has noticed that clients went away.
NOTICED_S = 10.0
# Aimed at running answers that are cut off: far more than they come to.
LONG = 20_000

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "room": {"type": "string", "enum": ["kitchen", "hall", "cellar"]},
        "on": {"type": "boolean"},
    },
    "required": ["room", "on"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "set_light", "description": "Switch a light.", "parameters": SCHEMA},
}
NAMED = {"type": "function", "function": {"name": "set_light"}}
Message = dict[str, Any]


@dataclass
class Reply:
    """An answer, put together from a stream or taken whole."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)
    finish: str | None = None
    usage: Any = None
    tokens: list[Any] = field(default_factory=list)
    chunks: int = 0


def ask(
    served: Served,
    text: str,
    stream: bool = False,
    client: openai.OpenAI | None = None,
    **options: Any,
) -> Reply:
    """One chat completion of one message, at temperature 0 unless told otherwise."""
    thinking = options.pop("thinking", None)
    extra = dict(options.pop("extra_body", {}))
    if thinking is not None:
        extra["chat_template_kwargs"] = {"thinking": thinking}
    wanted: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0.0, **options}
    if stream:
        wanted["stream_options"] = {"include_usage": True}
        if wanted.get("logprobs"):
            # A token that has no text yet, as the first byte of a character, comes only so.
            extra["return_token_ids"] = True
    if wanted.get("logprobs"):
        # By its number: the text of a single byte of a character is that of any other.
        extra.setdefault("return_tokens_as_token_ids", True)
    answer = (client or served.client).chat.completions.create(
        model=served.model,
        messages=[{"role": "user", "content": text}],
        stream=stream,
        extra_body=extra,
        **wanted,
    )
    return _gathered(answer) if stream else _whole(answer)


def _whole(answer: Any) -> Reply:
    (choice,) = answer.choices
    message = choice.message
    return Reply(
        content=message.content or "",
        reasoning=_reasoning(message),
        calls=[
            {"name": call.function.name, "arguments": call.function.arguments}
            for call in message.tool_calls or ()
        ],
        finish=choice.finish_reason,
        usage=answer.usage,
        tokens=list(choice.logprobs.content) if choice.logprobs else [],
    )


def _gathered(stream: Any) -> Reply:
    reply = Reply()
    for event in stream:
        reply.usage = event.usage or reply.usage
        for choice in event.choices:
            reply.chunks += 1
            reply.content += choice.delta.content or ""
            reply.reasoning += _reasoning(choice.delta)
            reply.finish = choice.finish_reason or reply.finish
            reply.tokens += choice.logprobs.content if choice.logprobs else []
            for call in choice.delta.tool_calls or ():
                while len(reply.calls) <= call.index:
                    reply.calls.append({"name": "", "arguments": ""})
                reply.calls[call.index]["name"] += call.function.name or ""
                reply.calls[call.index]["arguments"] += call.function.arguments or ""
    return reply


def _reasoning(message: Any) -> str:
    """vLLM says ``reasoning``, others and older releases ``reasoning_content``."""
    extra = message.model_extra or {}
    return extra.get("reasoning") or extra.get("reasoning_content") or ""


def same(served: Served, first: Reply, second: Reply) -> None:
    """Hold two answers to one prompt against each other, token by token."""
    assert first.tokens and second.tokens, "the answers were asked for with log-probabilities"
    for place, (one, other) in enumerate(zip(first.tokens, second.tokens, strict=False)):
        if one.token == other.token:
            gap = abs(one.logprob - other.logprob)
            assert gap <= (0.0 if served.exact else LOGPROB_TOLERANCE), f"token {place}: {gap}"
            continue
        assert not served.exact, f"token {place}: {one.token!r} and {other.token!r}"
        likely = {way.token: way.logprob for way in one.top_logprobs}
        fork = one.logprob - likely.get(other.token, -math.inf)
        assert fork <= LOGPROB_TOLERANCE, f"they part at token {place}, by {fork}"
        return
    assert (first.content, first.finish) == (second.content, second.finish)
    assert len(first.tokens) == len(second.tokens)


def model_is_listed(served: Served) -> None:
    """``/v1/models`` has the served name and the length that it was started with."""
    (model,) = served.client.models.list().data
    assert model.id == served.model
    assert model.model_extra["max_model_len"] == served.max_model_len


def stream_is_the_answer(served: Served) -> None:
    """The same request streamed and not: the same text, finish and counts."""
    options = {"logprobs": True, "top_logprobs": ALTERNATIVES}
    options["extra_body"] = {"ignore_eos": True}
    whole = ask(served, "Tell of the harbour.", **options)
    streamed = ask(served, "Tell of the harbour.", stream=True, **options)
    assert streamed.chunks > 2, "the answer came in one piece"
    assert whole.finish == streamed.finish == "length"
    assert whole.usage == streamed.usage
    same(served, whole, streamed)


def thinking_has_its_own_field(served: Served) -> None:
    """With thinking on, text before ``</think>`` is reasoning; with it off there is none."""
    for stream in (False, True):
        on = ask(served, "How much is two and two?", stream=stream, thinking=True)
        assert on.reasoning, f"no reasoning (stream={stream}): {on.content!r}"
        assert "<think>" not in on.reasoning + on.content
        off = ask(served, "How much is two and two?", stream=stream, thinking=False)
        assert off.content, f"no content (stream={stream}): {off.reasoning!r}"
        assert not off.reasoning


def counts_are_true(served: Served) -> None:
    """``usage`` is what the tokenizer counts and what was asked for."""
    text = "Count these words, and these marks: ; . !"
    for thinking in (False, True):
        counted = served.count([{"role": "user", "content": text}], thinking=thinking)
        for stream in (False, True):
            reply = ask(
                served, text, stream=stream, thinking=thinking, extra_body={"ignore_eos": True}
            )
            assert reply.usage.prompt_tokens == counted
            assert reply.usage.completion_tokens == TOKENS
            assert reply.usage.total_tokens == counted + TOKENS
            assert reply.finish == "length"


def logprobs_are_probabilities(served: Served) -> None:
    """A token each, none likelier than certain, the chosen one the likeliest at temperature 0."""
    for stream in (False, True):
        reply = ask(
            served,
            "Say something.",
            stream=stream,
            logprobs=True,
            top_logprobs=ALTERNATIVES,
            extra_body={"ignore_eos": True},
        )
        assert len(reply.tokens) == reply.usage.completion_tokens
        for token in reply.tokens:
            ways = [way.logprob for way in token.top_logprobs]
            assert len(ways) >= ALTERNATIVES
            assert all(math.isfinite(way) and way <= 1e-3 for way in ways), ways
            assert sum(map(math.exp, ways)) <= 1.01, ways
            assert token.logprob >= max(ways) - 1e-3, "a greedy token was not the likeliest"


def stop_string_ends_the_answer(served: Served) -> None:
    """What the model says anyhow, taken as a stop string, cuts the answer there."""
    whole = ask(served, "Name some things.", extra_body={"ignore_eos": True})
    middle = len(whole.content) // 2
    stop = whole.content[middle : middle + 4]
    assert stop.strip(), f"nothing to stop at in {whole.content!r}"
    cut = ask(served, "Name some things.", stop=stop, extra_body={"ignore_eos": True})
    assert cut.finish == "stop" or not served.exact, cut
    assert stop not in cut.content
    if served.exact:
        assert cut.content == whole.content[: whole.content.index(stop)]
    assert cut.usage.completion_tokens <= whole.usage.completion_tokens


def _call_is_good(call: dict[str, str]) -> None:
    assert call["name"] == "set_light", call
    said = json.loads(call["arguments"])
    assert set(said) == {"room", "on"}, said
    assert said["room"] in SCHEMA["properties"]["room"]["enum"], said
    assert isinstance(said["on"], bool), said


def named_tool_is_called(served: Served) -> None:
    """A tool that is named in ``tool_choice`` is called, with arguments of its schema."""
    for stream in (False, True):
        reply = ask(
            served, "Light!", stream=stream, tools=[TOOL], tool_choice=NAMED, max_tokens=128
        )
        assert len(reply.calls) == 1, reply
        _call_is_good(reply.calls[0])
        assert reply.finish in ("stop", "tool_calls")


def required_tool_is_called(served: Served) -> None:
    """``required``: one call or more, each of its schema.

    Random weights may go on with the list of calls until the tokens are used up; then the last call
    of a stream is not whole, and an answer that is not streamed has none.
    """
    for stream in (False, True):
        reply = ask(
            served, "Light!", stream=stream, tools=[TOOL], tool_choice="required", max_tokens=512
        )
        cut = reply.finish == "length"
        assert not (cut and served.exact), reply
        assert cut or reply.calls, reply
        for call in reply.calls[:-1] if cut else reply.calls:
            _call_is_good(call)


def tools_may_be_left_alone(served: Served) -> None:
    """``auto``: words or calls, as the model likes; whatever comes is well formed."""
    for stream in (False, True):
        reply = ask(served, "Light!", stream=stream, tools=[TOOL], tool_choice="auto")
        assert reply.finish in ("length", "stop", "tool_calls")
        assert reply.content or reply.calls
        for call in reply.calls:
            json.loads(call["arguments"])


def mixed_requests_at_once(served: Served) -> None:
    """16 at once of every kind; each is answered by its own counts, and nothing is left behind."""
    text = "The tide came in. " * 60
    kinds: list[dict[str, Any]] = [
        {"text": "Short.", "stream": False},
        {"text": text * 8, "stream": True},
        {"text": text, "stream": True, "thinking": True},
        {"text": "Light!", "stream": False, "tools": [TOOL], "tool_choice": NAMED},
        {"text": text, "stream": False, "temperature": 1.0, "seed": 7},
        {"text": "Why?", "stream": True, "logprobs": True, "top_logprobs": 2},
        {"text": "Hot.", "stream": True, "temperature": 1.0, "top_p": 0.9, "max_tokens": 96},
        {"text": text * 3, "stream": False, "max_tokens": 1},
    ]

    def one(number: int) -> tuple[dict[str, Any], Reply]:
        wanted = dict(kinds[number % len(kinds)])
        text = f"{number}. {wanted.pop('text')}"
        calls = "tools" in wanted
        wanted.setdefault("max_tokens", 128 if calls else TOKENS)
        extra = {} if calls else {"extra_body": {"ignore_eos": True}}
        return wanted, ask(served, text, **wanted, **extra)

    with ThreadPoolExecutor(CONCURRENT) as pool:
        for wanted, reply in pool.map(one, range(CONCURRENT)):
            if "tools" in wanted:
                (call,) = reply.calls
                _call_is_good(call)
            else:
                assert reply.finish == "length", reply
                assert reply.usage.completion_tokens == wanted["max_tokens"]
                # A single token may be half a character, or special: no text.
                assert reply.content or reply.reasoning or wanted["max_tokens"] == 1
    _nothing_runs(served)


def answer_does_not_hang_on_its_batch(served: Served) -> None:
    """One request alone and the same among others."""
    options = {"logprobs": True, "top_logprobs": ALTERNATIVES}
    options["extra_body"] = {"ignore_eos": True}
    alone = ask(served, "Which way?", **options)
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(ask, served, f"Noise {number} " * 40) for number in range(7)]
        among = pool.submit(ask, served, "Which way?", **options).result()
        for other in others:
            other.result()
    same(served, alone, among)


def _nothing_runs(served: Served) -> None:
    """No request is running or waiting, and no block of the KV cache is held."""

    def idle() -> bool:
        seen = served.metrics()
        return (
            seen.get("num_requests_running") == 0
            and seen.get("num_requests_waiting") == 0
            and seen.get("kv_cache_usage_perc") == 0
        )

    assert within(NOTICED_S, idle), {
        name: value
        for name, value in served.metrics().items()
        if name.startswith(("num_requests", "kv_cache_usage"))
    }


def cancelled_requests_end(served: Served) -> None:
    """Clients that go away midway, streamed or waiting: the server ends their answers."""
    before = served.metrics()["generation_tokens"]
    streams = [
        served.client.chat.completions.create(
            model=served.model,
            messages=[{"role": "user", "content": f"Go on and on, {number}."}],
            max_tokens=LONG,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for number in range(4)
    ]
    for stream in streams:
        for _ in range(3):
            next(iter(stream))
    assert served.metrics()["num_requests_running"] >= 1
    for stream in streams:
        stream.close()
    impatient = served.client.with_options(timeout=1.0)
    try:
        impatient.chat.completions.create(
            model=served.model,
            messages=[{"role": "user", "content": "Take your time."}],
            max_tokens=LONG,
            extra_body={"ignore_eos": True},
        )
        raise AssertionError(f"{LONG} tokens came within a second")
    except openai.APITimeoutError:
        pass
    _nothing_runs(served)
    made = served.metrics()["generation_tokens"] - before
    assert made < LONG, f"{made} tokens were made for clients that had gone"
    assert ask(served, "Still there?").usage.completion_tokens > 0


def long_prompt_is_refused(served: Served) -> None:
    """A prompt past the limit: 400, the limit in words, and the server goes on."""
    text = "x" * (served.max_model_len + 10)
    for stream in (False, True):
        # vLLM closes the connection after some refusals: the next request must not be sent there.
        with served.connect() as fresh:
            try:
                ask(served, text, stream=stream, client=fresh)
                raise AssertionError("it was taken")
            except openai.BadRequestError as error:
                assert str(served.max_model_len) in str(error), error
    assert ask(served, "Still there?").usage.completion_tokens > 0


def nonsense_is_refused(served: Served) -> None:
    """Another model, a temperature below zero, a tool that is not offered: 4xx, with a reason."""
    cases: list[tuple[dict[str, Any], type[openai.APIStatusError], str]] = [
        ({"model": "another"}, openai.NotFoundError, "another"),
        ({"temperature": -1.0}, openai.BadRequestError, "temperature"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "fly"}}},
            openai.BadRequestError,
            "tool",
        ),
    ]
    for change, kind, word in cases:
        wanted: dict[str, Any] = {"model": served.model, "max_tokens": 4, **change}
        with served.connect() as fresh:  # as above
            try:
                fresh.chat.completions.create(messages=[{"role": "user", "content": "x"}], **wanted)
                raise AssertionError(f"{change} was taken")
            except kind as error:
                assert word in str(error), error


def drafts_are_made(served: Served) -> None:
    """With MTP the server counts drafts, and never more accepted tokens than drafted ones."""
    before = served.metrics()
    ask(served, "Go on.", extra_body={"ignore_eos": True})
    after = served.metrics()
    grew = {
        name: after.get(f"spec_decode_num_{name}", 0) - before.get(f"spec_decode_num_{name}", 0)
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    }
    assert served.drafts, "started without MTP"
    assert 0 < grew["drafts"] < grew["draft_tokens"]
    assert 0 <= grew["accepted_tokens"] <= grew["draft_tokens"]


def shared_prompt_is_cached(served: Served) -> None:
    """A long prompt that came before is read from the prefix cache, and answered the same."""
    text = f"At {time.time()} the clerk wrote: " + "the ship lay still. " * 200
    options = {"logprobs": True, "top_logprobs": ALTERNATIVES}
    options["extra_body"] = {"ignore_eos": True}
    first = ask(served, text, **options)
    before = served.metrics()["prefix_cache_hits"]
    second = ask(served, text, **options)
    hits = served.metrics()["prefix_cache_hits"] - before
    assert hits >= first.usage.prompt_tokens // 2, f"{hits} of {first.usage.prompt_tokens}"
    same(served, first, second)


CHECKS = (
    model_is_listed,
    stream_is_the_answer,
    thinking_has_its_own_field,
    counts_are_true,
    logprobs_are_probabilities,
    stop_string_ends_the_answer,
    named_tool_is_called,
    required_tool_is_called,
    tools_may_be_left_alone,
    answer_does_not_hang_on_its_batch,
    mixed_requests_at_once,
    cancelled_requests_end,
    long_prompt_is_refused,
    nonsense_is_refused,
    drafts_are_made,
    shared_prompt_is_cached,
)
