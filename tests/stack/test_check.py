"""``check``: each law is broken once, and its line is seen."""

from __future__ import annotations

import argparse

import pytest

from stack import pinfile
from stack.checking import check
from stack.commands import check as command
from stack.exporting import export_series
from stack.importing import import_series

FIRST, SECOND = "core/Add-three-numbers.patch", "extra/Subtract-twice.patch"
LAWS = [
    "order", "header", "depends", "tests", "seams", "white space", "shared files", "base", "apply",
    "prefixes", "round trip", "tree", "core alone",
]  # fmt: skip


def broken(series):
    """Law -> violations, of the laws that do not hold."""
    return {law.name: list(law.violations) for law in check(series.checkout) if law.violations}


def only(series, law):
    """The violations of a law, which must be the only one that is broken."""
    found = broken(series)
    assert list(found) == [law], found
    return found[law]


def edit(series, name, old, new):
    """Replace a text of a patch file, where it stands once."""
    file = series.patch(name)
    data = file.read_bytes()
    assert data.count(old) == 1, (name, old)
    file.write_bytes(data.replace(old, new))


def add(series, text, files, **arguments):
    """Commit and export."""
    series.commit(text, files)
    return export_series(checkout=series.checkout, **arguments)


def test_a_green_run_prints_a_line_a_law(series, monkeypatch, capsys):
    monkeypatch.setattr(command, "Checkout", lambda: series.checkout)
    assert command.run(argparse.Namespace(release=None)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in lines] == ["ok    "] * len(LAWS)
    assert [line[6:].partition(":")[0] for line in lines] == LAWS


def test_an_empty_series_is_green_but_for_the_pin(project):
    assert list(broken(project)) == ["base", "tree"]  # both are empty strings in this pin


def test_violations_of_several_laws_are_all_listed(series, monkeypatch, capsys):
    edit(series, FIRST, b"Kind: core\n", b"")
    edit(series, FIRST, b"Depends: none", b"Depends: core/No.patch")
    edit(series, SECOND, b"Tests: tests/test_add.py", b"Tests: tests/test_no.py")
    monkeypatch.setattr(command, "Checkout", lambda: series.checkout)
    assert command.run(argparse.Namespace(release=None)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("ok ")] == [
        f"FAIL  header: patches/{FIRST}: trailer Kind is missing",
        f"FAIL  depends: patches/{FIRST}: trailer Depends names core/No.patch, which is not in the "
        "series",
        f"FAIL  tests: patches/{SECOND}: trailer Tests names tests/test_no.py, which exists "
        "neither here nor upstream",
        "3 violations",
    ]


# order


def test_an_orphan(series):
    series.patch("core/Lost.patch").write_bytes(b"x")
    assert only(series, "order") == ["patches/core/Lost.patch: not in patches/series"]


def test_a_duplicate(series):
    (series.root / "patches/series").write_text(f"{FIRST}\n{SECOND}\n{FIRST}\n", encoding="utf-8")
    assert f"patches/series: line 3 names {FIRST} a second time" in broken(series)["order"]


def test_a_named_patch_that_is_missing(series):
    series.patch(SECOND).unlink()
    assert broken(series)["order"] == [f"patches/{SECOND}: No such file or directory"]


def test_a_patch_that_is_no_patch(series):
    series.patch(SECOND).write_bytes(b"scribble\n")
    (line,) = broken(series)["order"]
    assert line.startswith(f"patches/{SECOND}: ")


# header


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (b"Scope: add.py; inert elsewhere\n", b"", "trailer Scope is missing"),
        (b"Scope: add.py; inert elsewhere", b"Scope:", "trailer Scope is empty"),
        (b"Kind: tune", b"Kind: nice", "trailer Kind is 'nice', expected one of core, fix, tune"),
        (b"Kind: tune\n", b"Kind: tune\nKind: fix\n", "trailer Kind stands 2 times"),
        (b"Upstream: none; ours", b"Upstream: none", "trailer Upstream is none without the reason"),
        (b"Because the test wants it.\n\n", b"", "has no paragraph of why"),
        (b"wants it.\n", b"wants it.\n\nAnd more.\n", "has more than one paragraph"),
        (b"[PATCH] Subtract twice", b"[PATCH] Subtract thrice", "the file name Subtract-thrice"),
        (b"[PATCH] Subtract", b"[PATCH] fixup! Subtract", "subject begins with fixup!"),
    ],
)
def test_headers(series, old, new, told):
    edit(series, SECOND, old, new)
    lines = broken(series)["header"]
    assert any(line.startswith(f"patches/{SECOND}: ") and told in line for line in lines), lines


