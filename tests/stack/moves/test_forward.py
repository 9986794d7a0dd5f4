"""``forward``: the four outcomes, what follows from what was left out, and the reports."""

from __future__ import annotations

import json
import re

import pytest

from stack import __main__ as main_module
from stack import release_index
from stack.errors import StackError
from stack.forwarding import forward, series_digest
from stack.trial import Outcome
from tests.stack.moves.small_project import NEW, text

FILE = "vllm/a.py"


def outcomes(project, version=NEW):
    """Patch -> outcome on one release."""
    (result,) = forward([version], checkout=project.checkout)
    return {line.patch: line.trial.outcome for line in result.lines}


def only(project):
    """The single line of a series of one patch."""
    (result,) = forward([NEW], checkout=project.checkout)
    (line,) = result.lines
    return line.trial


def test_a_patch_whose_lines_moved_applies(simple):
    project = simple({FILE: text()}, {FILE: "new head\n" * 3 + text()})
    project.add("Change line ten", {FILE: text((10, "ten\n"))})
    assert only(project).outcome is Outcome.APPLIES


def test_a_changed_context_needs_the_three_way_merge(simple):
    project = simple({FILE: text()}, {FILE: text((13, "upstream\n"))})
    project.add("Change line ten", {FILE: text((10, "ten\n"))})
    assert only(project).outcome is Outcome.THREE_WAY


def test_a_renamed_file_needs_the_three_way_merge(simple):
    project = simple({FILE: text()}, {"vllm/b.py": text((30, "upstream\n"))})
    project.add("Change line ten", {FILE: text((10, "ten\n"))})
    assert only(project).outcome is Outcome.THREE_WAY


def test_a_conflict_names_the_lines_of_the_releases_file(simple):
    # The patch's first hunk applies and adds two lines: the release's own numbers are wanted.
    new = "head\n" * 5 + text((20, "upstream 20\n"), (21, "upstream 21\n"))
    project = simple({FILE: text()}, {FILE: new})
    mine = text((4, "line 4\nadded\nadded\n"), (20, "ours 20\n"), (21, "ours 21\n"))
    project.add("Change three places", {FILE: mine})
    trial = only(project)
    assert trial.outcome is Outcome.CONFLICT
    (conflict,) = trial.conflicts
    assert (conflict.path, conflict.reason, conflict.hunks) == (
        FILE,
        "changed by both",
        ((25, 26),),
    )
    assert str(conflict) == f"{FILE} (1 hunk: 25-26)"


def test_a_conflict_counts_each_region(simple):
    project = simple({FILE: text()}, {FILE: text((5, "up 5\n"), (30, "up 30\n"))})
    project.add("Change two places", {FILE: text((5, "we 5\n"), (30, "we 30\n"))})
    (conflict,) = only(project).conflicts
    assert conflict.hunks == ((5, 5), (30, 30))
    assert str(conflict) == f"{FILE} (2 hunks: 5, 30)"


def test_a_file_that_upstream_deleted_is_a_conflict(simple):
    project = simple({FILE: text(), "vllm/keep.py": "x\n"}, {"vllm/keep.py": "x\n"})
    project.add("Change line ten", {FILE: text((10, "ten\n"))})
    trial = only(project)
    assert trial.outcome is Outcome.CONFLICT
    assert str(trial.conflicts[0]) == f"{FILE} (deleted upstream)"


def test_a_file_that_both_add_is_a_conflict(simple):
    project = simple({FILE: text()}, {FILE: text(), "vllm/n.py": "theirs\n"})
    project.add("Add a file", {"vllm/n.py": "ours\n"})
    (conflict,) = only(project).conflicts
    assert (conflict.path, conflict.reason) == ("vllm/n.py", "added by both")


def test_the_same_change_is_already_upstream(simple):
    mine = text((10, "ten\n"))
    project = simple({FILE: text()}, {FILE: mine})
    project.add("Change line ten", {FILE: mine})
    assert only(project).outcome is Outcome.UPSTREAM


