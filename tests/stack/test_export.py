"""``export``: normal form, placement, refusals, and all or nothing."""

from __future__ import annotations

import subprocess

import pytest

from stack import exporting, laws, pinfile
from stack.errors import StackError
from stack.exporting import export_series
from stack.importing import import_series
from stack.pin import load_pin

FIRST, SECOND = "core/Add-three-numbers.patch", "extra/Subtract-twice.patch"

GOLDEN = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: Ren\u00e9 <rene@example.org>
Date: Mon, 1 Jun 2026 10:00:00 +0200
Subject: [PATCH] [Doc] Name the caf\u00e9

Because the test wants it.

Kind: core
Scope: add.py; inert elsewhere
Upstream: none; ours
Drop-when: upstream adds it
Depends: none
Tests: tests/test_add.py

diff --git a/docs/caf\u00e9 d\u00e9j\u00e0.md b/docs/caf\u00e9 d\u00e9j\u00e0.md
index {old}..{new} 100644
--- a/docs/caf\u00e9 d\u00e9j\u00e0.md\t
+++ b/docs/caf\u00e9 d\u00e9j\u00e0.md\t
@@ -1 +1 @@
-na\u00efve
+caf\u00e9
"""


def hash_of(data):
    done = subprocess.run(["git", "hash-object", "--stdin"], input=data, capture_output=True)
    return done.stdout.decode().strip()


def state(series):
    """Everything that an export may write."""
    return series.patches(), (series.root / "upstream.toml").read_bytes()


def test_the_form_of_a_patch_written_out_by_hand(project):
    import_series(checkout=project.checkout)
    project.commit(
        project.message("[Doc] Name the caf\u00e9"),
        {"docs/caf\u00e9 d\u00e9j\u00e0.md": "caf\u00e9\n".encode()},
        GIT_AUTHOR_NAME="Ren\u00e9",
        GIT_AUTHOR_EMAIL="rene@example.org",
        GIT_AUTHOR_DATE="2026-06-01T10:00:00+0200",
    )
    done = export_series(checkout=project.checkout)
    assert done.written == ("core/Doc-Name-the-caf.patch",)
    text = project.patch("core/Doc-Name-the-caf.patch").read_bytes().decode()
    head, _, tail = text.partition("MIME-Version: 1.0\n")
    # Git adds three lines to the header of a message that is not ASCII.
    text = head + tail.partition("Content-Transfer-Encoding: 8bit\n")[2] if tail else head
    expected = GOLDEN.format(
        old=hash_of("na\u00efve\n".encode()), new=hash_of("caf\u00e9\n".encode())
    )
    assert text.replace("Caf", "caf") == expected


def test_the_pin_has_the_tree_and_keeps_its_comments(series):
    text = (series.root / "upstream.toml").read_text(encoding="utf-8")
    tree = series.git("rev-parse", "HEAD^{tree}")
    assert f'patched = "{tree}"' in text
    assert "# A comment that must stay.\n" in text and '"  # as released\n' in text
    assert load_pin(series.root / "upstream.toml").patched_tree == tree


def test_exporting_again_writes_nothing(series):
    before = state(series)
    done = export_series(checkout=series.checkout)
    assert done.written == () and done.removed == () and state(series) == before


def test_a_fixup_that_was_squashed_changes_one_patch(series):
    other = series.patch(FIRST).read_bytes()
    series.commit("fixup! Subtract twice", series.edited("vllm/add.py", b"- b - b", b"- 2 * b"))
    series.git("rebase", "-q", "-i", "--autosquash", "base", GIT_SEQUENCE_EDITOR="true")
    done = export_series(checkout=series.checkout)
    assert done.written == (SECOND,)
    assert b"+    return a - 2 * b\n" in series.patch(SECOND).read_bytes()
    assert series.patch(FIRST).read_bytes() == other


def test_a_dropped_commit_takes_its_file_and_line_away(series):
    series.git("rebase", "-q", "--onto", "base", "HEAD~1")
    done = export_series(checkout=series.checkout)
    assert done.removed == (FIRST,) and done.patches == (SECOND,)
    assert set(series.patches()) == {"series", SECOND}
    assert series.patches()["series"] == f"{SECOND}\n".encode()


def test_reordered_commits_reorder_the_series_and_keep_comments(series):
    (series.root / "patches/series").write_text(
        f"# The order.\n\n# first\n{FIRST}\n# second\n{SECOND}\n", encoding="utf-8"
    )
    first, second = series.git("rev-list", "--reverse", "base..HEAD").split("\n")
    series.git("reset", "-q", "--hard", "base")
    series.git("cherry-pick", second, first)
    done = export_series(checkout=series.checkout)
    assert done.patches == (SECOND, FIRST)
    assert series.patches()["series"].decode() == (
        f"# The order.\n\n# second\n{SECOND}\n# first\n{FIRST}\n"
    )
    assert import_series(checkout=series.checkout).patches == (SECOND, FIRST)


def test_a_reworded_extra_patch_stays_extra(series):
    series.git("commit", "-q", "--amend", "-m", series.message("Subtract two times"))
    done = export_series(checkout=series.checkout)
    assert done.written == ("extra/Subtract-two-times.patch",) and done.removed == (SECOND,)


def test_patches_move_between_core_and_extra_when_told(series):
    done = export_series(
        checkout=series.checkout, core=["Subtract-twice.patch"], extra=["Add-three-numbers"]
    )
    assert done.patches == ("extra/Add-three-numbers.patch", "core/Subtract-twice.patch")
    assert set(series.patches()) == {"series", *done.patches}


def test_an_unknown_extra_is_an_error(series):
    with pytest.raises(StackError, match="file name No-such.patch"):
        export_series(checkout=series.checkout, extra=["No-such"])


def test_a_split_patch_becomes_two(series):
    series.git("reset", "-q", "--soft", "HEAD~2")
    series.git("reset", "-q", "HEAD")
    whole = (series.tree / "vllm/add.py").read_bytes()
    half = whole.replace(b"- b - b", b"- b")
    series.commit(series.message("Add three numbers"), {"vllm/add.py": half})
    series.commit(series.message("Take away twice"), {"vllm/add.py": whole})
    done = export_series(checkout=series.checkout)
    assert done.patches == (FIRST, "extra/Take-away-twice.patch")
    assert done.written == ("extra/Take-away-twice.patch",) or FIRST in done.written


# Held-back patches.


def test_patches_beyond_upto_are_left_as_they_are(series):
    second = series.patch(SECOND).read_bytes()
    whole = series.checkout.pin.patched_tree
    import_series(checkout=series.checkout, upto=FIRST)
    done = export_series(checkout=series.checkout)
    assert done.patches == (FIRST, SECOND) and done.removed == ()
    assert series.patch(SECOND).read_bytes() == second
    assert done.patched_tree == whole == series.checkout.pin.patched_tree


def test_a_held_back_patch_that_no_longer_applies_is_told_and_kept(series):
    whole = series.checkout.pin.patched_tree
    import_series(checkout=series.checkout, upto=FIRST)
    series.commit("fixup! Add three", series.edited("vllm/add.py", b"FILL_29 = 29", b"FILL_29 = 0"))
    series.git("reset", "-q", "--soft", "HEAD~1")
    series.git("commit", "-q", "--amend", "--no-edit")
    done = export_series(checkout=series.checkout)
    assert done.patched_tree is None and SECOND in done.notes[0]
    assert series.checkout.pin.patched_tree == whole and SECOND in series.patches()


# Refusals: nothing is written.


def refused(series, text, **arguments):
    before = state(series)
    with pytest.raises(StackError) as caught:
        export_series(checkout=series.checkout, **arguments)
    assert text in caught.value.message, caught.value.message
    assert state(series) == before
    return caught.value


@pytest.mark.parametrize("prefix", ["fixup", "squash", "amend"])
def test_unfinished_commits_are_refused(series, prefix):
    series.commit(series.message(f"{prefix}! Subtract twice"), {"setup.py": b"x = 1\n"})
    refused(series, f"subject begins with {prefix}!")


def test_merges_are_refused(series):
    series.git("checkout", "-q", "-b", "side", "base")
    series.commit(series.message("On the side"), {"setup.py": b"x = 1\n"})
    series.git("checkout", "-q", "series")
    series.git("merge", "-q", "--no-ff", "-m", "Join them", "side")
    refused(series, "Join them")


def test_edits_are_refused_and_named(series):
    (series.tree / "setup.py").write_text("x\n", encoding="utf-8")
    (series.tree / "stray.txt").write_text("x\n", encoding="utf-8")
    error = refused(series, " M setup.py")
    assert "?? stray.txt" in error.message


@pytest.mark.parametrize("trailer", laws.TRAILERS)
def test_missing_trailers_are_named(series, trailer):
    commit = series.commit(
        series.message("Incomplete", **{trailer: None}), {"setup.py": b"x = 1\n"}
    )
    error = refused(series, f"trailer {trailer} is missing")
    assert commit[:12] in error.message


def test_all_refusals_are_listed(series):
    series.commit(series.message("One", Kind=None), {"setup.py": b"x = 1\n"})
    series.commit(series.message("Two", why=None), {"setup.py": b"x = 2\n"})
    error = refused(series, "trailer Kind is missing")
    assert "(Two): has no paragraph of why" in error.message


def test_an_empty_commit_is_refused(series):
    series.git("commit", "-q", "--allow-empty", "-m", series.message("Nothing"))
    refused(series, "(Nothing): changes no file")


def test_two_commits_of_one_file_name_are_refused(series):
    series.commit(series.message("Subtract: twice!"), {"setup.py": b"x = 1\n"})
    refused(series, "its file name Subtract-twice.patch is taken")


def test_a_file_that_the_sources_do_not_share_is_refused(series):
    series.commit(series.message("Set the version"), {"vllm/_version.py": b"x = 1\n"})
    refused(series, "touches vllm/_version.py")


def test_a_message_that_does_not_survive_is_refused(series):
    text = series.message("Cut short", why="Before.\n\n---\n\nAfter.")
    series.commit(text, {"setup.py": b"x = 1\n"})
    refused(series, "Cut short")


def test_a_message_that_goes_on_after_the_trailers_is_refused(series):
    text = series.message("Say more") + "\n---\nA note that `git am` would drop.\n"
    series.commit(text, {"setup.py": b"x = 1\n"})
    refused(series, "'Say more' does not come back from its patch unchanged")


def test_a_head_that_left_the_release_behind_is_refused(series):
    series.git("checkout", "-q", "--orphan", "lost")
    series.git("commit", "-q", "-m", series.message("All anew"))
    refused(series, "is not below the head")


def test_another_release_is_refused(series):
    path = series.root / "upstream.toml"
    pinfile.set_values(path, {"release.version": "1.0.1"})
    refused(series, "was imported from 1.0.0, upstream.toml pins 1.0.1")


def test_a_work_tree_that_import_did_not_make_is_refused(series, tmp_path):
    refused(series, "was not made by", work_tree=tmp_path)


# All or nothing.


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_failure_half_way_puts_everything_back(series, monkeypatch, error, after):
    series.git("commit", "-q", "--amend", "-m", series.message("Subtract two times"))
    series.commit(series.message("A third"), {"setup.py": b"x = 1\n"})
    before = state(series)
    real = exporting.Path.replace
    calls = []

    def failing(self, target):
        if len(calls) == after:
            raise error
        calls.append(target)
        return real(self, target)

    monkeypatch.setattr(exporting.Path, "replace", failing)
    with pytest.raises((StackError, KeyboardInterrupt)):
        export_series(checkout=series.checkout)
    monkeypatch.undo()
    assert state(series) == before


def test_replaced_values_leave_the_rest_alone():
    text = '# a = "0"\n[x]\na = "1" # why\n[tree]\na = "2"\nab = "3"\n'
    assert pinfile.replaced(text, {"tree.a": "new"}) == text.replace('"2"', '"new"')
    assert pinfile.replaced(text, {"x.a": "new"}) == text.replace('"1"', '"new"')


@pytest.mark.parametrize("key", ["tree.b", "y.a", "a"])
def test_a_value_without_a_line_is_an_error(key):
    with pytest.raises(StackError, match="no line"):
        pinfile.replaced('[tree]\na = "2"\n[tree.y]\nb = "1"\n', {key: "new"})


def test_a_value_that_would_break_the_file_is_refused():
    with pytest.raises(StackError, match="cannot be set"):
        pinfile.replaced('[tree]\na = "2"\n', {"tree.a": 'x"\ny = "z'})
