"""What a server is and can do: model, lengths, tokenizer, metrics. Asked once, before a run."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from stack.errors import StackError

PROBE_S = 30.0
TOKENIZE_S = 120.0
Message = dict[str, Any]
# Each metric's value, the labels added up; `vllm:` and `_total` left off.
Metrics = dict[str, float]


@dataclass
class Server:
    """One OpenAI-compatible server; None stands for what it does not say.

    Only vLLM says a ``version``: request fields of its own are sent to a server that has one.
    ``answered_before`` is the number of requests since its start.
    """

    url: str
    model: str
    max_model_len: int | None = None
    version: str | None = None
    has_tokenize: bool = False
    has_metrics: bool = False
    prefix_cache: bool | None = None
    speculation: bool | None = None
    answered_before: int | None = None

    def record(self) -> dict[str, Any]:
        """As the run keeps it."""
        return asdict(self)


async def probe(client: httpx.AsyncClient, url: str, model: str | None) -> Server:
    """Ask a server what it is. Nothing is generated.

    Raises:
        StackError: It does not answer, has no model, or not the one that was asked for.
    """
    try:
        reply = await client.get("/v1/models", timeout=PROBE_S)
        reply.raise_for_status()
        models = [entry for entry in reply.json()["data"] if entry.get("id")]
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StackError(
            f"{url}/v1/models gave no list of models: {type(error).__name__} {error}".rstrip(),
            "start the server, or name it with --url",
        ) from error
    names = [entry["id"] for entry in models]
    # Some servers list no local model; then the name that was asked for is taken as it is.
    if not (names or model) or (names and model is not None and model not in names):
        raise StackError(
            f"the server at {url} has no model {model or ''}".rstrip(),
            f"it has: {', '.join(names) or 'none'}",
        )
    entry = models[names.index(model) if model else 0] if names else {"id": model}
    server = Server(url, entry["id"], max_model_len=entry.get("max_model_len"))
    server.version = await _version(client)
    server.has_tokenize = await count_tokens(client, server, [_user("a")]) is not None
    metrics = await read_metrics(client)
    server.has_metrics = metrics is not None
    if metrics is not None:
        server.answered_before = int(metrics.get("request_success", 0))
        server.speculation = "spec_decode_num_drafts" in metrics
    server.prefix_cache = await _prefix_cache(client)
    return server


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


async def _version(client: httpx.AsyncClient) -> str | None:
    """vLLM's ``/version``; other servers have none."""
    try:
        reply = await client.get("/version", timeout=PROBE_S)
        return str(reply.json()["version"]) if reply.is_success else None
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


async def healthy(client: httpx.AsyncClient) -> bool:
    """Whether ``/health`` or, where there is none, ``/v1/models`` answers well."""
    for path in ("/health", "/v1/models"):
        try:
            reply = await client.get(path, timeout=PROBE_S)
        except httpx.HTTPError:
            return False
        if reply.status_code != httpx.codes.NOT_FOUND:
            return reply.is_success
    return False


async def count_tokens(
    client: httpx.AsyncClient, server: Server, messages: list[Message], **template: Any
) -> int | None:
    """The prompt's length with the chat template by ``/tokenize``, or None where that fails.

    Args:
        client: From `gates.client.http`.
        server: Its model's name is sent.
        messages: As in the request.
        template: ``chat_template_kwargs``.
    """
    body: dict[str, Any] = {"model": server.model, "messages": messages}
    if template:
        body["chat_template_kwargs"] = template
    try:
        reply = await client.post("/tokenize", json=body, timeout=TOKENIZE_S)
        count = reply.json()["count"] if reply.is_success else None
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    return count if isinstance(count, int) and count > 0 else None


async def read_metrics(client: httpx.AsyncClient) -> Metrics | None:
    """The counters and gauges of ``/metrics``, or None where there are none to read."""
    text = await _metrics_text(client)
    if text is None:
        return None
    values: Metrics = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.endswith(("_bucket", "_created")):
                    continue
                name = sample.name.removeprefix("vllm:").removesuffix("_total")
                if "position" in sample.labels:
                    name = f"{name}.{sample.labels['position']}"
                elif name.startswith("http_requests") and "status" in sample.labels:
                    name = f"http_{sample.labels['status']}"
                elif name == "request_success" and "finished_reason" in sample.labels:
                    reason = f"{name}.{sample.labels['finished_reason']}"
                    values[reason] = values.get(reason, 0.0) + sample.value
                if isfinite(sample.value):
                    values[name] = values.get(name, 0.0) + sample.value
    except ValueError:
        return None
    return values


async def _metrics_text(client: httpx.AsyncClient) -> str | None:
    try:
        reply = await client.get("/metrics", timeout=PROBE_S)
    except httpx.HTTPError:
        return None
    return reply.text if reply.is_success else None


async def _prefix_cache(client: httpx.AsyncClient) -> bool | None:
    """Whether the prefix cache is on, by the labels of vLLM's ``cache_config_info``."""
    text = await _metrics_text(client) or ""
    label = re.search(
        r'^vllm:cache_config_info\{.*enable_prefix_caching="(True|False)"', text, re.M
    )
    return label[1] == "True" if label else None


def acceptance(before: Metrics | None, after: Metrics | None) -> dict[str, Any]:
    """Drafting between two readings: the share of drafted tokens that was taken, and the length.

    The length is the tokens a step yields: one, and those accepted of its draft. Empty where
    nothing was drafted.
    """
    if before is None or after is None:
        return {}

    def grew(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    drafts, drafted = grew("spec_decode_num_drafts"), grew("spec_decode_num_draft_tokens")
    accepted = grew("spec_decode_num_accepted_tokens")
    if drafts <= 0 or drafted <= 0:
        return {}
    prefix = "spec_decode_num_accepted_tokens_per_pos."
    positions = sorted(name for name in after if name.startswith(prefix))
    return {
        "acceptance": accepted / drafted,
        "acceptance_length": 1 + accepted / drafts,
        "acceptance_by_position": [grew(name) / drafts for name in positions],
    }
