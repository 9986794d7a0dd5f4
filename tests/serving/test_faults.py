"""Each check fails where a server does wrong: true answers, changed on their way to the client."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest

from tests.serving import checks
from tests.serving.served import Served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.parametrize("server", ["scripted"], indirect=True),
]
Change = Callable[[dict[str, Any]], Any]


class Changing(httpx.BaseTransport):
    """Sends a request on, and changes each JSON object of what comes back."""

    def __init__(self, change: Change) -> None:
        self.change, self.inner = change, httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self.inner.handle_request(request)
        response.read()
        lines = response.text.split("\n")
        for number, line in enumerate(lines):
            start = "data: " if line.startswith("data: {") else ""
            if start or line.startswith("{"):
                said = json.loads(line.removeprefix(start))
                self.change(said)
                lines[number] = start + json.dumps(said)
        headers = {"content-type": response.headers["content-type"]}
        code = 500 if response.is_error and self.change is server_error else response.status_code
        return httpx.Response(code, headers=headers, text="\n".join(lines))


@dataclass
class Faulty(Served):
    """A server whose answers, or whose metrics, are changed."""

    change: Change | None = None
    gauges: dict[str, float] = field(default_factory=dict)

    def connect(self) -> openai.OpenAI:
        if self.change is None:
            return super().connect()
        return (
            super()
            .connect()
            .with_options(http_client=httpx.Client(transport=Changing(self.change)))
        )

    def metrics(self) -> dict[str, float]:
        return super().metrics() | self.gauges


def choices(change: Change) -> Change:
    """A change of every choice of an answer or of a chunk."""

    @functools.wraps(change)
    def each(said: dict[str, Any]) -> None:
        for choice in said.get("choices", ()):
            change(choice)

    return each


def message(change: Change) -> Change:
    """A change of every message, or of every piece of one."""
    return choices(
        functools.wraps(change)(lambda choice: change(choice.get("message") or choice.get("delta")))
    )


def finish_with(reason: str) -> Change:
    def change(choice: dict[str, Any]) -> None:
        if choice.get("finish_reason"):
            choice["finish_reason"] = reason

    return choices(change)


def other_length(said: dict[str, Any]) -> None:
    for model in said.get("data", ()):
        model["max_model_len"] += 1


@choices
def lost_piece(choice: dict[str, Any]) -> None:
    if "delta" in choice and choice["delta"].get("content", "").startswith(" b"):
        choice["delta"]["content"] = ""


@choices
def lost_end(choice: dict[str, Any]) -> None:
    if "delta" in choice:
        choice["finish_reason"] = None


@message
def reasoning_as_content(said: dict[str, Any]) -> None:
    if said.get("reasoning"):
        said["content"] = said.pop("reasoning")


@message
def content_as_reasoning(said: dict[str, Any]) -> None:
    if said.get("content"):
        said["reasoning"] = said.pop("content")


def counts(name: str, by: int) -> Change:
    def change(said: dict[str, Any]) -> None:
        if said.get("usage"):
            said["usage"][name] += by

    return change


@choices
def one_token_short(choice: dict[str, Any]) -> None:
    if "message" in choice and choice.get("logprobs"):
        choice["logprobs"]["content"].pop()


@choices
def likelier_than_certain(choice: dict[str, Any]) -> None:
    for token in (choice.get("logprobs") or {}).get("content", ()):
        token["top_logprobs"][0]["logprob"] = token["logprob"] = 0.25


@choices
def not_the_likeliest(choice: dict[str, Any]) -> None:
    for token in (choice.get("logprobs") or {}).get("content", ()):
        token["logprob"] = -4.0


@choices
def no_alternatives(choice: dict[str, Any]) -> None:
    for token in (choice.get("logprobs") or {}).get("content", ()):
        del token["top_logprobs"][1:]


@message
def goes_on(said: dict[str, Any]) -> None:
    said["content"] += " and on"


@message
def no_calls(said: dict[str, Any]) -> None:
    said["tool_calls"] = []


def arguments(text: str) -> Change:
    def change(said: dict[str, Any]) -> None:
        for call in said.get("tool_calls") or ():
            if "content" in said:  # not streamed
                call["function"]["arguments"] = text

    return message(change)


@message
def said_nothing(said: dict[str, Any]) -> None:
    said["content"] = said["tool_calls"] = None


@choices
def another_token(choice: dict[str, Any]) -> None:
    another_token.count += 1
    if choice.get("logprobs"):
        choice["logprobs"]["content"][0]["token"] = f"x{another_token.count}"


def unlikely_elsewhere(said: dict[str, Any]) -> None:
    unlikely_elsewhere.count += 1
    for choice in said.get("choices", ()):
        if choice.get("logprobs"):
            choice["logprobs"]["content"][0]["logprob"] -= 0.01 * unlikely_elsewhere.count


def no_reason(said: dict[str, Any]) -> None:
    if "error" in said:
        said["error"]["message"] = "wrong"


def server_error(said: dict[str, Any]) -> None:
    """The transport makes another status of it."""


CHANGES = [
    (checks.model_is_listed, other_length),
    (checks.stream_is_the_answer, lost_piece),
    (checks.stream_is_the_answer, lost_end),
    (checks.stream_is_the_answer, another_token),
    (checks.thinking_has_its_own_field, reasoning_as_content),
    (checks.thinking_has_its_own_field, content_as_reasoning),
    (checks.counts_are_true, counts("prompt_tokens", 1)),
    (checks.counts_are_true, counts("completion_tokens", -1)),
    (checks.counts_are_true, counts("total_tokens", 1)),
    (checks.counts_are_true, finish_with("stop")),
    (checks.logprobs_are_probabilities, one_token_short),
    (checks.logprobs_are_probabilities, likelier_than_certain),
    (checks.logprobs_are_probabilities, not_the_likeliest),
    (checks.logprobs_are_probabilities, no_alternatives),
    (checks.stop_string_ends_the_answer, goes_on),
    (checks.stop_string_ends_the_answer, finish_with("length")),
    (checks.named_tool_is_called, no_calls),
    (checks.named_tool_is_called, arguments('{"room": "attic", "on": true}')),
    (checks.named_tool_is_called, arguments('{"room": "hall", "on": "yes"}')),
    (checks.named_tool_is_called, arguments('{"room": "hall"}')),
    (checks.required_tool_is_called, no_calls),
    (checks.required_tool_is_called, arguments('{"room": "attic", "on": true}')),
    (checks.tools_may_be_left_alone, said_nothing),
    (checks.tools_may_be_left_alone, finish_with("abort")),
    (checks.answer_does_not_hang_on_its_batch, another_token),
    (checks.answer_does_not_hang_on_its_batch, unlikely_elsewhere),
    (checks.mixed_requests_at_once, counts("completion_tokens", 1)),
    (checks.mixed_requests_at_once, finish_with("stop")),
    (checks.mixed_requests_at_once, arguments('{"room": "attic", "on": true}')),
    (checks.long_prompt_is_refused, no_reason),
    (checks.nonsense_is_refused, no_reason),
    (checks.shared_prompt_is_cached, another_token),
]
GAUGES = [
    (checks.mixed_requests_at_once, {"num_requests_running": 1.0}),
    (checks.mixed_requests_at_once, {"num_requests_waiting": 1.0}),
    (checks.mixed_requests_at_once, {"kv_cache_usage_perc": 0.01}),
    (checks.cancelled_requests_end, {"num_requests_running": 4.0}),
    (checks.drafts_are_made, {"spec_decode_num_drafts": 7.0}),
    (checks.drafts_are_made, {"spec_decode_num_draft_tokens": 7.0}),
    (checks.shared_prompt_is_cached, {"prefix_cache_hits": 5.0}),
]


def faulty(served, **fault):
    another_token.count = unlikely_elsewhere.count = 0
    return Faulty(served.url, exact=True, pid=served.pid, log=served.log, **fault)


def label(value):
    return getattr(value, "__name__", None) or " ".join(value)


@pytest.mark.parametrize(("check", "change"), CHANGES, ids=label)
def test_a_changed_answer_is_found(served, check, change):
    with pytest.raises(AssertionError):
        check(faulty(served, change=change))


@pytest.mark.parametrize(("check", "gauges"), GAUGES, ids=label)
def test_what_is_left_behind_is_found(served, monkeypatch, check, gauges):
    monkeypatch.setattr(checks, "NOTICED_S", 0.5)
    with pytest.raises(AssertionError):
        check(faulty(served, gauges=gauges))


def test_an_error_of_the_server_is_no_refusal(served):
    with pytest.raises(openai.InternalServerError):
        checks.long_prompt_is_refused(faulty(served, change=server_error))


@pytest.mark.parametrize("check", checks.CHECKS, ids=label)
def test_answers_that_are_passed_on_unchanged_are_good(served, check):
    """So that it is the change that is found, and not the way through which it came."""
    if check is checks.cancelled_requests_end:
        pytest.skip("the transport reads an answer to its end")
    check(faulty(served, change=lambda said: None))


def test_every_check_was_seen_to_fail(server):
    assert {check for check, _ in [*CHANGES, *GAUGES]} == set(checks.CHECKS)
