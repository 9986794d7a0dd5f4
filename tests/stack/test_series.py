"""The order file: what is refused, and how its comments travel."""

from __future__ import annotations

import pytest

from stack.errors import StackError
from stack.exporting import order_text
from stack.series import files_in, load_series, read_order


def order(tmp_path, text):
    (tmp_path / "series").write_text(text, encoding="utf-8")
    return read_order(tmp_path)


def test_comments_and_blank_lines_are_no_patches(tmp_path):
    found = order(tmp_path, "# head\n\ncore/a.patch\n# why\nextra/B-2.patch\n")
    assert found.names == ("core/a.patch", "extra/B-2.patch") and found.problems == ()


@pytest.mark.parametrize(
    "bad",
    [
        "a.patch", "other/a.patch", "core/../a.patch", "core/sub/a.patch", "/core/a.patch",
        "core/a.diff", " core/a.patch", "core/a.patch # why", "core/a b.patch", "core/.patch",
        "core/-a.patch", "core\\a.patch",
    ],
)  # fmt: skip
def test_a_malformed_line_is_named(tmp_path, bad):
    (problem,) = order(tmp_path, f"# head\n{bad}\n").problems
    assert problem.startswith("patches/series: line 2 is ") and repr(bad) in problem


def test_a_repeated_line_is_named_and_all_problems_are_found(tmp_path):
    found = order(tmp_path, "core/a.patch\ncore/a.patch\nb\n")
    assert [problem.split(" ")[2] for problem in found.problems] == ["2", "3"]
    with pytest.raises(StackError, match="line 2 names core/a.patch a second time"):
        load_series(tmp_path)


def test_a_missing_order_file_and_a_missing_patch_are_named(tmp_path):
    with pytest.raises(StackError, match="series does not exist"):
        load_series(tmp_path)
    order(tmp_path, "core/a.patch\n")
    with pytest.raises(StackError, match=r"patches/core/a\.patch: No such file"):
        load_series(tmp_path)


def test_files_are_found_at_any_depth(tmp_path):
    for name in ("core/a.patch", "core/sub/b.patch", "extra/c.txt", "README.md", "core/.gitkeep"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    assert files_in(tmp_path) == ["core/a.patch", "core/sub/b.patch", "extra/c.txt"]


OLD = """\
# The order.
# Two lines.

core/a.patch
# Attention.

# about b
core/b.patch
# about c
core/c.patch
# the end
"""


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["core/a.patch", "core/b.patch", "core/c.patch"], OLD),
        (
            ["core/c.patch", "core/a.patch", "core/b.patch"],
            "# The order.\n# Two lines.\n\n# about c\ncore/c.patch\ncore/a.patch\n"
            "# Attention.\n\n# about b\ncore/b.patch\n# the end\n",
        ),
        (
            ["core/a.patch", "core/new.patch", "core/c.patch"],
            "# The order.\n# Two lines.\n\ncore/a.patch\ncore/new.patch\n"
            "# Attention.\n\n# about c\ncore/c.patch\n# the end\n",
        ),
        ([], "# The order.\n# Two lines.\n\n# Attention.\n\n# the end\n"),
    ],
)
def test_comments_travel_with_their_patches(names, expected):
    assert order_text(OLD.splitlines(), names) == expected


def test_a_comment_right_above_the_first_patch_is_that_patchs():
    assert order_text(["# about a", "core/a.patch", "core/b.patch"], ["core/b.patch"]) == (
        "core/b.patch\n"
    )
