"""The receipt beside a wheel: what went in, what came out, and what was tested where.

``receipt.schema.json`` describes it. For the same inputs it is the same, but for ``made``, which
tells of the machine and the moment.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stack.errors import StackError
from stack.git import git
from stack.pin import ROOT, tomllib
from stack.wheel_assemble import Assembled

FORMAT = 1
# Where a claim can have been shown, as the README's table has it.
PLACES = ("CPU", "compile-only", "Hopper", "SM12x")


def receipt_path(wheel: Path) -> Path:
    """``NAME.receipt.json`` beside ``NAME.whl``."""
    return wheel.with_name(wheel.name.removesuffix(".whl") + ".receipt.json")


def patches_used(folder: Path, names: Sequence[str]) -> list[dict[str, str]]:
    """Each patch of the series with its SHA-256, in order."""
    return [
        {"name": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
        for name in names
    ]


def repository_state(root: Path) -> dict[str, Any]:
    """This repository's commit, and whether anything differs from it; nulls outside of git."""
    head = git("rev-parse", "--verify", "-q", "HEAD^{commit}", cwd=root, check=False)
    if head.returncode:
        return {"commit": None, "dirty": None}
    # The submodule is judged by its commit, which the receipt has under "source".
    status = git("status", "--porcelain", "--ignore-submodules=dirty", cwd=root)
    return {"commit": head.text, "dirty": bool(status.stdout)}


def claims(path: Path) -> list[dict[str, str]]:
    """What was tested, where: the entries of ``tests/claims.toml``; empty where nothing was run.

    Each ``[[claim]]`` has ``claim``, ``where`` (one of :data:`PLACES`), ``date`` and ``command``.

    Raises:
        StackError: An entry lacks a key, has another one, or names an unknown place.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StackError(f"{path.name} is not valid TOML: {error}", f"mend {path}") from None
    entries = table.get("claim", [])
    wanted = {"claim", "where", "date", "command"}
    for entry in entries:
        if set(entry) != wanted or entry["where"] not in PLACES:
            raise StackError(
                f"{path.name}: {entry} is no claim",
                f"it needs {', '.join(sorted(wanted))}; where is one of {', '.join(PLACES)}",
            )
    return [{key: str(entry[key]) for key in sorted(entry)} for entry in entries]


def made() -> dict[str, str]:
    """The tools and the moment: the one part in which two builds of the same inputs differ."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        "git": git("--version", cwd=ROOT).text.removeprefix("git version "),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def write_receipt(assembled: Assembled, inputs: Mapping[str, Any]) -> Path:
    """Write the receipt of a wheel beside it.

    Args:
        assembled: The wheel.
        inputs: The sections that do not follow from the wheel, see ``receipt.schema.json``.
    """
    content = {
        "format": FORMAT,
        "wheel": {
            "filename": assembled.path.name,
            "size": assembled.size,
            "sha256": assembled.sha256,
            "replaced": list(assembled.replaced),
            "added": list(assembled.added),
            "removed": list(assembled.removed),
        },
        **inputs,
        "made": made(),
    }
    path = receipt_path(assembled.path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
