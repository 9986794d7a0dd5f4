"""How the benchmarks measure, and what a line of their results holds.

Candidates are captured in CUDA graphs and replayed in turn, so that they see the same machine in
the same minute and launch gaps of Python do not count. A graph goes through several input sets;
where these are larger than the L2 cache, what is timed reads from device memory.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from vllm_sm12x import lowering

Call = Callable[[], object]

LOWERINGS = ("native", "sm120")


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the median over the replays, and the 10th and 90th percentile."""

    us: float
    us_p10: float
    us_p90: float

    def times(self, calls: int) -> Timing:
        """Of that many calls in a row."""
        return Timing(self.us * calls, self.us_p10 * calls, self.us_p90 * calls)


@dataclass(frozen=True)
class Roofs:
    """What this GPU reached today: a device copy (bytes read and written) and a bf16 matmul."""

    copy_gbps: float
    matmul_tflops: float


def compare(
    candidates: Mapping[str, Sequence[Call]],
    *,
    repeats: int = 15,
    graph_us: float = 1500.0,
) -> dict[str, Timing]:
    """Time candidates against each other, their replays taking turns.

    Args:
        candidates: Name -> calls, one for each input set. A candidate's calls are captured in
            order, repeated until the graph takes about ``graph_us``.
        repeats: Timed replays of each graph.
        graph_us: Microseconds that one graph should take at least.

    Raises:
        Whatever a call raises before it is captured.
    """
    graphs = {}
    for name, calls in candidates.items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls:  # compiles, and fills caches of the host
                call()
            stream.synchronize()
            once = _elapsed_us(lambda calls=calls: [call() for call in calls], stream)
        rounds = max(1, min(64, round(graph_us / max(once, 1.0))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        graphs[name] = (graph, rounds * len(calls))
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(repeats + 2):
        for name, (graph, count) in graphs.items():
            us = _elapsed_us(graph.replay) / count
            if turn >= 2:  # warm clocks and caches
                samples[name].append(us)
    return {name: _timing(values) for name, values in samples.items()}


def time_calls(calls: Sequence[Call], **options) -> Timing:
    """As :func:`compare`, for one candidate."""
    return compare({"": calls}, **options)[""]


@functools.cache
def roofs() -> Roofs:
    """Measured once a process: a copy of 2 GiB, and an 8192-cubed bf16 matmul of the library.

    The copy is launched, not replayed: a graph hands it to a copy engine, which on an H200 moves
    2.8 TB/s where the kernel moves 4.3.
    """
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copied = _timing([_elapsed_us(functools.partial(target.copy_, source)) for _ in range(7)][2:])
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    multiplied = time_calls([functools.partial(torch.mm, a, b, out=c)], repeats=5)
    return Roofs(2 * 4 * 2**29 / copied.us / 1e3, 2 * 8192**3 / multiplied.us / 1e6)


@contextlib.contextmanager
def use_lowering(name: str) -> Iterator[None]:
    """Compile what is launched inside by this lowering: ``"native"`` or ``"sm120"``."""
    before = os.environ.get(lowering.ENV)
    os.environ[lowering.ENV] = name
    lowering.clear_cache()
    try:
        yield
    finally:
        if before is None:
            del os.environ[lowering.ENV]
        else:
            os.environ[lowering.ENV] = before
        lowering.clear_cache()


def rate(timing: Timing, *, flops: float = 0.0, nbytes: float = 0.0) -> dict[str, float]:
    """``us`` and its spread, and where given TFLOP/s, GB/s and the larger share of the two roofs.

    Args:
        flops: Operations that the definition asks for.
        nbytes: Bytes that must cross device memory: each input read once, each output written once.
    """
    figures = {
        "us": round(timing.us, 2),
        "us_p10": round(timing.us_p10, 2),
        "us_p90": round(timing.us_p90, 2),
    }
    shares = []
    if flops:
        figures["tflops"] = round(flops / timing.us / 1e6, 1)
        shares.append(flops / timing.us / 1e6 / roofs().matmul_tflops)
    if nbytes:
        figures["gbps"] = round(nbytes / timing.us / 1e3, 1)
        shares.append(nbytes / timing.us / 1e3 / roofs().copy_gbps)
    if shares:
        figures["share_of_roof"] = round(max(shares), 3)
    return figures


class Report:
    """Prints results as rows the moment they are there, and appends them to a JSON-lines file."""

    def __init__(self, arguments: argparse.Namespace, gpu: str | None = None) -> None:
        """``gpu`` is named as the machine; by default the current one."""
        self._out: Path | None = arguments.out
        self._about = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "commit": arguments.commit or _commit(),
            "machine": _machine(gpu),
            "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
        }
        self._widths: dict[str, int] = {}

    def rows(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Rows with the same columns; the columns' names are printed where they are other ones."""
        cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
        widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in cells[0]}
        if list(widths) == list(self._widths) and all(
            width <= self._widths[name] for name, width in widths.items()
        ):
            widths = self._widths
        else:
            self._widths = widths
            print("\n" + "  ".join(f"{name:>{width}}" for name, width in widths.items()))
        for row in cells:
            print("  ".join(f"{row[name]:>{width}}" for name, width in widths.items()), flush=True)
        if self._out is not None:
            with self._out.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps({**self._about, **row}) + "\n" for row in rows)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that every benchmark has: ``--lowering``, ``--out`` and ``--commit``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lowering",
        action="append",
        choices=LOWERINGS,
        help="compile our kernels by this lowering; may be repeated (default: both)",
    )
    parser.add_argument("--out", type=Path, help="append the results to this file, as JSON lines")
    parser.add_argument("--commit", help="say that this commit was measured (default: git's HEAD)")
    return parser


def _elapsed_us(call: Call, stream: torch.cuda.Stream | None = None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _timing(values: list[float]) -> Timing:
    tenths = statistics.quantiles(values, n=10) if len(values) > 1 else values * 9
    return Timing(statistics.median(values), tenths[0], tenths[-1])


def _commit() -> str:
    """Git's HEAD, with ``-dirty`` where the tree differs from it; ``unknown`` without git."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _machine(gpu: str | None) -> str:
    gpu = gpu or torch.cuda.get_device_name()
    return f"{gpu}, torch {torch.__version__}, triton {triton.__version__}"


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).name


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
