"""``import``: strict, repeatable, and careful with work that was not exported."""

from __future__ import annotations

import re
import subprocess

import pytest

from stack import importing, shared, worktree
from stack.errors import StackError
from stack.exporting import export_series
from stack.importing import import_series

FIRST, SECOND = "core/Add-three-numbers.patch", "extra/Subtract-twice.patch"


def test_one_commit_a_patch_on_the_release(series):
    lines = []
    made = import_series(checkout=series.checkout, echo=lines.append)
    assert lines == [f"[1/2] {FIRST}", f"[2/2] {SECOND}"]
    assert made.patches == (FIRST, SECOND) and made.commits[-1] == made.head
    assert series.git("log", "--format=%s", f"{made.base}..HEAD").split("\n") == [
        "Subtract twice",
        "Add three numbers",
    ]
    assert series.git("rev-parse", "HEAD") == made.head
    assert series.git("rev-parse", "base") == made.base
    assert series.git("status", "--porcelain") == ""
    assert b"a + b + c" in (series.tree / "vllm/add.py").read_bytes()


def test_ids_do_not_depend_on_place_or_time(series, tmp_path, monkeypatch):
    one = import_series(tmp_path / "one", checkout=series.checkout)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    two = import_series(tmp_path / "deep" / "two", checkout=series.checkout)
    assert one.commits == two.commits


def test_author_and_date_are_the_patchs(series):
    made = import_series(checkout=series.checkout)
    raw = series.patch(FIRST).read_text(encoding="utf-8")
    shown = series.git("log", "-1", "--format=From: %an <%ae>%nDate: %aD", made.commits[0])
    assert shown in raw
    dates = series.git("log", "-1", "--format=%aI %cI", made.commits[0]).split()
    assert dates[0] == dates[1]


@pytest.mark.parametrize("name", [FIRST, f"patches/{FIRST}", "Add-three-numbers"])
def test_upto_imports_a_prefix(series, name):
    made = import_series(checkout=series.checkout, upto=name)
    assert made.patches == (FIRST,)
    assert worktree.read_state(series.tree).held_back == (SECOND,)


def test_upto_base_imports_none(series):
    made = import_series(checkout=series.checkout, upto="base")
    assert made.head == made.base and made.commits == ()


def test_upto_an_unknown_patch_lists_the_known(series):
    with pytest.raises(StackError, match="core/None.patch is not in the series") as caught:
        import_series(checkout=series.checkout, upto="core/None.patch")
    assert FIRST in caught.value.hint


def break_context(series, name=SECOND):
    """Change a context line of a patch, as a careless edit would."""
    file = series.patch(name)
    data = file.read_bytes()
    broken = data.replace(b"\n FILL_29 = 29\n", b"\n FILL_29 = 30\n")
    assert broken != data
    file.write_bytes(broken)


def test_a_changed_context_line_is_refused_with_the_place(series, tmp_path):
    break_context(series)
    with pytest.raises(StackError) as caught:
        import_series(tmp_path / "new", checkout=series.checkout)
    assert caught.value.message == (
        f"patches/{SECOND} does not apply: vllm/add.py, hunk at line 36"
    )
    assert f"import --upto {FIRST} --to {tmp_path / 'new'}`" in caught.value.hint
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))


def test_the_hint_after_a_conflict_leads_to_a_good_series(series):
    """Follow it to the letter: the prefix, ``git am --reject``, mend, continue, export."""
    file = series.patch(FIRST)
    data = file.read_bytes()
    # The first patch now changes a line of the second one's context.
    more = (
        b"@@ -34,7 +34,7 @@ FILL_25 = 25\n FILL_26 = 26\n FILL_27 = 27\n FILL_28 = 28\n"
        b"-FILL_29 = 29\n+FILL_29 = 92\n def sub(a, b):\n     return a - b\n"
    )
    file.write_bytes(data + more.replace(b"34,7", b"34,6"))
    with pytest.raises(StackError, match=f"patches/{SECOND} does not apply") as caught:
        import_series(checkout=series.checkout)
    hint = caught.value.hint
    import_series(checkout=series.checkout, upto=re.search(r"--upto (\S+)`", hint)[1])
    command = re.search(r"`git (am [^`]+)`", hint)[1].split()
    with pytest.raises(subprocess.CalledProcessError):
        series.git(*command)
    reject = series.tree / "vllm/add.py.rej"
    assert "return a - b - b" in reject.read_text(encoding="utf-8")
    reject.unlink()
    source = series.tree / "vllm/add.py"
    source.write_bytes(source.read_bytes().replace(b"return a - b\n", b"return a - b - b\n"))
    series.git("add", "vllm/add.py")
    series.git("am", "--continue")
    done = export_series(checkout=series.checkout)
    assert done.patches == (FIRST, SECOND) and SECOND in done.written and not done.notes
    assert worktree.read_state(series.tree).held_back == ()
    assert import_series(checkout=series.checkout).patches == (FIRST, SECOND)


def test_reduced_context_does_not_help(series):
    """A context line that is off by white space alone is off."""
    file = series.patch(SECOND)
    file.write_bytes(file.read_bytes().replace(b"\n FILL_29 = 29\n", b"\n FILL_29 =  29\n"))
    with pytest.raises(StackError, match="does not apply"):
        import_series(checkout=series.checkout, upto=SECOND)


