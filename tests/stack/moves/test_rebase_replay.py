"""Recorded resolutions: a second rebase needs no hands, and a changed patch is not run over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from stack import rebase_report, rebase_save, rebasing, resolutions
from stack.errors import StackError
from stack.git import git
from stack.pin import ROOT
from tests.stack.moves.small_project import NEW, text

FILE, OTHER, THIRD = "vllm/a.py", "vllm/b.py", "vllm/c.py"


def start(project, record=None, **options):
    return rebasing.start(project.work, NEW, checkout=project.checkout, recorded=record, **options)


def record(project, folder: Path) -> resolutions.Resolutions:
    """Keep what the finished rebase took, throw the rebase away, and say what was kept."""
    _, carried = rebasing.result(project.work)
    resolutions.save(folder, rebase_save.learn(project.work, carried))
    rebasing.abort(project.work)
    return resolutions.load(folder)


def tree(project, commit="carried"):
    return git("rev-parse", f"{commit}^{{tree}}", cwd=project.work).text


def statuses(project):
    state, carried = rebasing.result(project.work)
    return rebase_report.table(
        project.work, state, carried, rebase_save.learn(project.work, carried)
    )


@pytest.fixture
def conflicting(simple):
    """Two patches, each in conflict, with a third between them that is not."""
    project = simple(
        {FILE: text(), OTHER: text(), THIRD: text()},
        {FILE: text((5, "u 5\n"), (30, "u 30\n")), OTHER: text((9, "u\n")), THIRD: text()},
    )
    project.add("One", {FILE: text((5, "one\n"))})
    project.add("Two", {THIRD: text((5, "two\n"))})
    project.add("Three", {FILE: text((5, "one\n"), (30, "three\n")), OTHER: text((9, "three\n"))})
    return project


def settle(project):
    """Carry ``conflicting`` by hand; return the tree."""
    assert start(project).patch == "core/One.patch"
    project.resolve({FILE: text((5, "u 5 and one\n"), (30, "u 30\n"))})
    assert rebasing.proceed(project.work).patch == "core/Three.patch"
    done = text((5, "u 5 and one\n"), (30, "u 30 and three\n"))
    project.resolve({FILE: done, OTHER: text((9, "u and three\n"))})
    assert rebasing.proceed(project.work) is None
    return tree(project)


def test_the_record_settles_text_conflicts_without_hands(conflicting, tmp_path):
    wanted = settle(conflicting)
    assert list(statuses(conflicting).values()) == [
        "resolved by hand",
        "unchanged",
        "resolved by hand",
    ]
    kept = record(conflicting, tmp_path / "kept")
    assert len({name.partition("/")[0] for name in kept.rerere}) == 3
    assert not kept.amendments
    assert start(conflicting, tmp_path / "kept") is None
    assert tree(conflicting) == wanted
    assert list(statuses(conflicting).values()) == [
        "resolution replayed",
        "unchanged",
        "resolution replayed",
    ]
    # What is learned from a replay is what was learned from the hands.
    again = record(conflicting, tmp_path / "again")
    assert again == kept


def test_without_the_record_it_stops(conflicting, tmp_path):
    settle(conflicting)
    record(conflicting, tmp_path / "kept")
    assert start(conflicting).patch == "core/One.patch"


def test_the_record_holds_where_the_file_changed_elsewhere(conflicting, tmp_path):
    settle(conflicting)
    record(conflicting, tmp_path / "kept")
    conflicting.release(
        NEW,
        {
            FILE: "head\n" + text((5, "u 5\n"), (30, "u 30\n")),
            OTHER: text((9, "u\n")),
            THIRD: text(),
        },
    )
    assert start(conflicting, tmp_path / "kept") is None
    assert conflicting.content(FILE, "carried") == "head\n" + text(
        (5, "u 5 and one\n"), (30, "u 30 and three\n")
    )


def test_how_the_conflict_was_settled_does_not_matter(conflicting, tmp_path):
    # Plain git, by a user whose rerere is off: nothing was recorded at that time.
    start(conflicting)
    conflicting.resolve({FILE: text((5, "u 5 and one\n"), (30, "u 30\n"))})
    plain = ["git", "-c", "rerere.enabled=false", "-c", "core.editor=true"]
    plain += ["-c", "user.name=x", "-c", "user.email=x@x", "rebase", "--continue"]
    subprocess.run(plain, cwd=conflicting.work, capture_output=True)
    done = text((5, "u 5 and one\n"), (30, "u 30 and three\n"))
    conflicting.resolve({FILE: done, OTHER: text((9, "u and three\n"))})
    subprocess.run(plain, cwd=conflicting.work, capture_output=True)
    wanted = tree(conflicting)
    record(conflicting, tmp_path / "kept")
    assert start(conflicting, tmp_path / "kept") is None
    assert tree(conflicting) == wanted


HOSTILE = """
[rerere]
	enabled = false
