"""``rebase --write``: the pin and the series move together, or nothing does."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import pytest

from stack import __main__ as main_module
from stack import rebasing, release_index, repin
from stack.checking import check
from stack.checkout import Checkout
from stack.errors import StackError
from stack.git import git
from stack.pin import Artifact
from stack.release_index import Release
from tests.stack.moves.small_project import NEW, OLD, text

FILE = "vllm/a.py"
COMMIT = "110aaaaaa" + "b" * 31
EXTRA = {
    "requirements/cuda.txt": "# torch==9\nnumba == 1\ntorch==2.12.0\n",
    "pyproject.toml": '[project]\nname = "vllm"\nrequires-python = ">=3.11,<3.15"\n',
    "tests/test_it.py": "x = 1\n",
}


def python(*changes):
    return text(*changes).replace("line ", "x = ")


@pytest.fixture
def project(simple, monkeypatch):
    """A project in git, with a finished rebase that drops one patch of three."""
    new = {FILE: "y = 0\n" + python((20, "x = 'same'\n")), **EXTRA}
    project = simple({FILE: python(), **EXTRA}, new)
    project.add("One", {FILE: python((5, "x = 'one'\n"))})
    project.add("Same", {FILE: python((5, "x = 'one'\n"), (20, "x = 'same'\n"))})
    project.add(
        "Last",
        {FILE: python((5, "x = 'one'\n"), (20, "x = 'same'\n"), (35, "x = 'last'\n"))},
        folder="extra",
    )
    (project.root / ".gitignore").write_text("/.build/\n")
    git("init", "-q", cwd=project.root)
    git("update-index", "--add", "--cacheinfo", f"160000,{'c' * 40},vllm", cwd=project.root)
    git("add", "-A", cwd=project.root)
    git("update-index", "--add", "--cacheinfo", f"160000,{'c' * 40},vllm", cwd=project.root)
    git("commit", "-q", "-m", "Start", cwd=project.root)
    assert rebasing.start(project.work, NEW, checkout=project.checkout) is None

    def listed(name: str, version: str) -> Release:
        assert (name, version) == ("vllm", NEW)
        wheels = {
            arch: Artifact(f"vllm-{NEW}-2-cp38-abi3-{arch}.whl", 1000 + number, f"{number}" * 64)
            for number, arch in enumerate(("x86_64", "aarch64"))
        }
        archive = project.sdists[NEW]
        artifact = Artifact(archive.name, archive.stat().st_size, repin.download.sha256_of(archive))
        return Release(NEW, datetime.date(2026, 1, 30), artifact, wheels)

    monkeypatch.setattr(release_index, "release", listed)
    return project


def test_the_pin_and_the_series_move_together(project):
    (project.checkout.patches / "README.md").write_text("the manual\n")
    git("add", "-A", "patches", cwd=project.root)
    git("commit", "-q", "-m", "Manual", cwd=project.root)
    comments = [
        line for line in project.checkout.pin_file.read_text().splitlines() if line.startswith("#")
    ]
    moved = repin.move(project.work, checkout=project.checkout, commit=COMMIT)
    assert list(moved.statuses.values()) == ["unchanged", "already upstream", "unchanged"]
    view = project.checkout
    pin = view.pin
    assert (pin.version, pin.commit, pin.build_number) == (NEW, COMMIT, 1)
    assert (pin.torch, pin.requires_python) == ("2.12.0", ">=3.11,<3.15")
    assert pin.exclude_newer == "2026-02-01"
    assert pin.sdist.sha256 == repin.download.sha256_of(project.sdists[NEW])
    assert pin.wheels["aarch64"] == Artifact(f"vllm-{NEW}-2-cp38-abi3-aarch64.whl", 1001, "1" * 64)
    told = view.pin_file.read_text().splitlines()
    assert [line for line in told if line.startswith("#")] == comments
    assert sorted(path.name for path in view.patches.rglob("*.patch")) == [
        "Last.patch",
        "One.patch",
    ]
    assert (view.patches / "README.md").read_text() == "the manual\n"
    assert [path.name for path in view.shared_files.parent.iterdir()] == [f"{NEW}.txt"]
    assert git("ls-files", "-s", "vllm", cwd=project.root).text.startswith(f"160000 {COMMIT}")
    laws = check(view)
    assert [line for law in laws for line in law.violations] == []
    assert any("torch 2.12.0" in line for line in moved.todo)
    assert "Range-diff" in (project.root / ".build" / f"rebase-{NEW}.md").read_text()


def unchanged(project) -> bool:
    return not git("status", "--porcelain", cwd=project.root).text


@pytest.mark.parametrize(
    ("commit", "message"),
    [
        ("110aaaaaa", "expected 40 hex digits"),
        ("d" * 40, "is not the one that vllm-1.1.0.tar.gz was made from: 110aaaaaa"),
    ],
)
def test_a_wrong_commit_is_refused(project, commit, message):
    with pytest.raises(StackError, match=message):
        repin.move(project.work, checkout=project.checkout, commit=commit)
    assert unchanged(project)


@pytest.fixture
def upstream(project, tmp_path) -> Path:
    """A repository in the place of upstream's public one."""
    path = tmp_path / "upstream"
    path.mkdir()
    git("init", "-q", cwd=path)
    file = project.checkout.pin_file
    old = project.checkout.pin.repository
    file.write_text(file.read_text().replace(old, str(path)))
    git("commit", "-q", "-a", "-m", "Other upstream", cwd=project.root)
    return path


