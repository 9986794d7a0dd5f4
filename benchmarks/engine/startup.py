"""Where the time of a start goes: the server's log and the log of Triton's compilations."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# What a server is told, so that each line of its log begins with seconds since the epoch.
LOG_VARIABLES = {"VLLM_LOGGING_PREFIX": "%(created).3f ", "NO_COLOR": "1"}
_LINE = re.compile(r"^(?:\([^)]*\) )?(?P<at>\d{10}\.\d{3}) [A-Z]+ ")

# A stage ends at the last line that holds its words. vLLM 0.22.1's own words, in its order.
MARKS = (
    ("server: imports, arguments", "non-default args:"),
    ("server: the model's classes", "Resolved architecture:"),
    ("configuration; engine: process, imports", "Initializing a V1 LLM engine"),
    ("workers: processes, device, layers", "Starting to load model"),
    ("weights", "Model loading took"),
    ("torch.compile", "torch.compile took"),
    ("first run, memory", "Available KV cache memory:"),
    ("KV cache", "GPU KV cache size:"),
    ("warm-up, CUDA graphs", "Graph capturing finished"),
    ("sampler, the rest of the engine", "init engine (profile"),
)
READY = "server: until it answers"

# Of which, as the log says it itself.
DETAILS = {
    "torch_compile_s": r"torch\.compile took ([\d.]+) s",
    "dynamo_s": r"Dynamo bytecode transform time: ([\d.]+) s",
    "graphs_s": r"Graph capturing finished in ([\d.]+) secs",
    "init_engine_s": r"init engine \(.*?\) took ([\d.]+) s",
    "kv_cache_tokens": r"GPU KV cache size: ([\d,]+) tokens",
    # By processes of their own, whose compilations are in no other figure.
    "compiled_ahead": r"Compiled (\d+) of \d+ kernels ahead",
}

# What each toolchain leaves in its cache for one compiled kernel.
KERNELS = {
    "triton": "*.cubin",
    "deep_gemm": "*.cubin",
    "tilelang": "*.so",
    "flashinfer": "*.so",
}


@dataclass(frozen=True)
class Stage:
    """A part of a start: its seconds, and what Triton compiled in it."""

    stage: str
    s: float
    compiled: int = 0
    compiling_s: float = 0.0


def variables_of(caches: Path) -> dict[str, str]:
    """Every cache that serving compiles into, under one folder. A new folder is a cold start."""
    return {
        "XDG_CACHE_HOME": str(caches / "xdg"),
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "DG_JIT_CACHE_DIR": str(caches / "deep_gemm"),
        "TILELANG_CACHE_DIR": str(caches / "tilelang"),
        "FLASHINFER_WORKSPACE_BASE": str(caches / "flashinfer"),
        "CUTE_DSL_CACHE_DIR": str(caches / "cute_dsl"),
        # The driver's own cache of PTX that it compiled.
        "CUDA_CACHE_PATH": str(caches / "driver"),
    }


def is_cold(caches: Path) -> bool:
    """Whether nothing was ever compiled into these caches: there is no file."""
    return not any(path.is_file() for path in caches.rglob("*"))


def make(caches: Path) -> dict[str, str]:
    """Make the folder of each cache, and return the variables that name them."""
    found = variables_of(caches.absolute())
    for folder in found.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    return found


def contents(caches: Path) -> dict[str, dict[str, int]]:
    """By cache: how many files, bytes, and kernels where their files can be told apart."""
    found = {}
    for folder in sorted(path for path in caches.iterdir() if path.is_dir()):
        files = [path for path in folder.rglob("*") if path.is_file()]
        found[folder.name] = {
            "files": len(files),
            "bytes": sum(path.stat().st_size for path in files),
        }
        if pattern := KERNELS.get(folder.name):
            found[folder.name]["kernels"] = sum(path.match(pattern) for path in files)
    return found


def stages(
    log: str, spawned: float, ready: float, compiled: Sequence[dict[str, Any]] = ()
) -> list[Stage]:
    """The stages of one start, in order; they add up to ``ready - spawned``.

    A stage whose line the log lacks is part of the next one.

    Args:
        log: The server's log since ``spawned``.
        spawned: When the process was started, in seconds since the epoch.
        ready: When it answered.
        compiled: From :func:`compilations`.
    """
    ends: dict[str, float] = {}
    for line in log.splitlines():
        stamp = _LINE.match(line)
        if stamp is None or not spawned <= float(stamp["at"]) <= ready:
            continue
        for stage, words in MARKS:
            if words in line:
                ends[stage] = float(stamp["at"])
    found = []
    begin = spawned
    for stage, end in [*((stage, ends.get(stage)) for stage, _ in MARKS), (READY, ready)]:
        if end is None or end < begin:
            continue
        inside = [one for one in compiled if begin < one["at"] <= end]
        compiling = sum(one["s"] for one in inside)
        found.append(Stage(stage, round(end - begin, 3), len(inside), round(compiling, 3)))
        begin = end
    return found


def details(log: str) -> dict[str, float]:
    """What the log says of its parts, by the last line that says it."""
    found = {}
    for name, pattern in DETAILS.items():
        if values := re.findall(pattern, log):
            found[name] = float(values[-1].replace(",", ""))
    return found


def compilations(path: Path) -> list[dict[str, Any]]:
    """What ``server_plugin`` wrote: ``at``, ``kernel``, ``s`` a line; a torn line is left out."""
    found = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                one = json.loads(line)
            except ValueError:
                continue
            found.append({"at": float(one["at"]), "kernel": one["kernel"], "s": float(one["s"])})
    return found


def record(found: Sequence[Stage]) -> list[dict[str, Any]]:
    """As a row keeps them."""
    return [asdict(stage) for stage in found]