[merge]
	conflictStyle = {style}
[rebase]
	autosquash = true
	autostash = true
	updateRefs = true
[diff]
	noprefix = true
	algorithm = minimal
	renames = copies
[commit]
	gpgSign = true
	cleanup = strip
[core]
	autocrlf = true
	hooksPath = {hooks}
	abbrev = 4
[color]
	ui = always
"""


@pytest.mark.parametrize("style", ["diff3", "zdiff3"])
def test_a_users_configuration_changes_nothing(conflicting, tmp_path, monkeypatch, style):
    wanted = settle(conflicting)
    kept = record(conflicting, tmp_path / "kept")
    home, hooks = tmp_path / "home", tmp_path / "hooks"
    home.mkdir()
    hooks.mkdir()
    for name in ("pre-commit", "commit-msg", "post-checkout", "pre-rebase"):
        (hooks / name).write_text("#!/bin/sh\nexit 1\n")
        (hooks / name).chmod(0o755)
    (home / ".gitconfig").write_text(HOSTILE.format(style=style, hooks=hooks))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    monkeypatch.setenv("GIT_SEQUENCE_EDITOR", "false")
    monkeypatch.setenv("GIT_EDITOR", "false")
    monkeypatch.setenv("GIT_COMMITTER_NAME", "someone else")
    # A replay, and a rebase by hand in which the user's own git writes the conflict again.
    assert start(conflicting, tmp_path / "kept") is None
    assert tree(conflicting) == wanted
    rebasing.abort(conflicting.work)
    start(conflicting)
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    shown = subprocess.run(
        ["git", "checkout", "-m", "--", FILE],
        cwd=conflicting.work,
        env=env,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert "|||||||" not in (conflicting.work / FILE).read_text()
    conflicting.resolve({FILE: text((5, "u 5 and one\n"), (30, "u 30\n"))})
    rebasing.proceed(conflicting.work)
    done = text((5, "u 5 and one\n"), (30, "u 30 and three\n"))
    conflicting.resolve({FILE: done, OTHER: text((9, "u and three\n"))})
    assert rebasing.proceed(conflicting.work) is None
    assert record(conflicting, tmp_path / "again") == kept


def test_an_edit_outside_the_conflict_is_an_amendment(conflicting, tmp_path):
    start(conflicting)
    conflicting.resolve(
        {FILE: text((5, "u 5\n"), (30, "u 30\n")), THIRD: text((20, "one went here\n"))}
    )
    rebasing.proceed(conflicting.work)
    rebasing.skip(conflicting.work)
    wanted = tree(conflicting)
    kept = record(conflicting, tmp_path / "kept")
    (amendment,) = kept.amendments.values()
    assert b"+one went here" in amendment.diff and b"a.py" not in amendment.diff
    assert list(kept.dropped) == ["core/Three.patch"]
    assert start(conflicting, tmp_path / "kept") is None
    assert tree(conflicting) == wanted
    assert list(statuses(conflicting).values()) == ["resolution replayed", "unchanged", "dropped"]


def test_a_conflict_settled_with_nothing_left_is_a_drop(conflicting, tmp_path):
    start(conflicting)
    conflicting.resolve({FILE: text((5, "u 5\n"), (30, "u 30\n"))})
    assert rebasing.proceed(conflicting.work).patch == "core/Three.patch"
    rebasing.skip(conflicting.work)
    wanted = tree(conflicting)
    assert list(statuses(conflicting).values()) == ["dropped", "unchanged", "dropped"]
    kept = record(conflicting, tmp_path / "kept")
    assert sorted(kept.dropped) == ["core/One.patch", "core/Three.patch"]
    assert start(conflicting, tmp_path / "kept") is None
    assert tree(conflicting) == wanted


def test_an_edit_of_a_patch_without_a_conflict_is_an_amendment(simple, tmp_path):
    project = simple({FILE: text(), OTHER: text()}, {FILE: text(), OTHER: "head\n" + text()})
    project.add("One", {FILE: text((5, "one\n"))})
    project.add("Two", {OTHER: text((5, "two\n"))})
    assert start(project) is None
    # As a person does it: a fixup commit, squashed.
    (project.work / FILE).write_text(text((5, "one, for the new release\n")))
    env = {**os.environ, "GIT_SEQUENCE_EDITOR": "true", "GIT_EDITOR": "true"}
    for command in (
        ["commit", "-a", "--fixup=carried~1"],
        ["rebase", "-i", "--autosquash", f"release-{NEW}"],
    ):
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", *identity, *command], cwd=project.work, env=env, check=True)
    wanted = tree(project)
    assert list(statuses(project).values()) == ["amended", "unchanged"]
    kept = record(project, tmp_path / "kept")
    assert list(kept.amendments) == ["core/One.patch"] and not kept.rerere
    assert start(project, tmp_path / "kept") is None
    assert tree(project) == wanted
    assert project.content(FILE, "carried~1") == text((5, "one, for the new release\n"))
    assert list(statuses(project).values()) == ["amended", "unchanged"]


def test_a_file_that_upstream_deleted_is_an_amendment(simple, tmp_path):
    project = simple({FILE: text(), OTHER: text()}, {OTHER: text()})
    project.add("One", {FILE: text((5, "one\n"))})
    project.add("Two", {OTHER: text((20, "two\n"))})
    start(project)
    project.resolve({FILE: None, OTHER: text((5, "one\n"))})
    assert rebasing.proceed(project.work) is None
    wanted = tree(project)
    kept = record(project, tmp_path / "kept")
    assert kept.amendments["core/One.patch"].unmerged == (FILE,)
    assert start(project, tmp_path / "kept") is None
    assert tree(project) == wanted


def test_a_patch_whose_merge_is_empty_lives_on_in_its_amendment(simple, tmp_path):
    # Upstream has the change in one file; the hook that is still wanted goes to another.
    project = simple({FILE: text(), OTHER: text()}, {FILE: text((5, "one\n")), OTHER: text()})
    project.add("One", {FILE: text((5, "one\n"))})
    project.add("Two", {OTHER: text((20, "two\n"))})
    assert start(project) is None
    old = dict(rebasing.load_state(project.work).patches)["core/One.patch"]
    git("checkout", "-q", f"release-{NEW}", cwd=project.work)
    (project.work / OTHER).write_text(text((5, "one\n")))
    git("commit", "-q", "-a", "-C", old, cwd=project.work)
    git("cherry-pick", "carried", cwd=project.work)
    git("checkout", "-q", "-B", "carried", cwd=project.work)
    wanted = tree(project)
    kept = record(project, tmp_path / "kept")
    assert b"b.py" in kept.amendments["core/One.patch"].diff
    assert start(project, tmp_path / "kept") is None
    assert tree(project) == wanted
    assert git("log", "--format=%s", "-2", "carried", cwd=project.work).lines == ["Two", "One"]


def test_a_new_message_is_kept(simple, tmp_path):
    project = simple({FILE: text()}, {FILE: "head\n" + text()})
    project.add("One", {FILE: text((5, "one\n"))})
    assert start(project) is None
    message = resolutions.message_of(project.work, "carried") + "Depends: nothing\n"
    git("commit", "-q", "--amend", "-F", "-", cwd=project.work, input=message)
    kept = record(project, tmp_path / "kept")
    assert kept.amendments["core/One.patch"].message == message
    assert start(project, tmp_path / "kept") is None
    assert resolutions.message_of(project.work, "carried") == message


@pytest.mark.parametrize("what", ["amendment", "drop", "conflict"])
def test_a_patch_that_changed_since_is_not_run_over(simple, tmp_path, what):
    project = simple(
        {FILE: text(), OTHER: text()}, {FILE: text((5, "u\n")), OTHER: text((20, "u\n"))}
    )
    name = project.add("One", {FILE: text((5, "one\n"))})
    assert start(project).patch == name
    if what == "drop":
        assert rebasing.skip(project.work) is None
    else:
        changes = {FILE: text((5, "u and one\n"))}
        if what == "amendment":
            changes[OTHER] = text((20, "u\n"), (30, "one too\n"))
        project.resolve(changes)
        assert rebasing.proceed(project.work) is None
    record(project, tmp_path / "kept")
    path = project.checkout.patches / name
    path.write_bytes(path.read_bytes().replace(b"+one\n", b"+ one\n"))
    stop = start(project, tmp_path / "kept")
    assert stop is not None and stop.patch == name
    assert rebasing.load_state(project.work).amended == []


@pytest.mark.parametrize("what", ["amendment", "conflict and amendment", "drop"])
def test_what_was_recorded_of_a_patch_that_changed_since_is_not_left_out(simple, tmp_path, what):
    """Though git has no conflict in the changed patch, or knows the one again that it has."""
    head = (5, "u\n") if what == "conflict and amendment" else (40, "u\n")
    project = simple({FILE: text(), OTHER: text()}, {FILE: text(head), OTHER: text()})
    name = project.add("One", {FILE: text((5, "one\n"), (25, "one\n"))})
    stop = start(project)
    if what == "conflict and amendment":
        assert stop.patch == name
        project.resolve({FILE: text((5, "u and one\n"), (25, "one\n")), OTHER: text((9, "new\n"))})
        assert rebasing.proceed(project.work) is None
    elif what == "amendment":
        (project.work / OTHER).write_text(text((9, "new\n")))
        git("commit", "-q", "-a", "--amend", "--no-edit", cwd=project.work)
    record(project, tmp_path / "kept")
    if what == "drop":
        # Of another form of the patch.
        dropped = {"amendments": {}, "dropped": {name: "0" * 64}}
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "record.json").write_text(json.dumps(dropped))
    path = project.checkout.patches / name
    before, _, after = path.read_bytes().rpartition(b"+one\n")
    path.write_bytes(before + b"+ one\n" + after)
    stop = start(project, tmp_path / "kept")
    assert stop is not None and (stop.patch, stop.conflicts) == (name, ())
    assert "changed since a resolution of it was recorded" in stop.reason
    (project.work / OTHER).write_text(text((9, "for the new form\n")))
    git("commit", "-q", "-a", "--amend", "--no-edit", cwd=project.work)
    assert rebasing.proceed(project.work) is None
    assert project.content(OTHER) == text((9, "for the new form\n"))
    (status,) = statuses(project).values()
    assert status == ("resolved by hand" if what.startswith("conflict") else "amended")


def test_a_record_that_does_not_fit_the_release_stops_at_its_patch(simple, tmp_path):
    project = simple({FILE: text(), OTHER: text()}, {FILE: text(), OTHER: text()})
    project.add("One", {FILE: text((5, "one\n"))})
    assert start(project) is None
    (project.work / OTHER).write_text(text((20, "here\n")))
    git("commit", "-q", "-a", "--amend", "--no-edit", cwd=project.work)
    record(project, tmp_path / "kept")
    project.release(NEW, {FILE: text(), OTHER: text((19, "other\n"))})
    stop = start(project, tmp_path / "kept")
    assert (stop.patch, stop.conflicts) == ("core/One.patch", ())
    assert "amendment does not apply" in stop.reason


def test_a_malformed_record_is_named(conflicting, tmp_path):
    settle(conflicting)
    kept = tmp_path / "kept"
    record(conflicting, kept)
    whole = json.loads((kept / "record.json").read_text())
    broken = [b"{", b"[]", b'{"amendments": {"../x.patch": {}}, "dropped": {}}']
    broken.append(json.dumps(whole | {"dropped": {"core/x.patch": 3}}).encode())
    for data in broken:
        (kept / "record.json").write_bytes(data)
        with pytest.raises(StackError, match="record.json is malformed"):
            start(conflicting, kept)
    (kept / "record.json").unlink()
    with pytest.raises(StackError, match="record.json does not exist"):
        start(conflicting, kept)
    assert not conflicting.work.exists()


DRIVER = """
    import sys
    from pathlib import Path
    from stack import download, rebasing, git as git_module
    from stack.checkout import Checkout
    root, work, sdist, kept, slow = sys.argv[1:]
    real = git_module._executable
    git_module._executable = lambda: slow
    rebasing.start(Path(work), "{new}", checkout=Checkout(Path(root)), sdist=Path(sdist),
                   recorded=Path(kept))