def test_the_same_change_within_a_bigger_one_is_already_upstream(simple):
    project = simple({FILE: text()}, {FILE: text((10, "ten\n"), (25, "x\n"), (30, "y\n"))})
    project.add("Change line ten", {FILE: text((10, "ten\n"))})
    assert only(project).outcome is Outcome.UPSTREAM


def test_a_change_that_upstream_made_and_moved_is_already_upstream(simple):
    # A merge sees lines deleted here and added there; taken back, the patch finds them.
    rows = text().splitlines(keepends=True)
    moved = [*rows[:7], *rows[14:], *rows[7:10], "eleven\n", *rows[11:14], "end\n"]
    project = simple({FILE: text()}, {FILE: "".join(moved)})
    project.add("Change line eleven", {FILE: text((11, "eleven\n"))})
    trial = only(project)
    assert trial.outcome is Outcome.UPSTREAM
    assert "taking the patch back" in trial.note


def test_a_part_that_is_upstream_is_told(simple):
    project = simple({FILE: text()}, {FILE: text((10, "ten\n"))})
    project.add("Change two places", {FILE: text((10, "ten\n"), (30, "thirty\n"))})
    trial = only(project)
    assert trial.outcome is Outcome.THREE_WAY
    assert trial.note == "part of it is in the release already"


def test_a_conflict_whose_added_lines_are_all_there_is_told(simple):
    project = simple({FILE: text()}, {FILE: text((10, "ten\nand more\n"))})
    project.add("Change line ten", {FILE: text((10, "ten\n"))})
    trial = only(project)
    assert trial.outcome is Outcome.CONFLICT
    assert "perhaps upstream has it" in trial.note


def test_patches_are_tried_on_what_applied_before(simple):
    project = simple({FILE: text()}, {FILE: "head\n" + text()})
    project.add("First", {FILE: text((10, "ten\n"))})
    project.add("Second", {FILE: text((10, "ten again\n"))})
    assert set(outcomes(project).values()) == {Outcome.APPLIES}


def test_a_patch_in_conflict_is_left_out_and_named_to_those_that_depend_on_it(simple):
    project = simple(
        {FILE: text(), "vllm/b.py": text()}, {FILE: text((10, "up\n")), "vllm/b.py": text()}
    )
    first = project.add("First", {FILE: text((10, "ten\n"))})
    project.add("Second", {"vllm/b.py": text((5, "five\n"))})
    project.add("Third", {FILE: text((10, "ten again\n"))}, depends=first)
    (result,) = forward([NEW], checkout=project.checkout)
    told = [(line.trial.outcome, line.missing) for line in result.lines]
    assert told == [
        (Outcome.CONFLICT, ()),
        (Outcome.APPLIES, ()),
        (Outcome.CONFLICT, (first,)),
    ]


def test_a_patch_that_is_upstream_is_not_missing(simple):
    project = simple({FILE: text()}, {FILE: text((10, "ten\n"))})
    first = project.add("First", {FILE: text((10, "ten\n"))})
    project.add("Second", {FILE: text((10, "ten again\n"))}, depends=first)
    (result,) = forward([NEW], checkout=project.checkout)
    assert [(line.trial.outcome, line.missing) for line in result.lines] == [
        (Outcome.UPSTREAM, ()),
        (Outcome.APPLIES, ()),
    ]


def test_an_interrupted_merge_of_one_patch_leaves_nothing_to_the_next(simple):
    # The first patch conflicts in one file and applies to another: neither change may stay.
    old = {FILE: text(), "vllm/b.py": text()}
    project = simple(old, {FILE: text((10, "up\n")), "vllm/b.py": text()})
    project.add("First", {FILE: text((10, "ten\n")), "vllm/b.py": text((5, "five\n"))})
    project.add("Second", {"vllm/b.py": text((5, "five again\n"))})
    assert list(outcomes(project).values()) == [Outcome.CONFLICT, Outcome.CONFLICT]


def run(*args: str) -> int:
    """The command line, in this process."""
    return main_module.main(["forward", *args])


