"""A row of results: written the moment it is measured, read back for the tables."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gates.report import receipt
from stack.errors import StackError

Row = dict[str, Any]
# Settings that the caller's environment may have, and no option says.
SETTINGS = (
    "SM12X_MTP_FULL_GRAPHS",
    "SM12X_DRAFT_GRAPHS",
    "SM12X_EXPERT_ACTIVATIONS",
    "SM12X_SERVER_WARM_UP",
    "VLLM_WORKER_MULTIPROC_METHOD",
)
NEEDED = ("kind", "variant", "layers", "tp", "date", "commit", "machine", "command")


@dataclass
class Rows:
    """Rows of one call, appended to a file; ``about`` is in each of them."""

    about: Row
    out: Path | None = None

    def add(self, kind: str, **figures: Any) -> Row:
        """Write a row, show its figures in a line, and return it."""
        row = {"kind": kind, **self.about, **figures}
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
        shown = " ".join(f"{name}={_short(value)}" for name, value in figures.items())
        print(f"{kind}: {shown}", flush=True)
        return row


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{len(value)} entries" if isinstance(value, (dict, list)) else str(value)


def about(argv: Sequence[str], commit: str | None) -> Row:
    """Date, commit, machine and command of a call, as every benchmark's rows have them."""
    found = receipt.machine()
    names = [gpu["name"] for gpu in found.get("gpus", [])]
    gpus = f"{len(names)} x {names[0]}" if names else "no GPU"
    versions = ", ".join(
        f"{name} {found['packages'][name]}"
        for name in ("vllm", "torch", "triton")
        if name in found["packages"]
    )
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    words = ["python", "-m", "benchmarks.engine", *map(_without_folder, argv)]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit or found["gates_commit"] or "unknown",
        "machine": f"{gpus}, {versions}",
        "command": shlex.join([*settings, *words]),
    }


def _without_folder(word: str) -> str:
    return Path(word).name if word.startswith("/") else word


def read(files: Iterable[Path]) -> list[Row]:
    """The rows of files, in order.

    Raises:
        StackError: A file cannot be read, or a line is no row; the file and the line are named.
    """
    rows = []
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StackError(f"{path}: {error}", "name a file of --out") from error
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                missing = [name for name in NEEDED if name not in row]
            except (ValueError, TypeError) as error:
                raise StackError(f"{path}:{number}: no row of JSON: {error}") from error
            if missing:
                raise StackError(f"{path}:{number}: a row has {', '.join(NEEDED)}; no {missing[0]}")
            rows.append(row)
    return rows
