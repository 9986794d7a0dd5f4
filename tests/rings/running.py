"""Run one part in its environment and count what came of it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.rings.environment import CHECK_ENV, GATES_ENV, ROOT, TEST_ENV
from tests.rings.outcomes import FAILED, PASSED, SKIPPED, ended, read
from tests.rings.parts import Part
from tests.rings.report import Result, judged

OUTCOMES = ROOT / ".build" / "outcomes"
# Variables that change what is tested; a developer's shell must not.
DROPPED = ("SM12X_PORTABLE", "VLLM_", "TRITON_", "HF_", "PYTEST_", "PYTHONPATH", "PYTHONHOME")
MOST_WORKERS = 8
# pytest's exit status when the selection is empty.
NO_TESTS = 5


@dataclass(frozen=True)
class Selection:
    """What a developer narrowed the run to: pytest's ``-k`` and ``-m``, and further arguments.

    ``python`` is the interpreter of an environment with a wheel to test, in place of test-env's.
    """

    keyword: str = ""
    mark: str = ""
    extra: tuple[str, ...] = ()
    python: Path = TEST_ENV / "bin" / "python"

    @property
    def narrowed(self) -> bool:
        """Whether a part may rightly come out empty."""
        return bool(self.keyword or self.mark or self.extra)

    @property
    def arguments(self) -> list[str]:
        """As pytest takes them."""
        keyword = ["-k", self.keyword] if self.keyword else []
        mark = ["-m", self.mark] if self.mark else []
        return [*keyword, *mark, *self.extra]


def run_part(
    part: Part, selection: Selection, log: Path | None, gpu: bool = False
) -> Result | None:
    """Run one part, its output to ``log`` or to the terminal, and return its result.

    Returns ``None`` where the selection leaves nothing of it to run.
    """
    OUTCOMES.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    if part.kind == "lint":
        result, status = _lint(part, log)
    elif part.kind == "suite":
        result, status = _suite(part, log)
    else:
        result, status = _pytest(part, selection, log, gpu)
        if status == NO_TESTS and selection.narrowed:
            return None
    seconds = time.monotonic() - started
    return judged(replace(result, seconds=seconds), status)


def environment_of(part: Part, gpu: bool) -> dict[str, str]:
    """The variables under which a part means the same on every machine."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(DROPPED)}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    if part.kind == "wheel":
        env["TEST_INSTALLED_WHEEL"] = "1"
        env["HF_HUB_OFFLINE"] = "1"
        env["VLLM_NO_USAGE_STATS"] = "1"
    if not gpu:
        # Ring 0 means the same on a machine that has a GPU.
        env["CUDA_VISIBLE_DEVICES"] = ""
        # Parts run beside each other. PyTorch's threads spin while they wait for one another, and
        # where each part has one for every core, they do little else.
        env["OMP_NUM_THREADS"] = "1"
    return env


def _pytest(part: Part, selection: Selection, log: Path | None, gpu: bool) -> tuple[Result, int]:
    python = selection.python
    if part.kind != "wheel":
        python = (GATES_ENV if part.kind == "gates" else CHECK_ENV) / "bin" / "python"
    report = OUTCOMES / f"{part.name}.jsonl"
    report.unlink(missing_ok=True)
    command = [
        *(str(python), "-m", "pytest", f"tests/{part.name}", f"--report-log={report}"),
        *("-p", "no:cacheprovider", "--durations=5"),
        *(_workers() if part.spread and not gpu else ()),
        *selection.arguments,
    ]
    status = call(command, log, environment_of(part, gpu))
    outcomes = read(report).values() if report.exists() else ()
    counts = Counter(outcome.result for outcome in outcomes)
    problem = "" if ended(report) else f"pytest did not come to its end (exit status {status})"
    result = Result(part.name, counts[PASSED], counts[FAILED], counts[SKIPPED], problem=problem)
    return result, status


def _workers() -> list[str]:
    """So that pytest-xdist uses the cores; each worker takes about a gigabyte."""
    return ["-n", str(min(os.cpu_count() or 1, MOST_WORKERS)), "--dist", "worksteal"]


def _lint(part: Part, log: Path | None) -> tuple[Result, int]:
    ruff = str(CHECK_ENV / "bin" / "ruff")
    commands = ([ruff, "check", "."], [ruff, "format", "--check", "."])
    if log:
        log.unlink(missing_ok=True)
    failures = sum(
        call(command, log, environment_of(part, gpu=False), append=True) != 0
        for command in commands
    )
    return Result(part.name, len(commands) - failures, failures), 0


def _suite(part: Part, log: Path | None) -> tuple[Result, int]:
    summary = OUTCOMES / f"{part.name}.json"
    summary.unlink(missing_ok=True)
    command = [
        *(str(CHECK_ENV / "bin" / "python"), "-m", "tests.upstream", "run"),
        *("--python", str(TEST_ENV / "bin" / "python"), "--summary", str(summary)),
    ]
    status = call(command, log, environment_of(part, gpu=False))
    counts = json.loads(summary.read_text()) if summary.exists() else {}
    return Result(part.name, **counts), status


def call(
    command: Sequence[str], log: Path | None, env: dict[str, str], append: bool = False
) -> int:
    """Run a command in the checkout's root, and return its exit status."""
    if log is None:
        return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode
    with log.open("ab" if append else "wb") as output:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
