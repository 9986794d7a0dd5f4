"""``rebase``: carrying, stopping, resolving, skipping, aborting."""

from __future__ import annotations

import subprocess

import pytest

from stack import rebasing
from stack.errors import StackError
from stack.git import git
from tests.stack.moves.small_project import NEW, text

FILE, OTHER = "vllm/a.py", "vllm/b.py"


def start(project, **options):
    return rebasing.start(project.work, NEW, checkout=project.checkout, **options)


def subjects(project):
    """Of the carried commits, in order."""
    shown = git("log", "--reverse", "--format=%s", f"release-{NEW}..carried", cwd=project.work)
    return shown.lines


def typed(project, *args: str) -> int:
    """A git command as a person types it: without our environment and configuration."""
    return subprocess.run(["git", *args], cwd=project.work, capture_output=True).returncode


@pytest.fixture
def three(simple):
    """A series of three, whose patch ``n`` (from 0) conflicts where the test says so."""

    def make(conflicting: int):
        old = {FILE: text(), OTHER: text()}
        places = [5, 20, 35]
        changed = text((places[conflicting], f"upstream {places[conflicting]}\n"))
        project = simple(old, {FILE: changed, OTHER: "head\n" + text()})
        so_far = []
        for number, place in zip(("one", "two", "three"), places, strict=True):
            so_far.append((place, f"patch {place}\n"))
            project.add(f"Change {number}", {FILE: text(*so_far)})
        return project

    return make


def test_a_clean_series_is_carried_whole(simple):
    project = simple({FILE: text()}, {FILE: "head\n" + text()})
    project.add("One", {FILE: text((10, "ten\n"))})
    project.add("Two", {FILE: text((10, "ten\n"), (30, "thirty\n"))})
    before = project.files()
    assert start(project) is None
    assert subjects(project) == ["One", "Two"]
    assert project.content(FILE, "carried") == "head\n" + text((10, "ten\n"), (30, "thirty\n"))
    assert project.content(FILE, "carried~1") == "head\n" + text((10, "ten\n"))
    assert project.files() == before
    _, carried = rebasing.result(project.work)
    assert [(each.patch, each.dropped) for each in carried] == [
        ("core/One.patch", False),
        ("core/Two.patch", False),
    ]


@pytest.mark.parametrize("conflicting", [0, 1, 2])
def test_it_stops_at_the_patch_in_conflict_and_goes_on(three, conflicting):
    project = three(conflicting)
    before = project.files()
    stop = start(project)
    names = ["one", "two", "three"]
    assert (stop.patch, stop.number, stop.total) == (
        f"core/Change-{names[conflicting]}.patch",
        conflicting + 1,
        3,
    )
    (conflict,) = stop.conflicts
    place = (5, 20, 35)[conflicting]
    assert (conflict.path, conflict.hunks) == (FILE, ((place, place),))
    changes = [(each, f"patch {each}\n") for each in (5, 20, 35)[:conflicting]]
    changes.append((place, f"both {place}\n"))
    project.resolve({FILE: text(*changes)})
    assert rebasing.proceed(project.work) is None
    assert subjects(project) == ["Change one", "Change two", "Change three"]
    changes += [(each, f"patch {each}\n") for each in (5, 20, 35)[conflicting + 1 :]]
    assert project.content(FILE, "carried") == text(*changes)
    assert project.files() == before


def test_author_and_message_survive_a_conflict(simple):
    project = simple({FILE: text()}, {FILE: text((10, "up\n"))})
    body = "# a line that looks like a comment\n\n    #include <x>  \nand  an end"
    project.add("Change ten", {FILE: text((10, "ten\n"))}, body=body)
    wanted = git("log", "-1", "--format=%an%n%ae%n%ai%n%B", cwd=project.commits).text
    start(project)
    project.resolve({FILE: text((10, "both\n"))})
    rebasing.proceed(project.work)
    got = git("log", "-1", "--format=%an%n%ae%n%ai%n%B", "carried", cwd=project.work).text
    assert got == wanted
    assert "\n# a line that looks like a comment\n" in got


def test_continue_refuses_what_is_not_resolved(three):
    project = three(1)
    start(project)
    before = git("rev-parse", "HEAD", cwd=project.work).text
    again = rebasing.proceed(project.work)
    assert again is not None and again.patch == "core/Change-two.patch"
    assert git("rev-parse", "HEAD", cwd=project.work).text == before


