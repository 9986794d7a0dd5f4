"""Fixtures: an empty small project, and one with an old and a new release."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from stack import __main__ as main_module
from stack import checkout as checkout_module
from stack import download
from stack.pin import Artifact
from tests.stack.moves.small_project import NEW, OLD, Project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """An empty project. Commands run by a test take it for the checkout."""
    monkeypatch.setenv("SM12X_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "project"
    commits = tmp_path / "commits"
    for folder in (root / "vllm", root / "patches", commits):
        folder.mkdir(parents=True)
    made = Project(root, {}, commits, [])

    def artifacts() -> dict[str, Artifact]:
        return {
            version: Artifact(path.name, path.stat().st_size, download.sha256_of(path))
            for version, path in made.sdists.items()
        }

    monkeypatch.setattr(download, "releases", artifacts)
    monkeypatch.setattr(checkout_module, "Checkout", lambda: made.checkout)
    commands = {name: f"stack.commands.{name}" for name in ("rebase", "forward")}
    monkeypatch.setattr(main_module, "COMMANDS", commands)
    return made


@pytest.fixture
def simple(project: Project) -> Callable[..., Project]:
    """Make old and new release from their files, and pin the old one."""

    def make(old: Mapping[str, str | bytes], new: Mapping[str, str | bytes]) -> Project:
        project.release(OLD, old)
        project.release(NEW, new)
        project.pin(OLD)
        return project

    return make