# depends


def test_a_dependency_that_stands_later(series):
    edit(series, FIRST, b"Depends: none", f"Depends: {SECOND}".encode())
    assert only(series, "depends") == [
        f"patches/{FIRST}: trailer Depends names {SECOND}, which does not stand earlier"
    ]


def test_a_core_patch_that_depends_on_an_extra_one(series):
    add(
        series,
        series.message("Add four numbers", Depends=SECOND),
        {"setup.py": b"import setuptools  # and more\n"},
    )
    assert only(series, "depends") == [
        f"patches/core/Add-four-numbers.patch: a core patch depends on {SECOND}"
    ]


def test_a_core_patch_that_needs_an_extra_one_without_saying_so(series):
    add(
        series,
        series.message("Subtract three times"),
        series.edited("vllm/add.py", b"a - b - b", b"a - b - b - b"),
    )
    assert only(series, "core alone") == [
        "patches/core/Subtract-three-times.patch: does not apply: vllm/add.py, hunk at line 36 "
        "(without the extra patches)"
    ]


# tests


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("tests/test_add.py::test_add", None),
        ("tests/ours/test_ours.py::TestOurs::test_it[1-2]", None),
        ("tests/ours", None),
        ("tests/ours/test_ours.py::test_it", "but tests/ours/test_ours.py does not define it"),
        ("tests/none", "which exists neither here nor upstream"),
        ("tests/test_add.py, tests/gone.py", "names tests/gone.py, which exists neither"),
        ("/etc/passwd", "expected a path below the checkout"),
        ("../project/upstream.toml", "expected a path below the checkout"),
        ("none", "names none, which exists neither"),
    ],
)
def test_tests(series, value, told):
    ours = series.root / "tests/ours/test_ours.py"
    ours.parent.mkdir(parents=True)
    ours.write_text("class TestOurs:\n    def test_it(self, a): ...\n", encoding="utf-8")
    edit(series, FIRST, b"Tests: tests/test_add.py", f"Tests: {value}".encode())
    if told is None:
        assert broken(series) == {}
    else:
        (line,) = only(series, "tests")
        assert told in line


def test_a_test_that_the_series_itself_adds(series):
    add(
        series,
        series.message("Test more", Tests="tests/test_more.py"),
        {"tests/test_more.py": b"def test_more(): ...\n"},
    )
    assert broken(series) == {}


# seams, white space, shared files


def test_a_patch_with_too_much_code(series):
    code = b"".join(b"Y_%d = %d\n" % (number, number) for number in range(61))
    add(series, series.message("Add it all"), {"vllm/more.py": code})
    assert only(series, "seams") == [
        "patches/core/Add-it-all.patch: adds 61 lines of code, a seam has 60 at most: move it to "
        "kernels/"
    ]


@pytest.mark.parametrize("name", ["tests/test_more.py", "vllm/configs/table.json"])
def test_tests_and_data_may_be_long(series, name):
    add(series, series.message("Add data"), {name: b"x = 1\n" * 100})
    assert broken(series) == {}


def test_trailing_white_space(series):
    add(series, series.message("Sloppy"), {"vllm/sloppy.py": b"A = 1 \nB = 2\n\t\n"})
    assert only(series, "white space") == [
        "patches/core/Sloppy.patch: adds trailing white space to vllm/sloppy.py: 'A = 1 '",
        "patches/core/Sloppy.patch: adds trailing white space to vllm/sloppy.py: '\\t'",
    ]


def test_crlf_is_no_trailing_white_space(series):
    add(series, series.message("Keep CRLF"), {"vllm/crlf.py": b"A = 1\r\nB = 3\r\nC = 3\r\n"})
    assert broken(series) == {}


