"""What is kept of a finished rebase: the carried series, held to every law, and the report."""

from __future__ import annotations

import functools

import pytest

from stack import __main__ as main_module
from stack import carried, rebase_save, rebasing
from stack.checking import check
from stack.errors import StackError
from stack.git import git
from stack.series import files_in, load_series
from tests.stack.moves.small_project import NEW

FILE, OTHER = "vllm/a.py", "vllm/b.py"


def run(*args: str) -> int:
    """The command line, in this process."""
    return main_module.main(["rebase", *args])


def python(*changes: tuple[int, str]) -> str:
    """Forty assignments, as a file that compiles."""
    return "".join(dict(changes).get(number, f"x{number} = {number}\n") for number in range(1, 41))


@pytest.fixture
def project(simple):
    """A conflict, a patch with a new context, one that is upstream, and one as it was."""
    old = {FILE: python(), OTHER: python(), "tests/test_it.py": "x = 1\n"}
    new = {
        FILE: python((5, "x5 = 'u'\n"), (23, "x23 = 'u'\n")),
        OTHER: python((9, "x9 = 'same'\n")),
        "tests/test_it.py": "x = 1\n",
    }
    project = simple(old, new)
    five = (5, "x5 = 'one'\n")
    project.add("One", {FILE: python(five)})
    project.add("Two", {FILE: python(five, (20, "x20 = 'two'\n"))}, folder="extra")
    project.add("Three", {OTHER: python((9, "x9 = 'same'\n"))})
    project.add("Four", {OTHER: python((9, "x9 = 'same'\n"), (30, "x30 = 'four'\n"))})
    (project.checkout.patches / "README.md").write_text("the manual\n")
    series = project.checkout.patches / "series"
    series.write_text("# Why this order.\n\n" + series.read_text())
    return project


def carry(project):
    """Carry it, settling the one conflict."""
    assert rebasing.start(project.work, NEW, checkout=project.checkout).patch == "core/One.patch"
    project.resolve({FILE: python((5, "x5 = 'u, one'\n"), (23, "x23 = 'u'\n"))})
    assert rebasing.proceed(project.work) is None


def test_the_carried_series_keeps_every_law(project):
    carry(project)
    folder = carried.folder_of(NEW, project.root)
    saved = rebase_save.save(project.work, folder, checkout=project.checkout)
    assert saved.statuses == {
        "core/One.patch": "resolved by hand",
        "extra/Two.patch": "context changed",
        "core/Three.patch": "already upstream",
        "core/Four.patch": "unchanged",
    }
    view = carried.open_carried(NEW, project.root)
    laws = check(view)
    assert [line for law in laws for line in law.violations] == []
    assert not any(law.skipped for law in laws)
    assert [patch.name for patch in load_series(view.patches)] == [
        "core/One.patch",
        "extra/Two.patch",
        "core/Four.patch",
    ]
    assert (view.patches / "series").read_text().startswith("# Why this order.\n\ncore/One.patch\n")
    assert not (view.patches / "README.md").exists()
    assert view.pin.version == NEW
    assert view.pin.commit == "110aaaaaa"
    assert view.pin.patched_tree == git("rev-parse", "carried^{tree}", cwd=project.work).text


def test_the_check_command_takes_a_carried_release(project, capsys, monkeypatch):
    monkeypatch.setitem(main_module.COMMANDS, "check", "stack.commands.check")
    monkeypatch.setattr(
        carried, "open_carried", functools.partial(carried.open_carried, root=project.root)
    )
    assert main_module.main(["check", "--release", NEW]) == 1
    assert f"no series is carried to {NEW}" in capsys.readouterr().err
    carry(project)
    assert run("--save") == 0
    assert main_module.main(["check", "--release", NEW]) == 0
    assert "3 patches apply without fuzz" in capsys.readouterr().out


def test_check_sees_a_carried_patch_that_was_tampered_with(project):
    carry(project)
    folder = carried.folder_of(NEW, project.root)
    rebase_save.save(project.work, folder, checkout=project.checkout)
    path = folder / "patches" / "core" / "One.patch"
    path.write_bytes(path.read_bytes().replace(b"'u, one'", b"'u, two'"))
    broken = {law.name for law in check(carried.open_carried(NEW, project.root)) if law.violations}
    assert "tree" in broken or "apply" in broken