def test_a_file_that_the_release_lacks_is_named(series):
    file = series.patch(SECOND)
    file.write_bytes(file.read_bytes().replace(b"vllm/add.py", b"vllm/gone.py"))
    with pytest.raises(StackError, match=r"vllm/gone\.py"):
        import_series(checkout=series.checkout)


def test_a_patch_of_a_file_that_sources_do_not_share_is_refused(series):
    file = series.patch(SECOND)
    file.write_bytes(file.read_bytes().replace(b"vllm/add.py", b"vllm/_version.py"))
    with pytest.raises(StackError, match=f"patches/{SECOND} touches vllm/_version.py"):
        import_series(checkout=series.checkout)


def test_a_touched_file_is_hashed_as_it_was_checked_out(series, monkeypatch):
    real = importing.prepare

    def tampered(folder, checkout, patches):
        base = real(folder, checkout, patches)
        (folder / "vllm/add.py").write_text("tampered\n", encoding="utf-8")
        return base

    monkeypatch.setattr(importing, "prepare", tampered)
    with pytest.raises(StackError, match=r"vllm/add\.py \(touched by patches/core/Add") as caught:
        import_series(checkout=series.checkout)
    blob = shared.load(series.checkout.shared_files).files["vllm/add.py"].blob
    assert f"lists {blob}" in caught.value.message


# What must not be lost.


def test_a_second_import_of_untouched_work_is_allowed(series):
    before = import_series(checkout=series.checkout)
    (series.tree / "notes.log").write_text("ignored by upstream\n", encoding="utf-8")
    assert import_series(checkout=series.checkout) == before
    assert (series.tree / "notes.log").exists()


@pytest.mark.parametrize("kind", ["edit", "new file", "staged", "commit", "commit, then detached"])
def test_work_that_was_not_exported_is_protected(series, kind):
    if kind == "new file":
        (series.tree / "vllm/new.py").write_text("x\n", encoding="utf-8")
        told = "vllm/new.py"
    else:
        (series.tree / "setup.py").write_text("x\n", encoding="utf-8")
        told = "setup.py"
    if kind == "staged":
        series.git("add", "setup.py")
    if kind.startswith("commit"):
        series.git("commit", "-q", "-a", "-m", "My precious")
        told = "My precious"
    if kind.endswith("detached"):
        series.git("checkout", "-q", "--detach", "HEAD~1")
    before = series.git("rev-parse", "HEAD"), series.git("status", "--porcelain")
    with pytest.raises(StackError, match="holds work that was not exported") as caught:
        import_series(checkout=series.checkout)
    assert told in caught.value.message and "--force" in caught.value.hint
    assert before == (series.git("rev-parse", "HEAD"), series.git("status", "--porcelain"))


def test_force_keeps_commits_and_edits_in_git(series):
    commit = series.commit("My precious", {"setup.py": b"committed\n"})
    (series.tree / "setup.py").write_text("edited\n", encoding="utf-8")
    (series.tree / "vllm/new.py").write_text("new\n", encoding="utf-8")
    lines = []
    made = import_series(checkout=series.checkout, force=True, echo=lines.append)
    assert series.git("rev-parse", "HEAD") == made.head
    assert series.git("status", "--porcelain") == ""
    assert series.git("rev-parse", f"kept-{commit[:12]}") == commit
    assert any(f"kept-{commit[:12]}" in line for line in lines)
    assert series.git("show", "stash@{0}:setup.py") == "edited"
    assert series.git("show", "stash@{0}^3:vllm/new.py") == "new"


def test_a_stopped_rebase_is_left_alone_even_with_force(series):
    folder = series.tree / ".git" / "rebase-merge"
    folder.mkdir()
    for force in (False, True):
        with pytest.raises(StackError, match="`git rebase` has stopped half-way"):
            import_series(checkout=series.checkout, force=force)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_import_did_not_make_is_left_alone(series, tmp_path, force):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work\n", encoding="utf-8")
    with pytest.raises(StackError, match="was not made by import"):
        import_series(other, checkout=series.checkout, force=force)
    assert (other / "thesis.txt").read_text() == "years of work\n"


def test_a_file_in_the_place_of_the_folder_is_left_alone(series, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(StackError, match="is not a folder"):
        import_series(tmp_path / "file", checkout=series.checkout)


def test_an_empty_folder_will_do(series, tmp_path):
    (tmp_path / "empty").mkdir()
    made = import_series(tmp_path / "empty", checkout=series.checkout)
    assert (made.path / "vllm/add.py").exists()


@pytest.mark.parametrize("step", ["apply_patch", "_may_replace"])
def test_an_interrupted_import_leaves_the_old_work_tree(series, monkeypatch, step):
    before = series.git("rev-parse", "HEAD")
    real = getattr(importing, step)

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(importing, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_series(checkout=series.checkout)
    assert series.git("rev-parse", "HEAD") == before
    assert [path.name for path in series.tree.parent.iterdir()] == ["vllm"]


def test_an_interrupted_first_import_leaves_nothing(series, monkeypatch, tmp_path):
    real = worktree.write_state

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(worktree, "write_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            import_series(tmp_path / "new", checkout=series.checkout)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))
    assert import_series(tmp_path / "new", checkout=series.checkout).patches


def test_an_empty_series_is_the_release(project):
    made = import_series(checkout=project.checkout)
    assert made.head == made.base and (project.tree / "setup.py").exists()