def test_a_file_that_the_sources_do_not_share(series):
    edit(series, SECOND, b"diff --git a/vllm/add.py b/vllm/add.py",
         b"diff --git a/vllm/_version.py b/vllm/_version.py")  # fmt: skip
    edit(series, SECOND, b"--- a/vllm/add.py", b"--- a/vllm/_version.py")
    edit(series, SECOND, b"+++ b/vllm/add.py", b"+++ b/vllm/_version.py")
    (line,) = broken(series)["shared files"]
    assert line.startswith(f"patches/{SECOND}: touches vllm/_version.py, which the submodule")


# base, apply, prefixes, round trip, tree


@pytest.mark.parametrize(("key", "law"), [("tree.base", "base"), ("tree.patched", "tree")])
@pytest.mark.parametrize("value", ["0" * 40, ""])
def test_tree_hashes(series, key, law, value):
    pinfile.set_values(series.root / "upstream.toml", {key: value})
    (line,) = only(series, law)
    dotted = f"[tree].{key.partition('.')[2]}"
    assert line.startswith(f"upstream.toml: {dotted} is {value or 'empty'}, the ")


def test_a_patch_that_needs_fuzz(series):
    edit(series, SECOND, b"\n FILL_29 = 29\n", b"\n FILL_29 = 30\n")
    found = broken(series)
    assert found["apply"] == [f"patches/{SECOND}: does not apply: vllm/add.py, hunk at line 36"]
    assert list(found) == ["apply"]
    skipped = [law.name for law in check(series.checkout) if law.skipped]
    assert skipped == ["round trip", "tree", "core alone"]


def test_every_patch_that_fails_is_listed(series):
    add(series, series.message("Third"), {"setup.py": b"x = 1\n"})
    edit(series, FIRST, b"\n import math\n", b"\n import meth\n")
    edit(series, "core/Third.patch", b"\n-import setuptools\n", b"\n-import setuptool\n")
    assert [line.partition(": ")[0] for line in broken(series)["apply"]] == [
        f"patches/{FIRST}",
        "patches/core/Third.patch",
    ]


def test_a_patch_that_needs_an_offset_does_not_come_back(series):
    edit(series, SECOND, b"@@ -36,4 +36,4 @@", b"@@ -30,4 +30,4 @@")
    assert only(series, "round trip") == [f"patches/{SECOND}: import and export change it"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"From 0000000000", b"From 1234567890"),
        (b"\n\ndiff --git", b"\n---\n vllm/add.py | 2 +-\n\ndiff --git"),
        (b" 100644\n", b" 100644\n"[:-1] + b" \n"),
    ],
)
def test_a_patch_in_another_form_does_not_come_back(series, old, new):
    edit(series, SECOND, old, new)
    assert f"patches/{SECOND}: import and export change it" in broken(series)["round trip"]


def test_an_order_file_without_its_last_line_end_does_not_come_back(series):
    (series.root / "patches/series").write_text(f"{FIRST}\n{SECOND}", encoding="utf-8")
    assert only(series, "round trip") == ["patches/series: import and export change it"]


def test_a_prefix_that_does_not_compile(series):
    """The break is mended by the next patch: the whole series compiles, a prefix does not."""
    add(series, series.message("Break it"), {"setup.py": b"import setuptools\n\ndef f(:\n"})
    add(
        series, series.message("Mend it"), {"setup.py": b"import setuptools\n\ndef f():\n    ...\n"}
    )
    found = broken(series)
    assert found["prefixes"] == ["patches/core/Break-it.patch: setup.py, line 3: invalid syntax"]


def test_grammar_newer_than_the_releases_oldest_python(series):
    add(series, series.message("Too new"), {"setup.py": b"try: ...\nexcept* ValueError: ...\n"})
    (line, *_) = broken(series)["prefixes"]
    assert line.startswith("patches/core/Too-new.patch: setup.py, line 2: ")


def test_check_changes_nothing(series):
    before = series.patches(), (series.root / "upstream.toml").read_bytes()
    check(series.checkout)
    assert before == (series.patches(), (series.root / "upstream.toml").read_bytes())
    assert [path.name for path in (series.root / ".build").iterdir()] == ["vllm"]
    assert import_series(checkout=series.checkout).patches == (FIRST, SECOND)
