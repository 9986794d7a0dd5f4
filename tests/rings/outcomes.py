"""What each test came to, read from the log that pytest-reportlog writes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
NEEDS_HUB = "needs a model hub"
_HUB = re.compile(
    r"Invalid repository ID|HF_HUB_OFFLINE|OfflineMode|LocalEntryNotFound|offline mode"
    r"|couldn't connect to|is not the path to a directory containing"
)


@dataclass(frozen=True)
class Outcome:
    """One test's end: ``passed``, ``skipped`` or ``failed``, and why where it did not pass."""

    result: str
    reason: str = ""


def read(log: Path) -> dict[str, Outcome]:
    """Fold a reportlog into one outcome a node id.

    A test that fails in its set-up or tear-down has failed. A file that cannot be collected is a
    failed node with the file's name. An expected failure counts as skipped.
    """
    outcomes: dict[str, Outcome] = {}
    with log.open(encoding="utf-8") as lines:
        for line in lines:
            report = json.loads(line)
            kind = report.get("$report_type")
            if kind not in ("TestReport", "CollectReport"):
                continue
            node, result = report["nodeid"], report["outcome"]
            if kind == "CollectReport" and result == PASSED:
                continue
            if kind == "TestReport" and result == PASSED and report["when"] != "call":
                continue
            if outcomes.get(node, Outcome(PASSED)).result != FAILED:
                outcomes[node] = Outcome(result, _reason(report.get("longrepr")))
    return outcomes


def ended(log: Path) -> bool:
    """Whether pytest came to its end: a test that ends the process leaves a log without one."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return bool(lines) and json.loads(lines[-1]).get("$report_type") == "SessionFinish"


def _reason(longrepr: object) -> str:
    """The first line of why a test did not pass, without what differs from run to run."""
    if isinstance(longrepr, list):  # a skip: file, line, reason
        text = str(longrepr[-1]).removeprefix("Skipped: ")
    elif isinstance(longrepr, dict):
        crash = longrepr.get("reprcrash") or {}
        text = str(crash.get("message", ""))
    else:
        text = str(longrepr or "")
    if _HUB.search(text):
        return NEEDS_HUB
    text = next((line.strip() for line in text.splitlines() if line.strip()), "")
    text = re.sub(r"0x[0-9a-f]+", "0x…", text)
    text = re.sub(r"'/[^']*/(?=tests/)", "'", text)
    return text[:160]
