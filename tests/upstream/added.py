"""The tests that the series itself adds to upstream's: found, laid out and judged."""

from __future__ import annotations

import ast
import io
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from stack.git import git
from stack.importing import import_series
from stack.scratch import scratch
from tests.rings.outcomes import PASSED, Outcome


def lay_out(folder: Path) -> list[str]:
    """Write the patched tree's ``tests/`` and pytest settings into ``folder``; the added tests.

    The package ``vllm`` is not among them, so that ``import vllm`` takes the installed wheel.

    Returns:
        Node ids, such as ``tests/test_config.py::TestCache::test_size``, without parameters.
    """
    with scratch(folder.parent, f".{folder.name}.part-") as place:
        made = import_series(place / "series")
        changed = git(
            *("diff", "--name-only", "--no-renames", "-z", "--diff-filter=AM"),
            *(made.base, made.head, "--", "tests"),
            cwd=made.path,
        ).fields
        nodes = []
        for path in changed:
            if path.endswith(".py"):
                before, after = (_tests(_text(made.path, c, path)) for c in (made.base, made.head))
                nodes += [f"{path}::{name}" for name in after if name not in before]
        wanted = (made.head, "tests", "pyproject.toml")
        archive = git("archive", "--format=tar", *wanted, cwd=made.path)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None:
                    path = place / "tree" / member.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content.read())
        shutil.rmtree(folder, ignore_errors=True)
        (place / "tree").rename(folder)
    return nodes


def _text(repo: Path, commit: str, path: str) -> str:
    """A file of a commit; empty where the commit lacks it."""
    if not git("ls-tree", "--name-only", commit, "--", path, cwd=repo).stdout:
        return ""
    return git("show", f"{commit}:{path}", cwd=repo).stdout.decode("utf-8")


def _tests(source: str) -> list[str]:
    """The tests that a file defines: ``test_x``, ``TestY::test_x``."""
    names = []
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.ClassDef):
            names += [f"{statement.name}::{name}" for name in _functions(statement.body)]
        else:
            names += _functions([statement])
    return names


def _functions(body: Sequence[ast.stmt]) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node.name for node in body if isinstance(node, kinds) and node.name.startswith("test")]


def judge(nodes: Sequence[str], outcomes: Mapping[str, Outcome]) -> list[str]:
    """A line for each added test that did not run, and for each outcome that is not a pass."""
    lines = []
    for node in nodes:
        if not any(ran == node or ran.startswith(f"{node}[") for ran in outcomes):
            lines.append(f"{node}: missing")
    for ran, outcome in sorted(outcomes.items()):
        if outcome.result != PASSED:
            lines.append(f"{ran}: {outcome.result} ({outcome.reason})")
    return lines
