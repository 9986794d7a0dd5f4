"""Whether a run on disk is the one that is asked for now, and may be gone on with."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gates import redaction
from stack.errors import StackError

if TYPE_CHECKING:
    from gates.store import RunFolder


def opened(path: Path, asked: dict[str, Any]) -> RunFolder:
    """The folder of the run, to go on with; another commit of the suite is noted in its rows.

    Raises:
        StackError: It is another run, and what differs.
    """
    from gates.store import RunFolder

    same(RunFolder.read(path).about, asked)
    folder = RunFolder.resume(path)
    resumed = folder.of("resumed")
    before = resumed[-1]["commit"] if resumed else folder.about["machine"].get("gates_commit", "")
    commit = asked["machine"]["gates_commit"]
    if commit != before:
        folder.write("resumed", before=before, commit=commit)
    return folder


def same(kept: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to go on with a run of other gates, another server or another size.

    Raises:
        StackError: What differs.
    """
    different = [
        name for name in ("size", "variant", "made_weights", "gates") if kept[name] != asked[name]
    ]
    if kept["profile"]["name"] != asked["profile"]["name"]:
        different.append("profile")
    for name in ("model", "version", "max_model_len", "prefix_cache", "speculation"):
        if kept["server"][name] != asked["server"][name]:
            different.append(f"the server's {name}")
    before = redaction.command(kept.get("serve") or [])
    if before != asked["serve"]:
        different.append(f"the serve command ({_changed(before, asked['serve'])})")
    # The settings are those of a server that the suite starts; another one has its own.
    before, now = kept["machine"].get("settings"), asked["machine"]["settings"]
    if asked["serve"] and before is not None and before != now:
        lists = [[f"{name}={value}" for name, value in one.items()] for one in (before, now)]
        different.append(f"the settings of the environment ({_changed(*lists)})")
    if different:
        raise StackError(
            f"--resume: this is another run: {', '.join(different)} differ",
            "begin a new one with another --out",
        )


def _changed(before: Sequence[str], now: Sequence[str]) -> str:
    """What only one of two lists has: ``then: --port 80; now: --port 81``."""
    lines = list(difflib.ndiff(before, now))
    told = [
        f"{word}: {shlex.join(line[2:] for line in lines if line.startswith(mark)) or 'nothing'}"
        for word, mark in (("then", "- "), ("now", "+ "))
    ]
    return "; ".join(told)
