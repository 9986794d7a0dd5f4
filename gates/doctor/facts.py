"""Gather the facts: NVML, the system, the compiler, and what the serving Python says."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gates.report.receipt import gpus as nvml_gpus

PROBE = Path(__file__).with_name("probe.py")
PROBE_S = 120.0
# A first use of FlashInfer's sampler compiles for minutes.
SAMPLER_S = 600.0


@dataclass
class Facts:
    """What was found. Bytes for memory; None where nothing says it.

    ``gpus`` have ``name``, ``capability``, ``memory_bytes``, ``free_bytes``. ``peers[a][b]`` is
    whether GPU ``a`` reaches the memory of ``b``. ``cuda_driver`` is the newest CUDA that the
    driver runs, as ``13000``. ``sampler`` has ``works``, ``seconds``, ``said``; where it is None,
    ``sampler_untried`` says why.
    """

    gpus: list[dict[str, Any]] = field(default_factory=list)
    gpu_error: str = ""
    driver: str | None = None
    cuda_driver: int | None = None
    memory_bytes: int = 0
    free_memory_bytes: int = 0
    nvcc: str | None = None
    python: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    nccl: str | None = None
    peers: list[list[bool]] = field(default_factory=list)
    sampler: dict[str, Any] | None = None
    sampler_untried: str = ""
    probe_error: str = ""

    def record(self) -> dict[str, Any]:
        """As data."""
        return asdict(self)


def gather(python: str | None, try_sampler: bool, sampler_s: float = SAMPLER_S) -> Facts:
    """The facts of this machine.

    Args:
        python: The interpreter that serves; torch, NCCL and the sampler are asked there. None
            where it is not known.
        try_sampler: Whether FlashInfer's sampler is tried, which may compile for minutes.
        sampler_s: When that is given up, in seconds.
    """
    memory = psutil.virtual_memory()
    facts = Facts(memory_bytes=memory.total, free_memory_bytes=memory.available, nvcc=nvcc())
    seen = nvml_gpus()
    facts.gpus, facts.gpu_error = seen["gpus"], seen.get("gpu_error", "")
    facts.driver, facts.cuda_driver = seen.get("driver"), seen.get("cuda_driver")
    told = probe(python, False) if python else {"error": "the Python that serves is not known"}
    facts.python, facts.packages = told.get("python", ""), told.get("packages", {})
    facts.nccl, facts.peers = told.get("nccl"), told.get("peers", [])
    facts.probe_error = told.get("error", "")
    facts.sampler, facts.sampler_untried = _sampler(python, told, try_sampler, sampler_s)
    for gpu, other in zip(facts.gpus, told.get("gpus", []), strict=False):
        # GB10 has no memory of its own that NVML would say; CUDA says what can be had.
        if gpu["memory_bytes"] is None:
            gpu["memory_bytes"], gpu["free_bytes"] = other["memory_bytes"], other["free_bytes"]
    return facts


def _sampler(
    python: str | None, told: dict[str, Any], wanted: bool, within_s: float
) -> tuple[dict[str, Any] | None, str]:
    """What came of trying the sampler, or else why it was not tried."""
    if not wanted:
        return None, "left out"
    if python is None or not told.get("gpus"):
        return None, "the Python that serves sees no CUDA GPU"
    # A process of its own: one that compiles for too long takes no other fact with it.
    tried = probe(python, True, within_s)
    return tried.get("sampler"), tried.get("error") or "the probe said nothing of it"


def nvcc() -> str | None:
    """The release of the CUDA compiler on the path, or None."""
    path = shutil.which("nvcc")
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release ([\d.]+)", done.stdout)
    return release[1] if release else None


def probe(python: str, try_sampler: bool, within_s: float = PROBE_S) -> dict[str, Any]:
    """What the serving Python says; ``error`` where it says nothing."""
    command = [python, str(PROBE), *(["sampler"] if try_sampler else [])]
    try:
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                out, errors = process.communicate(timeout=within_s)
            except BaseException:
                # The compilers that it started are of its group.
                os.killpg(process.pid, signal.SIGKILL)
                raise
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {within_s:g} s"}
    except OSError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    try:
        return json.loads(out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        return {"error": last[:300]}
