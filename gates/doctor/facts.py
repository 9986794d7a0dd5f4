"""Gather the facts: NVML, the system, the compiler, and what the serving Python says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gates.report.receipt import gpus as nvml_gpus

PROBE = Path(__file__).with_name("probe.py")
# A first use of FlashInfer's sampler compiles for minutes.
PROBE_S = 900.0


@dataclass
class Facts:
    """What was found. Bytes for memory; None where nothing says it.

    ``gpus`` have ``name``, ``capability``, ``memory_bytes``, ``free_bytes``. ``peers[a][b]`` is
    whether GPU ``a`` reaches the memory of ``b``. ``cuda_driver`` is the newest CUDA that the
    driver runs, as ``13000``. ``sampler`` has ``works``, ``seconds``, ``said``.
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
    probe_error: str = ""

    def record(self) -> dict[str, Any]:
        """As data."""
        return asdict(self)


def gather(python: str, try_sampler: bool) -> Facts:
    """The facts of this machine.

    Args:
        python: The interpreter that serves; torch, NCCL and the sampler are asked there.
        try_sampler: Whether FlashInfer's sampler is tried, which may compile for minutes.
    """
    memory = psutil.virtual_memory()
    facts = Facts(memory_bytes=memory.total, free_memory_bytes=memory.available, nvcc=nvcc())
    seen = nvml_gpus()
    facts.gpus, facts.gpu_error = seen["gpus"], seen.get("gpu_error", "")
    facts.driver, facts.cuda_driver = seen.get("driver"), seen.get("cuda_driver")
    told = probe(python, try_sampler)
    facts.python, facts.packages = told.get("python", ""), told.get("packages", {})
    facts.nccl, facts.peers = told.get("nccl"), told.get("peers", [])
    facts.sampler, facts.probe_error = told.get("sampler"), told.get("error", "")
    for gpu, other in zip(facts.gpus, told.get("gpus", []), strict=False):
        # GB10 has no memory of its own that NVML would say; CUDA says what can be had.
        if gpu["memory_bytes"] is None:
            gpu["memory_bytes"], gpu["free_bytes"] = other["memory_bytes"], other["free_bytes"]
    return facts


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
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=within_s
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"error": last[:300]}
