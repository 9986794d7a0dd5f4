"""The list of shared files: written, read back, and refused where it is not sound."""

from __future__ import annotations

import pytest

from stack import sdist, shared
from stack.errors import StackError
from stack.sdist import Contents, File

A, B = "a" * 40, "b" * 40


def test_what_is_written_is_read_back(tmp_path):
    contents = Contents(
        {"caf\u00e9 [1].md": File("100644", B), "a b: c.py": File("100755", A)},
        {"PKG-INFO": "made: here"},
    )
    path = tmp_path / "1.0.0.txt"
    shared.write(path, shared.render(contents, "1.0.0"))
    assert path.read_text(encoding="utf-8").splitlines()[2:] == [
        "excluded PKG-INFO: made: here",
        f"100755 {A} a b: c.py",
        f"100644 {B} caf\u00e9 [1].md",
    ]
    read = shared.load(path)
    assert read.files == contents.files and read.excluded == contents.excluded


def test_the_list_in_the_repository_is_the_rules_outcome(project):
    found = sdist.contents(project.upstream.archive)
    listed = shared.load(project.checkout.shared_files)
    assert listed.files == found.files and listed.excluded == found.excluded


@pytest.mark.parametrize(
    "bad",
    [
        f"100644 {A[:-1]} short",
        f"120000 {A} link",
        f"100644 {A} ",
        "anything",
        "",
        f"100644 {A} aa",
        f"100644 {A} m",
    ],
)
def test_a_bad_line_is_named(tmp_path, bad):
    path = tmp_path / "1.0.0.txt"
    path.write_text(f"# head\n100644 {B} m\n{bad}\n", encoding="utf-8")
    with pytest.raises(StackError, match=r"1\.0\.0\.txt: line 3 is malformed"):
        shared.load(path)


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_an_empty_list_is_refused(tmp_path, text):
    path = tmp_path / "1.0.0.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StackError, match="lists no file"):
        shared.load(path)


def test_a_missing_list_says_how_it_is_made(tmp_path):
    with pytest.raises(StackError, match="does not exist") as caught:
        shared.load(tmp_path / "9.9.9.txt")
    assert "sources --write" in caught.value.hint


def test_a_failed_write_keeps_the_old_text(tmp_path):
    path = tmp_path / "file.txt"
    shared.write(path, "old")
    with pytest.raises(TypeError):
        shared.write(path, b"not text")  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["file.txt"]
