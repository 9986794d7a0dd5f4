"""The servers: one without a GPU, with a scripted worker, and one on the GPU at hand.

What the one on a GPU serves, and by which kernels, is said by variables (see tests/README.md).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.checkpoint.sizes import config_of
from tests.checkpoint.writer import write_checkpoint
from tests.serving.options import Serve, free_port, variables
from tests.serving.served import GRAMMARS, scripted, serving

# SERVING_…: the size of the checkpoint or the folder of one, and the form of the operations.
SIZE = os.environ.get("SERVING_SIZE", "small")
CHECKPOINT = os.environ.get("SERVING_CHECKPOINT")
PATH = os.environ.get("SERVING_PATH", "portable")
KERNELS = os.environ.get("SERVING_KERNELS", "all")
LOWERING = os.environ.get("SERVING_LOWERING", "sm120")
MEMORY = float(os.environ.get("SERVING_MEMORY", "0.6"))
KV_MEMORY = os.environ.get("SERVING_KV_MEMORY")

SCRIPTED = "scripted"
ON_A_GPU = pytest.param("gpu", marks=pytest.mark.gpu)


class Server:
    """A server that can be started, stopped and started again on its port."""

    def __init__(self, kind: str, folder: Path, tp: int = 1) -> None:
        self.kind, self.folder, self.tp = kind, folder, tp
        self.port = free_port()
        self.starts = 0
        self._running = None
        self.served = None

    def start(self):
        """Start it, unless it runs, and return what asks it."""
        if self.served is None:
            self.starts += 1
            log = self.folder / f"server-{self.kind}-{self.tp}-{self.starts}.log"
            self._running = serving(*self._how(), log=log, exact=self.kind == SCRIPTED)
            self.served = self._running.__enter__()
        return self.served

    def stop(self) -> None:
        """Stop it, unless it was stopped before."""
        if self._running is not None:
            self._running.__exit__(None, None, None)
        self._running = self.served = None

    def _how(self) -> tuple[Serve, dict[str, str]]:
        model = self.folder / f"checkpoint-{self.kind}"
        if self.kind == SCRIPTED:
            if not model.exists():
                # The folder of a real size, of which no weight is read.
                write_checkpoint(model, config_of("tiny", {"vocab_size": 1024}))
            serve, environment = scripted(model, self.port, self.tp)
            return serve, environment | variables("portable")
        if CHECKPOINT:
            model = Path(CHECKPOINT)
        elif not model.exists():
            write_checkpoint(model, config_of(SIZE), device="cuda" if SIZE == "wide" else "cpu")
        serve = Serve(
            model,
            self.port,
            tp=self.tp,
            max_num_seqs=16,
            memory=MEMORY,
            extra=(
                *("--structured-outputs-config", GRAMMARS),
                *(("--kv-cache-memory-bytes", KV_MEMORY) if KV_MEMORY else ()),
            ),
        )
        return serve, variables(PATH, KERNELS, LOWERING)


@pytest.fixture(scope="session", params=[SCRIPTED, ON_A_GPU])
def server(request, tmp_path_factory):
    """The server of one kind. ``test_restart.py`` kills it, last of all."""
    one = Server(request.param, tmp_path_factory.mktemp("serving"))
    try:
        yield one
    finally:
        one.stop()


@pytest.fixture
def served(server):
    """The running server."""
    return server.start()