"""


@pytest.mark.parametrize("nth", range(1, 7))
def test_it_goes_on_after_a_kill(conflicting, tmp_path, nth):
    """Kill everything at the n-th object that git rebase is about to write, then go on."""
    wanted = settle(conflicting)
    kept = tmp_path / "kept"
    record(conflicting, kept)
    # A hook that git runs in the middle of each pick: after the commit, or at the checkout.
    mark = tmp_path / "reached"
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in ("post-commit", "prepare-commit-msg", "post-checkout", "post-rewrite"):
        hook = hooks / name
        hook.write_text(
            f"#!/bin/sh\necho x >> {mark}\n"
            f'[ "$(wc -l < {mark})" -eq {nth} ] && touch {mark}.now && sleep 60\nexit 0\n'
        )
        hook.chmod(0o755)
    slow = tmp_path / "git"
    slow.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then exec {shutil.which("git")} '
        f'-c core.hooksPath={hooks} "$@"; fi\nexec {shutil.which("git")} "$@"\n'
    )
    slow.chmod(0o755)
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER.format(new=NEW)))
    arguments = [conflicting.root, conflicting.work, conflicting.sdists[NEW], kept, slow]
    process = subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not Path(f"{mark}.now").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it was too fast to be killed"
    for name in ("index.lock", "HEAD.lock"):
        (conflicting.work / ".git" / name).unlink(missing_ok=True)
    assert rebasing.proceed(conflicting.work) is None
    assert tree(conflicting) == wanted
    _, carried = rebasing.result(conflicting.work)
    assert all(each.new for each in carried)
