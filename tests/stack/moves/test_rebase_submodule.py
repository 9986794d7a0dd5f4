"""``rebase`` and ``forward`` with upstream's submodule checked out as the source."""

from __future__ import annotations

import subprocess

import pytest

from stack import rebasing, source
from stack.errors import StackError
from stack.forwarding import forward
from stack.git import git
from stack.trial import Outcome
from tests.stack.moves.small_project import NEW, OLD, text

FILE = "vllm/a.py"


@pytest.fixture
def project(simple, tmp_path):
    """A series in conflict; ``vllm/`` is a submodule that has a file more than the sdist."""
    files = {FILE: text(), "setup.py": "x = 1\n"}
    project = simple(files, {FILE: text((10, "upstream\n")), "setup.py": "x = 1\n"})
    upstream = tmp_path / "upstream"
    upstream.mkdir()
    git("init", "-q", cwd=upstream)
    for name, data in {**files, ".buildkite/only-here.yml": "x\n"}.items():
        (upstream / name).parent.mkdir(parents=True, exist_ok=True)
        (upstream / name).write_text(data)
    git("add", "-A", cwd=upstream)
    git("commit", "-q", "-m", "Release", cwd=upstream)
    head = git("rev-parse", "HEAD", cwd=upstream).text
    pin_file = project.checkout.pin_file
    pin_file.write_text(pin_file.read_text().replace(project.checkout.pin.commit, head))
    project.checkout.submodule.rmdir()
    git("init", "-q", cwd=project.root)
    subprocess.run(
        ["git", "-c", "protocol.file.allow=always", "submodule", "add", "-q", upstream, "vllm"],
        cwd=project.root,
        check=True,
        capture_output=True,
    )
    project.add("Ten", {FILE: text((10, "ten\n"))})
    project.add("Thirty", {FILE: text((10, "ten\n"), (30, "thirty\n"))})
    # The sdist must not be what answers.
    project.sdists.pop(OLD).unlink()
    return project


def submodule(project) -> tuple[str, str, str]:
    """What must not change: head, status and refs of the submodule."""
    folder = project.checkout.submodule
    return tuple(
        git(*command, cwd=folder).text
        for command in (
            ("rev-parse", "HEAD"),
            ("status", "--porcelain", "--ignored"),
            ("for-each-ref",),
        )
    )


def test_the_series_is_carried_and_the_submodule_left_alone(project):
    before = submodule(project)
    assert source.find(project.checkout).kind == "submodule"
    assert rebasing.start(project.work, NEW, checkout=project.checkout).patch == "core/Ten.patch"
    project.resolve({FILE: text((10, "both\n"))})
    assert rebasing.proceed(project.work) is None
    assert project.content(FILE, "carried") == text((10, "both\n"), (30, "thirty\n"))
    assert submodule(project) == before


def test_forward_reads_the_submodule(project):
    before = submodule(project)
    (result,) = forward([NEW], checkout=project.checkout)
    outcomes = [line.trial.outcome for line in result.lines]
    assert outcomes == [Outcome.CONFLICT, Outcome.APPLIES]
    assert submodule(project) == before


def test_edits_in_the_submodule_do_not_leak_into_the_series(project):
    (project.checkout.submodule / FILE).write_text("edited\n")
    before = submodule(project)
    assert rebasing.start(project.work, NEW, checkout=project.checkout).patch == "core/Ten.patch"
    assert project.content(FILE, f"release-{OLD}") == text()
    assert submodule(project) == before


def test_a_submodule_at_another_commit_is_refused(project):
    folder = project.checkout.submodule
    git("commit", "-q", "--allow-empty", "-m", "Later", cwd=folder)
    with pytest.raises(StackError, match="but upstream.toml pins"):
        rebasing.start(project.work, NEW, checkout=project.checkout)
    assert not project.work.exists()
