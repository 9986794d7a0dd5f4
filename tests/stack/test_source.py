"""The release as a commit: the same from both sources, whatever happens on the way."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from stack import shared, source
from stack.errors import StackError
from stack.git import git


def plain(*args, cwd):
    """Git as a user runs it."""
    done = subprocess.run(["git", *args], cwd=cwd, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repo(tmp_path):
    """A new repository to bring commits into."""
    folder = tmp_path / "repo"
    folder.mkdir()
    git("init", "-q", cwd=folder)
    return folder


@pytest.fixture
def expected_tree(upstream, tmp_path):
    """The tree of the shared files, made by plain git from upstream's repository."""
    clone = tmp_path / "expected"
    plain("clone", "-q", str(upstream.repository), str(clone), cwd=tmp_path)
    plain("rm", "-q", ".gitattributes", "ci.yml", "linked", "vllm/kept.log", cwd=clone)
    return plain("write-tree", cwd=clone)


def test_both_sources_give_the_tree_of_the_shared_files(project, repo, expected_tree, remove_cache):
    from_sdist = source.base_commit(repo, project.checkout)
    assert source.tree_of(repo, from_sdist) == expected_tree

    remove_cache()
    shutil.rmtree(repo)
    repo.mkdir()
    git("init", "-q", cwd=repo)
    project.upstream.archive.unlink()  # the sdist cannot be what is read
    project.use_submodule()
    from_submodule = source.base_commit(repo, project.checkout)
    assert from_submodule == from_sdist
    assert git("fsck", "--full", "--strict", cwd=repo).returncode == 0


def test_the_commit_is_an_orphan_and_no_ref_changes(project, repo):
    commit = source.base_commit(repo, project.checkout)
    assert git("rev-list", "--count", commit, cwd=repo).text == "1"
    assert git("for-each-ref", cwd=repo).text == ""
    assert git("log", "-1", "--format=%s", commit, cwd=repo).text == "vLLM 1.0.0"


def test_the_second_time_only_the_cache_is_read(project, repo, tmp_path, monkeypatch):
    commit = source.base_commit(repo, project.checkout)
    monkeypatch.setattr(source, "pinned_sdist", lambda checkout: pytest.fail("read again"))
    other = tmp_path / "other"
    other.mkdir()
    git("init", "-q", cwd=other)
    assert source.base_commit(other, project.checkout) == commit


def test_a_borrowing_repository_has_the_commit_without_a_copy(project, repo, tmp_path):
    commit = source.base_commit(repo, project.checkout)
    other = tmp_path / "other"
    other.mkdir()
    git("init", "-q", cwd=other)
    assert source.base_commit(other, project.checkout, borrow=True) == commit
    assert git("cat-file", "-t", commit, cwd=other).text == "commit"
    assert not list((other / ".git" / "objects").rglob("*.pack"))