def test_the_commit_is_asked_of_upstreams_tag_and_checked(project, upstream):
    git("commit", "-q", "--allow-empty", "-m", "x", cwd=upstream)
    git("tag", "-a", "-m", "x", f"v{NEW}", cwd=upstream)
    wrong = git("rev-parse", "HEAD", cwd=upstream).text
    # The tag's commit, not the tag's own id; and it is not the one that the sdist tells.
    with pytest.raises(StackError, match=f"commit {wrong} is not the one"):
        repin.move(project.work, checkout=project.checkout)
    assert unchanged(project)


def test_no_tag_and_no_network_ask_for_the_option(project, upstream):
    with pytest.raises(StackError, match="has no tag v1.1.0") as caught:
        repin.move(project.work, checkout=project.checkout)
    assert "--commit; it begins with 110aaaaaa" in caught.value.hint
    shutil.rmtree(upstream)
    with pytest.raises(StackError, match="was not told by"):
        repin.move(project.work, checkout=project.checkout)
    assert unchanged(project)


def test_changed_patches_are_not_replaced(project):
    path = project.checkout.patches / "core" / "One.patch"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(StackError, match="patches/core/One.patch is changed or new"):
        repin.move(project.work, checkout=project.checkout, commit=COMMIT)
    assert project.checkout.pin.version == OLD


def test_a_folder_without_history_is_not_written_to(project):
    shutil.rmtree(project.root / ".git")
    with pytest.raises(StackError, match="is no git checkout"):
        repin.move(project.work, checkout=project.checkout, commit=COMMIT)
    assert project.checkout.pin.version == OLD


def test_the_index_may_have_another_sdist_by_now(project, monkeypatch):
    other = release_index.release("vllm", NEW)
    artifact = Artifact(other.sdist.filename, other.sdist.size, "e" * 64)
    changed = Release(NEW, other.date, artifact, other.wheels)
    monkeypatch.setattr(release_index, "release", lambda name, version: changed)
    with pytest.raises(StackError, match="lists vllm-1.1.0.tar.gz with sha256 eeee"):
        repin.move(project.work, checkout=project.checkout, commit=COMMIT)
    assert unchanged(project)


def test_a_law_that_breaks_leaves_everything_as_it_was(project):
    message = "Last\n\nNo trailers.\n"
    git("commit", "-q", "--amend", "-F", "-", cwd=project.work, input=message)
    with pytest.raises(StackError, match="trailer"):
        repin.move(project.work, checkout=project.checkout, commit=COMMIT)
    assert unchanged(project)


def test_a_pin_that_moved_in_between_is_noticed(project):
    file = project.checkout.pin_file
    file.write_text(file.read_text().replace(f'"{OLD}"', '"1.0.9"'))
    with pytest.raises(StackError, match="from 1.0.0, but the pin is 1.0.9"):
        repin.move(project.work, checkout=Checkout(project.root), commit=COMMIT)


def test_the_command_says_what_is_left_to_do(project, capsys):
    assert main_module.main(["rebase", "--write", "--commit", COMMIT]) == 0
    out = capsys.readouterr().out
    assert f"upstream.toml and patches/ are on {NEW}. Next:" in out
    assert "python -m stack constraints" in out and "CHANGELOG.md" in out