def test_the_command_reports_and_says_by_its_status_that_there_is_a_conflict(
    simple, capsys, tmp_path
):
    project = simple({FILE: text()}, {FILE: text((10, "up\n"))})
    project.release("1.2.0", {FILE: text()})
    conflicting = project.add("First | of two", {FILE: text((10, "ten\n"))})
    fine = project.add("Second", {FILE: text((10, "ten\n"), (30, "thirty\n"))})
    before = project.files()
    page, table = tmp_path / "r.md", tmp_path / "r.json"
    status = run("1.2.0", NEW, "1.2.0", "--markdown", str(page), "--json", str(table))
    assert status == 3
    out = capsys.readouterr().out
    assert f"  {conflicting}: conflict: {FILE} (1 hunk: 10)" in out
    assert f"{NEW}: 1 applies, 1 conflict" in out
    assert "1.2.0: 2 applies" in out

    told = json.loads(table.read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", told["made"])
    assert told["series"]["sha256"] == series_digest(project.checkout.patches)
    assert [release["version"] for release in told["releases"]] == ["1.2.0", NEW]
    assert told["releases"][1]["sdist"]["filename"] == f"vllm-{NEW}.tar.gz"
    (first, second) = told["releases"][1]["patches"]
    assert first == {
        "patch": conflicting,
        "outcome": "conflict",
        "conflicts": [{"path": FILE, "reason": "changed by both", "hunks": [[10, 10]]}],
        "note": "",
        "missing": [],
    }
    assert (second["patch"], second["outcome"]) == (fine, "applies")
    shown = page.read_text()
    assert f"| `{conflicting}` | applies | conflict |" in shown
    assert told["pin"]["commit"] in shown and told["series"]["sha256"] in shown
    assert project.files() == before
    assert not list((project.root / ".build").glob("*forward-*"))


def test_the_command_is_content_where_everything_applies(simple, capsys):
    project = simple({FILE: text()}, {FILE: text()})
    project.add("First", {FILE: text((10, "ten\n"))})
    assert run(NEW) == 0


def test_latest_is_the_indexs_newest(simple, capsys, monkeypatch):
    project = simple({FILE: text()}, {FILE: text()})
    project.add("First", {FILE: text((10, "ten\n"))})
    monkeypatch.setattr(release_index, "newest", lambda name: NEW)
    assert run("latest") == 0
    assert f"{NEW}: 1 applies" in capsys.readouterr().out


def test_latest_may_be_the_pinned_release(simple, capsys, monkeypatch, tmp_path):
    project = simple({FILE: text()}, {FILE: text()})
    project.add("First", {FILE: text((10, "ten\n"))})
    monkeypatch.setattr(release_index, "newest", lambda name: "1.0.0")
    page = tmp_path / "r.md"
    assert run("latest", "--markdown", str(page)) == 0
    assert "nothing to try" in capsys.readouterr().out
    assert "no release is later" in page.read_text()


@pytest.mark.parametrize(
    ("release", "message", "hint"),
    [
        ("v1.1.0", "'v1.1.0' is no release", "0.23.0"),
        ("1.0.0", "1.0.0 is not later than the pinned release 1.0.0", "latest"),
        ("1.1.5", "no sdist of vllm 1.1.5", "the nearest are 1.0.5, 1.1.0, 1.2.0, 1.10.0"),
    ],
)
def test_a_release_that_cannot_be_tried_is_one_clear_line(
    simple, capsys, monkeypatch, release, message, hint
):
    simple({FILE: text()}, {FILE: text()}).add("First", {FILE: text((10, "ten\n"))})
    has = ["1.0.0", "1.0.5", "1.1.0", "1.2.0", "1.10.0"]
    monkeypatch.setattr(release_index, "_listed", lambda project: [])
    monkeypatch.setattr(release_index, "_versions", lambda packages: has)
    assert run(release) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert message in lines[0]
    assert hint in lines[1]


def test_a_series_that_does_not_apply_to_its_own_release_is_an_error(simple):
    project = simple({FILE: text()}, {FILE: text()})
    name = project.add("First", {FILE: text((10, "ten\n"))})
    path = project.checkout.patches / name
    path.write_bytes(path.read_bytes().replace(b"-line 10", b"-line 11"))
    with pytest.raises(StackError, match="does not apply"):
        forward([NEW], checkout=project.checkout)
