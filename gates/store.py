"""A run's folder: what was asked, and each measured row on disk before the next is begun.

``run.json`` says what the run is; ``rows.jsonl`` holds one JSON object a line, synchronised to the
disk as it is written. A line that a crash cut short is dropped when the run is resumed.
"""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stack.errors import StackError

Row = dict[str, Any]


def now() -> str:
    """The time as the rows keep it: UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class RunFolder:
    """One run on disk. Open it with `create` or `resume`; read an ended one with `read`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.about: Row = {}
        self._lock: FileLock | None = None
        self._file: Any = None

    @classmethod
    def create(cls, path: Path, about: Row) -> RunFolder:
        """A new run's folder.

        Raises:
            StackError: There is a run in it already.
        """
        if (path / "run.json").exists():
            raise StackError(
                f"{path} holds a run already", "add --resume to go on with it, or name another"
            )
        folder = cls(path)
        path.mkdir(parents=True, exist_ok=True)
        folder._hold()
        folder.about = about
        folder.save_about()
        folder._open()
        return folder

    @classmethod
    def resume(cls, path: Path) -> RunFolder:
        """The folder of a run that was interrupted, to go on with.

        Raises:
            StackError: There is no run in it, another process writes it, or a line is damaged.
        """
        folder = cls.read(path)
        folder._hold()
        text = folder._rows_path.read_bytes() if folder._rows_path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            with folder._rows_path.open("r+b") as file:
                file.truncate(len(whole))
        folder._open()
        return folder

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """A run's folder, to read.

        Raises:
            StackError: There is no run in it, or a line that is not the last is damaged.
        """
        folder = cls(path)
        try:
            folder.about = json.loads((path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StackError(f"{path} holds no run: {error}", "name a folder of a run") from error
        if folder._rows_path.exists():
            lines = folder._rows_path.read_bytes().split(b"\n")
            for number, line in enumerate(lines[:-1], 1):
                try:
                    folder.rows.append(json.loads(line))
                except ValueError as error:
                    raise StackError(
                        f"{folder._rows_path}:{number}: no JSON: {error}", "remove that line"
                    ) from error
        return folder

    @property
    def _rows_path(self) -> Path:
        return self.path / "rows.jsonl"

    def _hold(self) -> None:
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise StackError(f"another process writes to {self.path}", "wait for it") from error

    def _open(self) -> None:
        self._file = self._rows_path.open("a", encoding="utf-8")

    def write(self, kind: str, **row: Any) -> Row:
        """Append a row; it is on the disk when this returns."""
        kept = {"kind": kind, "at": now(), **row}
        self._file.write(json.dumps(kept, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(kept)
        return kept

    def save_about(self) -> None:
        """Write ``run.json`` whole or not at all."""
        self.save("run.json", json.dumps(self.about, indent=2, ensure_ascii=False) + "\n")

    def save(self, name: str, text: str) -> Path:
        """Write a file of the folder whole or not at all, and return its path."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
        return path

    def close(self) -> None:
        """Let go of the folder."""
        if self._file:
            self._file.close()
        if self._lock:
            self._lock.release()

    def of(self, kind: str, **having: Any) -> list[Row]:
        """The rows of a kind whose keys have these values, in the order written."""
        return [
            row
            for row in self.rows
            if row["kind"] == kind and all(row.get(k) == v for k, v in having.items())
        ]