@pytest.mark.parametrize("step", ["_store_blobs", "_commit"])
def test_an_interruption_leaves_nothing_that_is_taken_for_whole(
    project, repo, expected_tree, monkeypatch, tmp_path, step
):
    real = getattr(source, step)

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(source, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            source.base_commit(repo, project.checkout)
    assert list((tmp_path / "cache" / "trees").iterdir()) == []
    commit = source.base_commit(repo, project.checkout)
    assert source.tree_of(repo, commit) == expected_tree


def test_another_run_may_be_faster(project, repo, monkeypatch):
    real = source._commit
    inner = []

    def meanwhile(*args):
        real(*args)
        if not inner:
            inner.append(None)
            inner.append(source.base_commit(repo, project.checkout))

    monkeypatch.setattr(source, "_commit", meanwhile)
    assert source.base_commit(repo, project.checkout) == inner[1]


def test_what_killed_runs_left_is_removed_in_time(project, repo, tmp_path):
    trees = tmp_path / "cache" / "trees"
    old, young = trees / "part-old", trees / "part-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    import os

    os.utime(old, (0, 0))
    source.base_commit(repo, project.checkout)
    assert not old.exists() and young.exists()


def test_a_submodule_at_another_commit_is_an_error(project, repo):
    project.use_submodule()
    folder = project.root / "vllm"
    plain("-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x",
          cwd=folder)  # fmt: skip
    other = plain("rev-parse", "HEAD", cwd=folder)
    with pytest.raises(StackError) as caught:
        source.base_commit(repo, project.checkout)
    assert other in caught.value.message and project.upstream.commit in caught.value.message
    assert "git submodule update --init --force vllm" in caught.value.hint


def test_edits_in_the_submodule_change_nothing(project, repo, expected_tree):
    project.use_submodule()
    (project.root / "vllm" / "setup.py").write_text("edited\n", encoding="utf-8")
    commit = source.base_commit(repo, project.checkout)
    assert source.tree_of(repo, commit) == expected_tree


def test_a_shallow_submodule_will_do(project, repo, expected_tree):
    upstream = project.upstream
    (project.root / "vllm").rmdir()
    plain("clone", "-q", "--depth=1", f"file://{upstream.repository}", "vllm", cwd=project.root)
    commit = source.base_commit(repo, project.checkout)
    assert source.tree_of(repo, commit) == expected_tree
    assert not Path(repo, ".git", "shallow").exists()


def test_files_where_the_submodule_belongs_are_an_error(project, repo):
    (project.root / "vllm" / "stray.txt").write_text("x", encoding="utf-8")
    with pytest.raises(StackError, match="is no checked-out submodule"):
        source.base_commit(repo, project.checkout)


def test_an_uninitialised_submodule_does_not_find_the_project_around_it(project):
    plain("init", "-q", cwd=project.root)
    assert source.submodule_head(project.checkout) is None
    assert source.find(project.checkout).kind == "sdist"


@pytest.mark.parametrize("kind", ["sdist", "submodule"])
def test_a_file_that_differs_from_the_list_is_named(project, repo, kind):
    if kind == "submodule":
        project.use_submodule()
    path = project.checkout.shared_files
    blob = shared.load(path).files["setup.py"].blob
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(f"{blob} setup.py", f"{'0' * 40} setup.py"), encoding="utf-8")
    with pytest.raises(StackError, match="setup.py: listed as") as caught:
        source.base_commit(repo, project.checkout)
    assert f"the {kind} has 100644 {blob}" in caught.value.message


def test_a_mode_that_differs_counts_too(project, repo):
    path = project.checkout.shared_files
    text = path.read_text(encoding="utf-8").replace("100755", "100644")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StackError, match="tools/run.sh: listed as 100644"):
        source.base_commit(repo, project.checkout)


def test_release_commit_of_the_pinned_sdist_is_the_base_commit(project, repo):
    commit = source.release_commit(repo, "1.0.0", sdist=project.upstream.archive)
    assert commit == source.base_commit(repo, project.checkout)


def test_release_commit_depends_on_version_and_contents(project, repo, tmp_path):
    one = source.release_commit(repo, "1.0.0", sdist=project.upstream.archive)
    two = source.release_commit(repo, "1.0.1", sdist=project.upstream.archive)
    assert one != two and source.tree_of(repo, one) == source.tree_of(repo, two)


def test_an_unwritable_cache_is_one_line(project, repo, monkeypatch, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file", encoding="utf-8")
    monkeypatch.setenv("SM12X_CACHE", str(blocked))
    with pytest.raises(StackError, match="blocked") as caught:
        source.release_commit(repo, "1.0.0", sdist=project.upstream.archive)
    assert "permissions" in caught.value.hint


def test_a_damaged_cache_says_what_to_delete(project, repo, tmp_path):
    source.base_commit(repo, project.checkout)
    (bare,) = (tmp_path / "cache" / "trees").iterdir()
    shutil.rmtree(bare / "objects")
    with pytest.raises(StackError, match="is damaged|not a git repository") as caught:
        source.base_commit(repo, project.checkout)
    assert str(bare) in caught.value.hint
    shutil.rmtree(bare)
    assert source.base_commit(repo, project.checkout)


def test_two_runs_at_once_give_one_commit(project, tmp_path):
    """Threads stand in for processes: each runs git and makes its own folders."""
    from concurrent.futures import ThreadPoolExecutor

    def run(number):
        folder = tmp_path / f"repo{number}"
        folder.mkdir()
        git("init", "-q", cwd=folder)
        return source.base_commit(folder, project.checkout)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(run, range(4)))) == 1
    assert len(list((tmp_path / "cache" / "trees").iterdir())) == 1
