"""Reading a patch file. The expectations are git's own, or written out by hand."""

from __future__ import annotations

import subprocess

import pytest

from stack import laws
from stack.errors import StackError
from stack.header import Patch, load, slug

TEXT = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: Ren\u00e9 Fran\u00e7ois <rene@example.org>
Date: Mon, 1 Jun 2026 10:00:00 +0200
Subject: [PATCH] [Bugfix] A subject that is so long that git folds it onto a
 second line

The reason, in
two lines.

Kind: fix
Scope: add.py, and so
 on
Upstream: none; ours
Drop-when: never
Depends: core/a.patch, core/b.patch
Depends: core/c.patch
Tests: tests/test_add.py::test_add

diff --git a/vllm/add.py b/vllm/add.py
index 1111111111111111111111111111111111111111..2222222222222222222222222222222222222222 100644
--- a/vllm/add.py
+++ b/vllm/add.py
@@ -1,4 +1,5 @@
 a
--- b
+++ c
+diff --git a/x b/x
+@@ -1,9 +1,9 @@
 d
-e
@@ -10 +11 @@ def f():
-old
\\ No newline at end of file
+new
\\ No newline at end of file
diff --git a/new.py b/new.py
new file mode 100644
index 0000000000000000000000000000000000000000..3333333333333333333333333333333333333333
--- /dev/null
+++ b/new.py
@@ -0,0 +1,2 @@
+one
+two
"""


@pytest.fixture
def patch():
    """A patch with everything that is easily misread."""
    return Patch("core/x.patch", TEXT.encode())


def test_a_folded_subject_is_one_line_and_keeps_its_own_brackets(patch):
    assert patch.subject == (
        "[Bugfix] A subject that is so long that git folds it onto a second line"
    )


def test_reason_and_trailers(patch):
    assert patch.reason == "The reason, in\ntwo lines."
    assert patch.trailers == {
        "Kind": ["fix"],
        "Scope": ["add.py, and so on"],
        "Upstream": ["none; ours"],
        "Drop-when": ["never"],
        "Depends": ["core/a.patch, core/b.patch", "core/c.patch"],
        "Tests": ["tests/test_add.py::test_add"],
    }
    assert patch.values("Depends") == ["core/a.patch", "core/b.patch", "core/c.patch"]


def test_lines_that_look_like_headers_are_counted_as_lines(patch):
    first, second = patch.changes
    assert (first.path, first.hunks, first.removed) == ("vllm/add.py", 2, 3)
    assert first.added == (b"++ c", b"diff --git a/x b/x", b"@@ -1,9 +1,9 @@", b"new")
    assert (second.path, second.hunks, second.added) == ("new.py", 1, (b"one", b"two"))


def test_an_encoded_subject_is_decoded():
    text = "From 0\nSubject: [PATCH] =?UTF-8?q?Caf=C3=A9?= au lait\n\nWhy.\n"
    assert Patch("core/x.patch", text.encode()).subject == "Caf\u00e9 au lait"
    raw = "From 0\nSubject: [PATCH] Caf\u00e9 au lait\n\nWhy.\n"
    assert Patch("core/x.patch", raw.encode()).subject == "Caf\u00e9 au lait"


def test_a_diffstat_is_not_part_of_the_message():
    text = TEXT.replace("test_add\n\ndiff", "test_add\n---\n vllm/add.py | 5 +++--\n\ndiff")
    patch = Patch("core/x.patch", text.encode())
    assert patch.reason == "The reason, in\ntwo lines."
    assert patch.values("Tests") == ["tests/test_add.py::test_add"]


def test_none_means_no_dependency_but_no_test_is_no_test():
    text = TEXT.replace(
        "Depends: core/a.patch, core/b.patch\nDepends: core/c.patch\n", "Depends: none\n"
    ).replace("tests/test_add.py::test_add", "none")
    patch = Patch("core/x.patch", text.encode())
    assert patch.values("Depends") == [] and patch.values("Tests") == ["none"]


@pytest.mark.parametrize("cut", ["-old\n", "+two\n", " d\n"])
def test_a_broken_diff_is_named(cut):
    with pytest.raises(StackError, match=r"patches/core/x\.patch: "):
        _ = Patch("core/x.patch", TEXT.replace(cut, "", 1).encode()).changes


def test_a_patch_without_a_diff_is_named():
    with pytest.raises(StackError, match=r"patches/core/x\.patch: "):
        _ = Patch("core/x.patch", TEXT.partition("diff --git")[0].encode()).changes


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StackError, match=r"patches/core/none\.patch: No such file"):
        load(tmp_path, "core/none.patch")


SUBJECTS = [
    "Add three numbers",
    "[Bugfix] FP8 linear: upcast E8M0 scales (SM12x)",
    "Route the indexer's logits",
    "...dots... and more..",
    "trailing dot.",
    "a  --  b",
    "caf\u00e9 cr\u00e8me",
    "under_score v0.22.1",
    "-leading hyphen",
    "!",
    "slash/back\\slash: `tick` \"quote\"",
    "x" * 120,
]  # fmt: skip


@pytest.mark.parametrize("subject", SUBJECTS)
def test_slug_is_gits(tmp_path, user, subject):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(
        ["git", "commit", "-q", "--allow-empty", "-m", subject], cwd=tmp_path, check=True
    )
    shown = subprocess.run(
        ["git", "log", "-1", "--format=%f"], cwd=tmp_path, check=True, capture_output=True
    )
    assert slug(subject) == shown.stdout.decode().strip()


def test_code_lines_leave_comments_blanks_tests_and_data_out():
    text = TEXT.replace("+one\n+two", "+one\n+    # two").replace("b/new.py", "b/new.py")
    assert laws.code_lines(Patch("core/x.patch", text.encode())) == 5
    for name in ("tests/new.py", "new.json"):
        other = Patch("core/x.patch", TEXT.replace("new.py", name).encode())
        assert laws.code_lines(other) == 4


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["test_a"], True),
        (["TestB", "test_c"], True),
        (["TestB"], True),
        (["test_c"], False),
        (["TestB", "test_a"], False),
        (["test_d"], True),
    ],
)
def test_defined_tests_are_found(names, expected):
    text = "def test_a(): ...\nclass TestB:\n  def test_c(self): ...\nasync def test_d(): ...\n"
    assert laws.defines_test(text, names) is expected