def test_the_replay_gives_the_carried_series_again(project, capsys):
    carry(project)
    assert run("--save") == 0
    folder = carried.folder_of(NEW, project.root)
    first = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert run("--abort") == 0
    assert run("--onto", NEW, "--save") == 0
    again = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    report = next(path for path in first if path.name == carried.REPORT)
    assert first.pop(report).replace(b"resolved by hand", b"resolution replayed") != b""
    assert b"| `core/One.patch` | resolution replayed |" in again.pop(report)
    assert again == first
    assert files_in(folder / "patches") == ["core/Four.patch", "core/One.patch", "extra/Two.patch"]


def test_the_report_has_a_line_a_patch_and_the_range_diff(project):
    carry(project)
    folder = carried.folder_of(NEW, project.root)
    rebase_save.save(project.work, folder, checkout=project.checkout)
    report = (folder / carried.REPORT).read_text()
    assert "4 patches: 1 unchanged, 1 context changed, 1 resolved by hand, 1 already upstream." in (
        report
    )
    assert "| `extra/Two.patch` | context changed |" in report
    assert "### core/One.patch" in report
    assert "### core/Four.patch" not in report
    assert "-+x5 = 'one'" in report and "++x5 = 'u, one'" in report
    assert all(line == line.rstrip() for line in report.splitlines())


def test_an_unfinished_rebase_is_not_saved(project):
    rebasing.start(project.work, NEW, checkout=project.checkout)
    folder = carried.folder_of(NEW, project.root)
    with pytest.raises(StackError, match="is not finished"):
        rebase_save.save(project.work, folder, checkout=project.checkout)
    assert not folder.exists()


def test_a_carried_commit_that_breaks_a_law_is_not_saved(project):
    carry(project)
    message = "Four\n\nNo trailers any more.\n"
    git("commit", "-q", "--amend", "-F", "-", cwd=project.work, input=message)
    folder = carried.folder_of(NEW, project.root)
    with pytest.raises(StackError, match="trailer Scope is missing"):
        rebase_save.save(project.work, folder, checkout=project.checkout)
    assert not folder.exists()


def test_another_folder_is_not_overwritten(project, tmp_path):
    carry(project)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    with pytest.raises(StackError, match="holds no carried series"):
        rebase_save.save(project.work, folder, checkout=project.checkout)
    assert [path.name for path in folder.iterdir()] == ["precious"]


def test_a_release_without_a_carried_series(project):
    with pytest.raises(StackError, match="no series is carried to 9.9.9") as caught:
        carried.open_carried("9.9.9", project.root)
    assert caught.value.hint == "carried: none"


def test_the_commands_say_what_to_type_next(project, capsys):
    assert run("--onto", NEW) == 3
    out = capsys.readouterr().out
    assert "[1/4] patches/core/One.patch: conflict" in out
    assert f"{FILE} (1 hunk: 5)" in out
    assert f"/{FILE}\n" in out and " add vllm/a.py" in out
    assert "python -m stack rebase --continue" in out
    assert run("--status") == 3
    assert "patches/core/One.patch: conflict" in capsys.readouterr().out
    assert run("--onto", NEW) == 1
    assert "in progress" in capsys.readouterr().err
    assert run("--save") == 1
    assert "is not finished" in capsys.readouterr().err
    project.resolve({FILE: python((5, "x5 = 'u, one'\n"), (23, "x23 = 'u'\n"))})
    assert run("--continue") == 0
    out = capsys.readouterr().out
    assert f"1.0.0 -> {NEW}, 4 patches: 1 unchanged" in out
    assert "core/One.patch    resolved by hand" in out
    assert "rebase --save" in out and "rebase --write" in out
    assert run("--status") == 0
    assert run("--abort") == 0
    assert not project.work.exists()
    assert run("--status") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to do"),
        (("--save", "--write"), "exclude each other"),
        (("--save", "x", "--commit", "a" * 40), "--commit goes with --write"),
        (("--continue", "--no-replay"), "--no-replay goes with --onto"),
        (("--abort", "--write"), "need a finished rebase"),
        (("--onto", "main"), "'main' is no release"),
        (("--continue",), "no rebase is in progress"),
    ],
)
def test_wrong_usage_is_one_clear_line(project, capsys, arguments, message):
    assert run(*arguments) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and message in err[0]


def test_two_rebases_at_once(project, capsys):
    with rebasing.locked(project.work):
        assert run("--onto", NEW) == 1
    assert "another rebase is running" in capsys.readouterr().err
