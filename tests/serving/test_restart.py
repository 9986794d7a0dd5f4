"""Processes that are killed, and servers that start again on the same port."""

from __future__ import annotations

import re
import signal
import time

import httpx
import openai
import pytest

from tests.serving.checks import LONG, ask
from tests.serving.conftest import SCRIPTED, Server
from tests.serving.served import END_S, port_is_free, within

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
# Words of a log that say that the engine is gone.
GONE = re.compile(r"EngineDeadError|EngineCore.*(?:died|fatal)|[Ww]orker.*died", re.S)


def kill_midway(server, title):
    """Kill a process of the server with signal 9 while it answers; what became of both ends."""
    served = server.start()
    everything = served.processes()
    patient = served.client.with_options(timeout=END_S)
    stream = patient.chat.completions.create(
        model=served.model,
        messages=[{"role": "user", "content": "Go on and on."}],
        max_tokens=LONG,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    chunks = iter(stream)
    for _ in range(3):
        next(chunks)
    served.process(title).send_signal(signal.SIGKILL)
    began = time.monotonic()
    # The client is told; a stream that ended like a good one would be no error here.
    with pytest.raises((openai.APIError, httpx.HTTPError)) as told:
        for _ in range(LONG):
            next(chunks)
    client_s = time.monotonic() - began
    ended = within(END_S, lambda: not any(_alive(one) for one in everything))
    alive = [one for one in everything if _alive(one)]
    return served, told.value, client_s, ended, alive


def _alive(process):
    return process.is_running() and process.status() != "zombie"


def check_end(server, title):
    served, told, client_s, ended, alive = kill_midway(server, title)
    assert client_s < END_S, f"the client waited {client_s:.0f} s"
    assert not isinstance(told, (openai.APITimeoutError, httpx.TimeoutException)), told
    assert ended, f"after {END_S:g} s these still ran: {alive}"
    assert GONE.search(served.said()), "the log does not say what happened"
    assert within(5.0, lambda: port_is_free(server.port)), "the port is still taken"
    server.stop()


def test_a_killed_engine_ends_the_server(server):
    server.start()
    check_end(server, "EngineCore")


def test_it_starts_again_on_the_same_port_and_stops_when_asked(server):
    server.stop()
    served = server.start()
    assert ask(served, "Back again?").usage.completion_tokens > 0
    everything = served.processes()
    began = time.monotonic()
    everything[0].send_signal(signal.SIGTERM)
    assert within(30.0, lambda: not any(_alive(one) for one in everything)), "it goes on"
    assert time.monotonic() - began < 30.0
    assert within(5.0, lambda: port_is_free(server.port))
    server.stop()


@pytest.fixture(scope="module")
def pair(server, tmp_path_factory):
    """A server over two ranks."""
    if server.kind != SCRIPTED:
        import torch

        if torch.cuda.device_count() < 2:
            pytest.skip("TP=2 needs two GPUs, and there is one")
    server.stop()
    one = Server(server.kind, server.folder, tp=2)
    try:
        yield one
    finally:
        one.stop()


def test_two_ranks_answer(pair):
    served = pair.start()
    assert ask(served, "Both there?").usage.completion_tokens > 0


def test_a_killed_worker_ends_the_server(pair):
    check_end(pair, "Worker_TP1")
