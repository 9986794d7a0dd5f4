"""A server's own requests: when they are sent, what they are, and what is said if they fail."""

from __future__ import annotations

import asyncio
import gc
import logging
import runpy
from types import SimpleNamespace

import pytest

ROUTES = ["/v1/completions", "/v1/chat/completions"]
STREAM = ['data: {"choices": []}\n\n', "data: [DONE]\n\n"]


@pytest.fixture
def warm_up(cuda, choose):
    """The module, where every operation is portable."""
    from vllm_sm12x.adapters import server_warm_up

    choose((12, 0), None)
    return server_warm_up


@pytest.fixture
def said(warm_up, caplog, monkeypatch):
    """What it logs: vLLM's loggers give nothing to the root's."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO)

    def lines(level: int) -> list[str]:
        mine = (one for one in caplog.records if one.name == warm_up.logger.name)
        return [one.getMessage() for one in mine if one.levelno == level]

    return lines


def server(model_type: str = "deepseek_v4", api_key: list[str] | None = None, **routes):
    """A server with vLLM's own lifespan, check of keys and state; ``seen`` has its requests.

    Args:
        routes: The answer's code and chunks where they are not those of a good one, by the last
            word of a route; an exception is raised instead.
    """
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    from vllm.entrypoints.openai.server_utils import AuthenticationMiddleware, lifespan

    app = FastAPI(lifespan=lifespan)
    app.state.args = SimpleNamespace(api_key=api_key)
    app.state.log_stats = False
    app.state.engine_client = object()
    app.state.vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type))
    )
    if api_key:
        app.add_middleware(AuthenticationMiddleware, tokens=api_key)
    seen = []

    async def answer(request):
        seen.append((request.url.path, await request.json()))
        name = "chat" if "chat" in request.url.path else "completions"
        code, chunks = routes.get(name, (200, STREAM))
        if isinstance(chunks, Exception):
            raise chunks
        if chunks is None:
            await asyncio.sleep(60)
        return StreamingResponse(iter(chunks), code)

    for route in ROUTES:
        app.add_route(route, answer, methods=["POST"])
    return app, seen


def start(app) -> None:
    """What uvicorn does before it takes connections, and after them."""

    async def run():
        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
        sent = []

        async def receive():
            return next(messages)

        async def send(message):
            sent.append(message["type"])

        await app({"type": "lifespan", "app": app, "state": {}}, receive, send)
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]

    asyncio.run(run())
    gc.unfreeze()  # the lifespan freezes what a server has at its start


def test_each_route_is_asked_once_before_the_start_is_complete(said):
    app, seen = server()
    start(app)
    assert [route for route, _ in seen] == ROUTES
    for _, body in seen:
        assert body["stream"] and body["ignore_eos"] and 1 < body["max_tokens"] < 32
    assert "prompt" in seen[0][1] and seen[1][1]["messages"][0]["role"] == "user"
    assert not said(logging.WARNING)
    (line,) = said(logging.INFO)
    assert line.startswith("Answered 2 of 2 requests of the server's own in ")


@pytest.mark.parametrize(
    ("capability", "override", "model_type", "setting"),
    [
        ((9, 0), None, "deepseek_v4", "auto"),
        ((12, 0), "none", "deepseek_v4", "auto"),
        ((12, 0), None, "llama", "auto"),
        ((12, 0), None, "deepseek_v4", "never"),
    ],
)
def test_nothing_is_sent(
    warm_up, said, choose, monkeypatch, capability, override, model_type, setting
):
    choose(capability, override)
    monkeypatch.setattr(warm_up, "SETTING", setting)
    app, seen = server(model_type)
    start(app)
    assert not seen and not said(logging.INFO) and not said(logging.WARNING)


@pytest.mark.parametrize("absent", ["engine_client", "vllm_config"])
def test_a_server_without_an_engine_is_not_asked(warm_up, absent):
    app, seen = server()
    delattr(app.state, absent)
    start(app)
    assert not seen


def test_a_key_is_sent_where_one_is_wanted(said):
    app, seen = server(api_key=["first", "second"])
    start(app)
    assert len(seen) == 2 and not said(logging.WARNING)


def test_the_key_of_the_environment_is_sent(said, monkeypatch):
    app, seen = server(api_key=["theirs"])
    app.state.args.api_key = None
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    start(app)
    assert len(seen) == 2 and not said(logging.WARNING)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ((400, ['{"error": "no chat template"}']), 'HTTP 400 {"error": "no chat template"}'),
        ((200, RuntimeError("broken")), "HTTP 500 Internal Server Error"),
        ((200, ['data: {"error": "x"}\n\n', "data: [DONE]\n\n"]), '{"error": "x"}'),
        ((200, STREAM[:1]), 'the stream has no end: data: {"choices": []}'),
        ((200, []), "the stream has no end: "),
        ((200, None), "no answer in 0.3 s"),
    ],
    ids=["refused", "raises", "error in the stream", "no end", "empty", "hangs"],
)
def test_a_fault_is_a_warning_and_the_start_goes_on(warm_up, said, monkeypatch, answer, fault):
    monkeypatch.setattr(warm_up, "ANSWER_S", 0.3)
    app, seen = server(chat=answer)
    start(app)
    assert len(seen) == 2
    (warning,) = said(logging.WARNING)
    expected = f"The server's own request to /v1/chat/completions failed: {fault}"
    assert warning.strip() == expected.strip()
    (line,) = said(logging.INFO)
    assert line.startswith("Answered 1 of 2 ")


def test_settings(warm_up, monkeypatch):
    """Read at the import, so that a wrong word ends the start at once."""

    def read(word: str) -> str:
        monkeypatch.setenv("SM12X_SERVER_WARM_UP", word)
        return runpy.run_path(warm_up.__file__)["SETTING"]

    assert [read(word) for word in ("", " never ", "auto")] == ["auto", "never", "auto"]
    with pytest.raises(ValueError, match=r"SM12X_SERVER_WARM_UP='no' .* allowed: auto, never"):
        read("no")
