"""Requests that a server of DeepSeek V4 sends itself before it answers others.

What is compiled is compiled by then (``warm_up``), yet a first request finds other things undone:
modules that the server and the engine import when they are needed, routes and validators that
FastAPI and pydantic build, the tokenizer's tables. Two short requests, one to each of the two usual
routes, go through all of it: through the server's own middlewares, without a socket, while it
starts.

They are requests like others: the server's counters count them, and a log of requests has them.
The environment variable ``SM12X_SERVER_WARM_UP`` says whether they are sent: ``auto`` (the default)
or ``never``. Nothing is sent where no operation is portable, and for other models.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.logger import init_logger

from vllm_sm12x import settings
from vllm_sm12x.adapters.mtp import is_portable_deepseek_v4

if TYPE_CHECKING:
    from fastapi import FastAPI

ENV = "SM12X_SERVER_WARM_UP"
SETTINGS = ("auto", "never")

# Some steps of decoding after the prompt's, with up to three drafts each.
TOKENS = 16
TEXT = "What is the capital of France?"
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": TEXT},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": TEXT}]},
}
# Longer than a start may wait for an answer of a few tokens.
ANSWER_S = 60.0

# vLLM's handlers stand on the logger "vllm", which "vllm_sm12x" does not belong to.
logger = init_logger("vllm.sm12x.server_warm_up")


# Read when the server's modules are imported: a wrong word ends the start before the model loads.
SETTING = settings.choice(ENV, os.environ.get(ENV, "auto"), SETTINGS)


async def warm_up_server(app: FastAPI) -> None:
    """Send the server its own requests, and say in the log how that went.

    A request that is refused or not answered in :data:`ANSWER_S` is a warning, and the start goes
    on: a model without a chat template has one route of the two.

    Args:
        app: vLLM's server, its state set and its lifespan begun.
    """
    if SETTING == "never" or not _applies(app):
        return
    start = time.perf_counter()
    faults = {route: await _fault(app, route, body) for route, body in REQUESTS.items()}
    for route, fault in faults.items():
        if fault is not None:
            logger.warning("The server's own request to %s failed: %s", route, fault)
    logger.info(
        "Answered %d of %d requests of the server's own in %.2f s",
        list(faults.values()).count(None),
        len(faults),
        time.perf_counter() - start,
    )


def _applies(app: FastAPI) -> bool:
    # A server that only renders prompts has no engine.
    config = getattr(app.state, "vllm_config", None)
    engine = getattr(app.state, "engine_client", None)
    return config is not None and engine is not None and is_portable_deepseek_v4(config)


async def _fault(app: FastAPI, route: str, body: dict[str, Any]) -> str | None:
    """What was wrong with the answer to one request; ``None`` if nothing was."""
    import httpx

    # As the server's own check: the option wins over the variable.
    keys = [key for key in (app.state.args.api_key or [envs.VLLM_API_KEY]) if key]
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    sent = body | {"stream": True, "max_tokens": TOKENS, "ignore_eos": True}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        try:
            answer = await asyncio.wait_for(
                client.post(route, json=sent, headers=headers), ANSWER_S
            )
        except asyncio.TimeoutError:
            return f"no answer in {ANSWER_S:g} s"
    if not answer.is_success:
        return f"HTTP {answer.status_code} {answer.text}"
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    if not events or events[-1] != "[DONE]":
        return f"the stream has no end: {answer.text[-500:]}"
    errors = [event for event in events[:-1] if "error" in json.loads(event)]
    return errors[0] if errors else None