def test_continue_refuses_conflict_markers(three):
    project = three(1)
    start(project)
    git("add", FILE, cwd=project.work)
    with pytest.raises(
        StackError, match=r"Change-two.patch: conflict markers are left in vllm/a.py"
    ):
        rebasing.proceed(project.work)
    assert rebasing.in_progress(project.work)
    project.resolve({FILE: text((5, "patch 5\n"), (20, "both\n"))})
    assert rebasing.proceed(project.work) is None


def test_a_row_of_equals_signs_is_no_conflict_marker(three):
    project = three(1)
    start(project)
    project.resolve({FILE: text((5, "patch 5\n"), (20, "both\n=======\n"))})
    assert rebasing.proceed(project.work) is None


def test_continue_refuses_what_was_edited_after_it_was_added(three):
    project = three(1)
    start(project)
    project.resolve({FILE: text((5, "patch 5\n"), (20, "both\n"))})
    (project.work / OTHER).write_text("edited, not added\n")
    with pytest.raises(StackError, match="vllm/b.py is changed but not added"):
        rebasing.proceed(project.work)


def test_skip_drops_the_patch(three):
    project = three(1)
    start(project)
    assert rebasing.skip(project.work) is None
    assert subjects(project) == ["Change one", "Change three"]
    assert project.content(FILE, "carried") == text(
        (5, "patch 5\n"), (20, "upstream 20\n"), (35, "patch 35\n")
    )
    _, carried = rebasing.result(project.work)
    assert [each.dropped for each in carried] == [False, True, False]
    assert carried[1].new is None


def test_skip_with_nothing_to_skip(three):
    project = three(1)
    with pytest.raises(StackError, match="no rebase is in progress"):
        rebasing.skip(project.work)
    start(project)
    rebasing.skip(project.work)
    with pytest.raises(StackError, match="no patch waits"):
        rebasing.skip(project.work)


def test_abort_restores_everything(three):
    project = three(1)
    before = project.files()
    start(project)
    rebasing.abort(project.work)
    assert not project.work.exists()
    assert project.files() == before
    with pytest.raises(StackError, match="no rebase is in progress"):
        rebasing.abort(project.work)
    assert start(project).patch == "core/Change-two.patch"


@pytest.mark.parametrize("bigger", [False, True])
def test_a_patch_that_upstream_has_is_left_out(simple, bigger):
    new = text((10, "ten\n"), *([(25, "x\n"), (11, "eleven\n")] if bigger else []))
    project = simple({FILE: text()}, {FILE: new})
    project.add("Ten", {FILE: text((10, "ten\n"))})
    project.add("Thirty", {FILE: text((10, "ten\n"), (30, "thirty\n"))})
    stop = start(project)
    if stop is not None:  # neighbouring lines: git asks, a person sees that upstream has it
        rebasing.skip(project.work)
    _, carried = rebasing.result(project.work)
    assert [each.new is None for each in carried] == [True, False]
    assert carried[0].dropped == (stop is not None)
    assert subjects(project) == ["Thirty"]


def test_every_patch_may_be_upstream(simple):
    project = simple({FILE: text()}, {FILE: text((10, "ten\n"))})
    project.add("Ten", {FILE: text((10, "ten\n"))})
    assert start(project) is None
    _, carried = rebasing.result(project.work)
    assert [(each.new, each.dropped) for each in carried] == [(None, False)]


def test_a_file_that_upstream_deleted_stops_and_the_change_moves_on(simple):
    project = simple({FILE: text(), OTHER: text()}, {OTHER: text()})
    project.add("Ten", {FILE: text((10, "ten\n"))})
    stop = start(project)
    assert str(stop.conflicts[0]) == f"{FILE} (deleted upstream)"
    project.resolve({FILE: None, OTHER: text((10, "ten\n"))})
    assert rebasing.proceed(project.work) is None
    assert project.content(OTHER, "carried") == text((10, "ten\n"))


