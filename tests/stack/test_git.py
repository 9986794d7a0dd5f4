"""Git's wrapper: nothing of the caller's environment or configuration reaches a command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from stack import git as wrapper
from stack.errors import StackError
from stack.git import git


@pytest.fixture
def repo(tmp_path, user):
    """An empty repository."""
    folder = tmp_path / "repo"
    folder.mkdir()
    git("init", "-q", "--template=", cwd=folder)
    return folder


@pytest.fixture
def fresh_executable():
    """Look for git anew, before and after."""
    wrapper._executable.cache_clear()
    yield
    wrapper._executable.cache_clear()


def test_git_variables_of_the_caller_are_dropped(repo, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    git("init", "-q", cwd=other)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / "index"))
    assert git("rev-parse", "--show-toplevel", cwd=repo).text == str(repo.resolve())


def test_the_users_configuration_is_not_read(repo, user):
    user.write_text("[user]\n\tname = Somebody\n[core]\n\tautocrlf = true\n", encoding="utf-8")
    assert git("config", "user.name", cwd=repo).text == wrapper.NAME
    assert git("config", "core.autocrlf", cwd=repo).text == "false"


def test_the_repositorys_own_configuration_gives_way(repo):
    subprocess.run(["git", "config", "diff.noprefix", "true"], cwd=repo, check=True)
    assert git("config", "--bool", "diff.noprefix", cwd=repo).text == "false"


def test_config_argument_stands_above_the_files(repo):
    text = git("config", "rerere.enabled", cwd=repo, config={"rerere.enabled": "true"}).text
    assert text == "true"


def test_no_repository_is_looked_for_above_the_folder(repo):
    below = repo / "below"
    below.mkdir()
    with pytest.raises(StackError, match="not a git repository"):
        git("status", cwd=below)


def test_error_names_the_command_and_gits_last_line(repo):
    with pytest.raises(StackError) as caught:
        git("rev-parse", "--verify", "no-such-ref", cwd=repo)
    assert caught.value.message == "git rev-parse failed: fatal: Needed a single revision"
    assert "rev-parse --verify no-such-ref" in caught.value.hint


def test_unchecked_failure_returns_its_status(repo):
    assert git("rev-parse", "-q", "--verify", "no-such-ref", cwd=repo, check=False).returncode == 1


def test_missing_folder_is_a_clear_error(tmp_path):
    with pytest.raises(StackError, match="nowhere does not exist"):
        git("status", cwd=tmp_path / "nowhere")


def test_missing_git_says_what_to_install(tmp_path, monkeypatch, fresh_executable):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StackError, match="git is not installed") as caught:
        git("--version", cwd=tmp_path)
    assert "2.34" in caught.value.hint


@pytest.mark.parametrize(
    ("version", "accepted"),
    [("2.33.9", False), ("1.9", False), ("2.34.1", True), ("2.100.0", True), ("3.0.rc1", True)],
)
def test_old_git_is_refused(tmp_path, monkeypatch, fresh_executable, version, accepted):
    script = tmp_path / "git"
    script.write_text(f"#!{sys.executable}\nprint('git version {version}')\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if accepted:
        assert git("--version", cwd=tmp_path).text == f"git version {version}"
    else:
        with pytest.raises(StackError, match=f"git is too old: git version {version}"):
            git("--version", cwd=tmp_path)


def test_bytes_that_are_no_utf8_survive(repo):
    name = os.fsdecode(b"caf\xe9 \xff\n.txt")
    (repo / name).write_bytes(b"x")
    git("add", "-A", cwd=repo)
    assert git("ls-files", "-z", cwd=repo).fields == [name]


def test_empty_output_has_no_lines_and_no_fields(repo):
    output = git("ls-files", "-z", cwd=repo)
    assert output.fields == [] and output.lines == []


def test_commits_have_the_same_id_everywhere(repo, tmp_path, monkeypatch):
    ids = []
    for number, zone in enumerate(("UTC", "Asia/Tokyo")):
        monkeypatch.setenv("TZ", zone)
        folder = tmp_path / f"twin{number}"
        shutil.copytree(repo, folder)
        (folder / "file").write_text("x\n", encoding="utf-8")
        git("add", "-A", cwd=folder)
        git("commit", "-q", "-m", "one", cwd=folder)
        ids.append(git("rev-parse", "HEAD", cwd=folder).text)
    assert ids[0] == ids[1]
