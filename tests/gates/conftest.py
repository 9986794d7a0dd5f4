"""A fake server, small gates, and a run of them in the test's folder."""

from __future__ import annotations

import asyncio
import io

import pytest
from rich.console import Console

from gates import client, server
from gates.plan import plan
from gates.progress import Display
from gates.runner import Runner
from gates.spec import Gate, Timeouts, load_profiles
from gates.store import RunFolder, now
from gates.toml import check
from tests.gates.fake_server import FakeServer


@pytest.fixture
def fake():
    """A fake server that answers well until a test says otherwise."""
    with FakeServer() as one:
        yield one


def gate(**changes):
    """A small gate of the load workload."""
    made = {
        "name": "small",
        "title": "Small",
        "why": "A test.",
        "workload": "load",
        "order": 1,
        "repeats": 2,
        "timeouts": {"first_token_s": 1.0, "stall_s": 1.0, "total_s": 5.0},
        "params": {
            "cases": [
                {
                    "prompt": "archive",
                    "prompt_tokens": 200,
                    "concurrency": [1, 2],
                    "max_tokens": 64,
                }
            ]
        },
        "columns": [{"head": "C", "figure": "concurrency", "unit": "int"}],
        "thresholds": [{"figure": "failures", "max": 0.0, "why": "none may fail"}],
    }
    return check(Gate, made | changes, "test")


class Run:
    """A run in a folder; it can be started again on the same folder."""

    def __init__(self, fake, path, gates, options=None, profile="2x-rtx-pro-6000"):
        self.fake, self.path, self.gates, self.options = fake, path, gates, options or {}
        self.profile = load_profiles()[profile]
        self.output = io.StringIO()

    def __call__(self):
        return asyncio.run(self._run())

    async def _run(self):
        async with client.http(self.fake.url) as http:
            target = await server.probe(http, self.fake.url, None)
            phases = plan(self.gates, "full", self.profile, target, self.options)
            if (self.path / "run.json").exists():
                folder = RunFolder.resume(self.path)
            else:
                folder = RunFolder.create(self.path, self._about(target, phases))
            display = Display(Console(file=self.output, force_terminal=False, width=200))
            guard = Timeouts(first_token_s=1.0, stall_s=1.0, total_s=2.0)
            try:
                with display:
                    await Runner(
                        *(http, target, folder, phases, self.profile, self.options, display),
                        guard=guard,
                        guard_wait_s=0.01,
                    ).run()
            finally:
                folder.close()
        return folder

    def _about(self, target, phases):
        return {
            "seed": "test",
            "started": now(),
            "size": "full",
            "variant": "",
            "profile": self.profile.model_dump(),
            "server": target.record(),
            "serve": [],
            "options": {},
            "machine": {"packages": {}, "gpus": []},
            "gates": [phase.gate.model_dump() for phase in phases],
            "order": {phase.gate.name: [row[0].key for row in phase.rows] for phase in phases},
        }


@pytest.fixture
def run(fake, tmp_path):
    """``run(gate, …)`` measures gates on the fake server and returns the run's folder."""

    def start(*gates, **kept):
        return Run(fake, tmp_path / "run", list(gates), **kept)()

    return start