def test_a_renamed_file_is_followed(simple):
    project = simple({FILE: text()}, {"vllm/moved.py": text((30, "up\n"))})
    project.add("Ten", {FILE: text((10, "ten\n"))})
    assert start(project) is None
    assert project.content("vllm/moved.py", "carried") == text((10, "ten\n"), (30, "up\n"))


def test_two_conflicts_one_after_the_other(simple):
    project = simple(
        {FILE: text(), OTHER: text()}, {FILE: text((5, "u\n")), OTHER: text((5, "u\n"))}
    )
    project.add("One", {FILE: text((5, "one\n"))})
    project.add("Two", {OTHER: text((5, "two\n"))})
    assert start(project).patch == "core/One.patch"
    project.resolve({FILE: text((5, "both\n"))})
    assert rebasing.proceed(project.work).patch == "core/Two.patch"
    project.resolve({OTHER: text((5, "both\n"))})
    assert rebasing.proceed(project.work) is None
    state, _ = rebasing.result(project.work)
    assert state.by_hand == ["core/One.patch", "core/Two.patch"]


def test_it_does_not_start_over_an_unfinished_or_a_finished_one(three):
    project = three(1)
    start(project)
    with pytest.raises(StackError, match=f"a rebase onto {NEW} is in progress"):
        start(project)
    rebasing.skip(project.work)
    with pytest.raises(StackError, match=f"a rebase onto {NEW} is finished"):
        start(project)
    assert subjects(project) == ["Change one", "Change three"]


def test_it_leaves_a_folder_alone_that_is_not_its_own(three):
    project = three(1)
    project.work.mkdir(parents=True)
    (project.work / "precious").write_text("mine")
    for action in (lambda: start(project), lambda: rebasing.abort(project.work)):
        with pytest.raises(StackError, match="holds no rebase"):
            action()
    assert (project.work / "precious").read_text() == "mine"


def test_a_broken_state_can_be_thrown_away(three):
    project = three(1)
    start(project)
    (project.work / ".git" / rebasing.STATE).write_text("{")
    with pytest.raises(StackError, match="cannot be read"):
        rebasing.proceed(project.work)
    rebasing.abort(project.work)
    assert not project.work.exists()


def test_a_failed_start_leaves_nothing(three, tmp_path):
    project = three(1)
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(b"no archive")
    with pytest.raises(StackError, match="cannot be read"):
        start(project, sdist=broken)
    assert not project.work.exists()
    assert [path.name for path in project.work.parent.glob("rebase*")] == []


def test_commands_typed_by_hand_are_taken_as_they_are(three):
    project = three(1)
    start(project)
    project.resolve({FILE: text((5, "patch 5\n"), (20, "both\n"))})
    env = ("-c", "core.editor=true", "-c", "user.name=x", "-c", "user.email=x@x")
    assert typed(project, *env, "rebase", "--continue") == 0
    assert rebasing.proceed(project.work) is None
    assert subjects(project) == ["Change one", "Change two", "Change three"]


def test_a_rebase_taken_back_by_hand_is_noticed(three):
    project = three(1)
    start(project)
    assert typed(project, "rebase", "--abort") == 0
    # The next command starts over: it stops at the same place.
    assert rebasing.proceed(project.work).patch == "core/Change-two.patch"


def test_a_foreign_commit_on_top_is_named(three):
    project = three(1)
    start(project)
    rebasing.skip(project.work)
    (project.work / "new.py").write_text("x\n")
    git("add", "-A", cwd=project.work)
    git("commit", "-q", "-m", "Something else", cwd=project.work)
    with pytest.raises(StackError, match="'Something else'.*none of the series' patches"):
        rebasing.result(project.work)


def test_result_of_an_unfinished_rebase(three):
    project = three(1)
    start(project)
    with pytest.raises(StackError, match="is not finished"):
        rebasing.result(project.work)


def test_a_stale_lock_is_one_clear_line(three):
    project = three(1)
    start(project)
    lock = project.work / ".git" / "index.lock"
    lock.write_text("")
    with pytest.raises(StackError, match="index.lock exists") as caught:
        rebasing.proceed(project.work)
    assert f"rm {lock}" in caught.value.hint


def test_the_pinned_release_is_no_target(three):
    project = three(1)
    with pytest.raises(StackError, match="1.0.0 is the pinned release"):
        rebasing.start(project.work, "1.0.0", checkout=project.checkout)
