"""The rule: no test's outcome is worse with our wheel than with upstream's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.rings.outcomes import FAILED, PASSED, SKIPPED, Outcome

BASELINE = Path(__file__).with_name("baseline.json")
MISSING = "missing"
_RANK = {PASSED: 0, SKIPPED: 1, FAILED: 2, MISSING: 3}


@dataclass
class Comparison:
    """Lines for people, by how a test fared against the baseline."""

    worse: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    passed: int = 0
    not_run: int = 0
    failed_in_both: int = 0

    @property
    def holds(self) -> bool:
        """Whether the rule holds: nothing worse, and no test that the baseline does not know."""
        return not self.worse and not self.unknown


def compare(stock: Mapping[str, Outcome], ours: Mapping[str, Outcome]) -> Comparison:
    """Set our wheel's outcomes beside upstream's, node id by node id."""
    result = Comparison()
    for node in sorted(stock.keys() | ours.keys()):
        mine = ours.get(node, Outcome(MISSING))
        if node not in stock:
            result.unknown.append(f"{node}: {mine.result}, and the baseline lacks it")
            continue
        line = f"{node}: {stock[node].result} with upstream's wheel, {mine.result} with ours"
        if mine.reason:
            line += f" ({mine.reason})"
        if _RANK[mine.result] > _RANK[stock[node].result]:
            result.worse.append(line)
            continue
        if _RANK[mine.result] < _RANK[stock[node].result]:
            result.better.append(line)
        if mine.result == PASSED:
            result.passed += 1
        elif mine.result == FAILED:
            result.failed_in_both += 1
        else:
            result.not_run += 1
    return result


def pack(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Outcomes as the baseline keeps them: by file, then by outcome, then by reason."""
    files: dict[str, Any] = {}
    for node, outcome in sorted(outcomes.items()):
        file, _, name = node.partition("::")
        by_result = files.setdefault(file, {})
        if outcome.result == PASSED:
            by_result.setdefault(PASSED, []).append(name)
        else:
            by_result.setdefault(outcome.result, {}).setdefault(outcome.reason, []).append(name)
    return files


def unpack(files: Mapping[str, Any]) -> dict[str, Outcome]:
    """The inverse of ``pack``."""
    outcomes = {}
    for file, by_result in files.items():
        for result, names in by_result.items():
            by_reason = {"": names} if result == PASSED else names
            for reason, group in by_reason.items():
                for name in group:
                    outcomes[f"{file}::{name}" if name else file] = Outcome(result, reason)
    return outcomes


def load_baseline(path: Path = BASELINE) -> dict[str, Any]:
    """The committed baseline: ``made`` says how, ``files`` what came out."""
    return json.loads(path.read_text(encoding="utf-8"))
