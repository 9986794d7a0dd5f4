"""What a vLLM server's log says: its start, its graphs, its errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# Words that no healthy log has, by what they are counted as.
ERRORS = {
    "traceback": re.compile(r"Traceback \(most recent call last\)"),
    "cuda": re.compile(r"CUDA error|cudaError|illegal memory access|device-side assert"),
    "out_of_memory": re.compile(r"OutOfMemoryError|out of memory"),
    "nccl": re.compile(r"NCCL (?:error|WARN)|ProcessGroupNCCL.*(?:timeout|Watchdog)", re.I),
    "engine_dead": re.compile(r"EngineDeadError|EngineCore (?:died|encountered a fatal error)"),
    "nan": re.compile(r"\bNaNs? (?:in|found|detected)", re.I),
}
_GRAPHS = re.compile(r"Capturing CUDA graphs \(.*?(PIECEWISE|FULL)\):\s+100%\S*\s+(\d+)/\2\b")


def text(path: str | Path) -> str:
    """A log, with progress bars (carriage returns) as lines of their own.

    Raises:
        OSError: It cannot be read.
    """
    return Path(path).read_text(encoding="utf-8", errors="replace").replace("\r", "\n")


def startup(path: str | Path) -> dict[str, Any]:
    """What the log says of the last start in it; left out where it says nothing.

    Returns:
        ``init_s`` and ``graph_s`` in seconds, the number of graphs of each kind,
        ``kv_cache_tokens``, and ``log_errors``, all errors so far.
    """
    said = text(path)
    found: dict[str, Any] = {"log_errors": sum(errors(said).values())}
    for name, pattern, kind in (
        ("init_s", r"init engine \(.*?\) took ([\d.]+) s", float),
        ("graph_s", r"Graph capturing finished in ([\d.]+) secs", float),
        ("kv_cache_tokens", r"GPU KV cache size: ([\d,]+) tokens", _whole),
    ):
        if values := re.findall(pattern, said):
            found[name] = kind(values[-1])
    for mode, count in _GRAPHS.findall(said):
        found[f"graphs_{mode.lower()}"] = int(count)
    return found


def _whole(number: str) -> int:
    return int(number.replace(",", ""))


def errors(said: str) -> dict[str, int]:
    """How many lines of a log hold each kind of error."""
    lines = said.splitlines()
    return {
        name: sum(bool(pattern.search(line)) for line in lines) for name, pattern in ERRORS.items()
    }
