"""Import and export are inverses, for every kind of file, either source and any user."""

from __future__ import annotations

import json
import random
import shutil
import stat

import pytest

from stack import source, stats
from stack.checking import check
from stack.exporting import export_series
from stack.git import git
from stack.importing import import_series
from stack.series import load_series

HOSTILE = """\
[user]
\tname = Somebody Else
\temail = else@example.org
[core]
\tautocrlf = true
\tsafecrlf = true
\thooksPath = {home}/hooks
\tattributesFile = {home}/attributes
\texcludesFile = {home}/excludes
\tquotePath = true
\tabbrev = 5
\tcommentChar = K
[commit]
\tgpgSign = true
[user]
\tsigningKey = nobody
[diff]
\tnoprefix = true
\tmnemonicPrefix = true
\talgorithm = patience
\tcontext = 7
\tinterHunkContext = 9
\trenames = copies
\texternal = /bin/false
\torderFile = {home}/order
\tsuppressBlankEmpty = true
\tindentHeuristic = false
[format]
\tsignature = "a signature"
\tsubjectPrefix = RFC
\tnumbered = true
\tsignOff = true
\tattach = boundary
\tcoverLetter = true
\tthread = deep
\tto = list@example.org
\theaders = "X-Header: x\\n"
\tfrom = true
\tuseAutoBase = true
\tencodeEmailHeaders = true
\tnotes = true
\tsuffix = .txt
[apply]
\twhitespace = fix
\tignoreWhitespace = change
[am]
\tthreeWay = true
\tkeepcr = false
[mailinfo]
\tscissors = true
[rebase]
\tautosquash = true
\tautoStash = true
[rerere]
\tenabled = true
[i18n]
\tcommitEncoding = ISO-8859-1
\tlogOutputEncoding = ISO-8859-1
[status]
\tshowUntrackedFiles = no
[fetch]
\tfsckObjects = true
[transfer]
\tfsckObjects = true
[init]
\tdefaultBranch = other
[log]
\tshowSignature = true
[trailer]
\tseparators = "="
"""


def every_kind_of_file(project):
    """Commits that touch each kind of file there is; the message holds what mail would cut."""
    blob = bytes(reversed(range(256))) * 3
    steps = [
        ("Change a file with CRLF", {"vllm/crlf.py": b"A = 1\r\nB = 9\r\nC = 3\r\n"}),
        ("Change a file without a last line end", {"vllm/no_newline.py": b"X = 1\nY = 3"}),
        ("Give the last line its end", {"vllm/no_newline.py": b"X = 1\nY = 3\n"}),
        ("Change a binary file", {"vllm/data.bin": blob}),
        ("Add a binary file", {"vllm/new.bin": b"\0" + blob}),
        ("Fill an empty file", {"vllm/__init__.py": b"A = 1\n"}),
        ("Empty it again", {"vllm/__init__.py": b""}),
        ("Add an empty file", {"vllm/py.typed": b""}),
        ("Change names that need care", {
            "vllm/table [1,2].json": b'{"a": 2}\n',
            "docs/caf\u00e9 d\u00e9j\u00e0.md": b"plain\n",
        }),
        ("Delete a file", {"docs/build/kept.md": None}),
        ("[Bugfix][Kernel] Keep the brackets; na\u00efve caf\u00e9", {"setup.py": b"x = 1\n"}),
        ("A subject that is longer than the width at which git folds a header of a mail into "
         "two lines", {"setup.py": b"x = 2\n"}),
    ]  # fmt: skip
    for number, (subject, files) in enumerate(steps):
        project.commit(
            project.message(
                subject, why=f"Number {number}; -- 8< -- and From here on;\n>From too."
            ),
            files,
            GIT_AUTHOR_NAME="Ren\u00e9 \u738b, Jr.",
            GIT_AUTHOR_EMAIL="rene@example.org",
            GIT_AUTHOR_DATE=f"2026-06-{number + 1:02d}T10:00:00+0545",
        )
    tool = project.tree / "tools/run.sh"
    tool.chmod(0o644)
    (project.tree / "setup.py").chmod(0o755)
    project.commit(project.message("Change modes"), {})


def everything(project):
    """What must not differ: the patches and the pin."""
    return project.patches(), (project.root / "upstream.toml").read_bytes()


def test_every_kind_of_file_comes_back(project, tmp_path):
    import_series(checkout=project.checkout)
    every_kind_of_file(project)
    export_series(checkout=project.checkout)
    before, tree = everything(project), project.git("rev-parse", "HEAD^{tree}")

    made = import_series(tmp_path / "again", checkout=project.checkout)
    assert len(made.patches) == 13
    assert source.tree_of(made.path, made.head) == tree
    assert not (made.path / "tools/run.sh").stat().st_mode & stat.S_IXUSR
    assert (made.path / "vllm/crlf.py").read_bytes() == b"A = 1\r\nB = 9\r\nC = 3\r\n"
    export_series(made.path, checkout=project.checkout)
    assert everything(project) == before


def test_check_is_green_on_every_kind_of_file(project):
    from stack import pinfile

    made = import_series(checkout=project.checkout)
    every_kind_of_file(project)
    export_series(checkout=project.checkout)
    tree = source.tree_of(made.path, made.base)
    pinfile.set_values(project.root / "upstream.toml", {"tree.base": tree})
    assert [line for law in check(project.checkout) for line in law.lines if line[:2] != "ok"] == []


@pytest.mark.parametrize("seed", range(6))
def test_random_series_come_back(project, tmp_path, seed):
    draw = random.Random(seed)
    import_series(checkout=project.checkout)
    lines = [b"line %d" % draw.randrange(9) for _ in range(60)]
    project.commit(project.message("Step 0"), {"vllm/many.txt": b"\n".join(lines) + b"\n"})
    for step in range(1, 8):
        for _ in range(draw.randrange(1, 5)):
            place = draw.randrange(len(lines))
            lines[place : place + draw.randrange(4)] = [
                draw.choice(
                    [b"", b"- dash", b"+ plus", b"\tx", b"--- a/x", b"@@ -1 +1 @@", b"From x"]
                )
                for _ in range(draw.randrange(4))
            ]
        lines.append(b"step %d" % step)
        end = b"\n" if draw.random() < 0.7 else b""
        project.commit(project.message(f"Step {step}"), {"vllm/many.txt": b"\n".join(lines) + end})
    export_series(checkout=project.checkout)
    before = everything(project)
    made = import_series(tmp_path / "again", checkout=project.checkout)
    assert (made.path / "vllm/many.txt").read_bytes() == b"\n".join(lines) + end
    export_series(made.path, checkout=project.checkout)
    assert everything(project) == before
    # git's own count of the lines is the check on ours
    wanted = [0, 0]
    for commit in made.commits:
        shown = git(
            *("show", "--numstat", "--format=", "--diff-algorithm=histogram", commit),
            cwd=made.path,
        ).text
        wanted = [a + int(b) for a, b in zip(wanted, shown.split("\t")[:2], strict=True)]
    summed = stats.total(load_series(project.root / "patches"))
    assert [summed.added, summed.removed] == wanted


def test_a_hostile_configuration_changes_nothing(project, user, tmp_path):
    import_series(checkout=project.checkout)
    every_kind_of_file(project)
    export_series(checkout=project.checkout)
    before = everything(project)
    commits = import_series(checkout=project.checkout).commits

    home = user.parent
    (home / "hooks").mkdir()
    for hook in ("applypatch-msg", "pre-applypatch", "post-checkout", "commit-msg", "pre-commit"):
        (home / "hooks" / hook).write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
        (home / "hooks" / hook).chmod(0o755)
    (home / "attributes").write_text("* text eol=crlf\n*.py diff=none\n", encoding="utf-8")
    (home / "excludes").write_text("*.py\n", encoding="utf-8")
    (home / "order").write_text("vllm/*\n", encoding="utf-8")
    hostile = HOSTILE.format(home=home)
    user.write_text(hostile, encoding="utf-8")

    shutil.rmtree(tmp_path / "cache" / "trees")
    made = import_series(tmp_path / "again", checkout=project.checkout)
    assert made.commits == commits
    # The repository's own configuration is as hostile.
    local = made.path / ".git" / "config"
    local.write_text(local.read_text(encoding="utf-8") + hostile, encoding="utf-8")
    export_series(made.path, checkout=project.checkout)
    assert everything(project) == before
    import_series(made.path, checkout=project.checkout)
    (made.path / "vllm" / "new.py").write_text("x\n", encoding="utf-8")
    from stack import worktree

    assert worktree.edits(made.path) == ["?? vllm/new.py"]


def test_both_sources_give_the_same_patches_and_tree(project, tmp_path, remove_cache):
    import_series(checkout=project.checkout)
    every_kind_of_file(project)
    export_series(checkout=project.checkout)
    before = everything(project)
    commits = import_series(checkout=project.checkout).commits

    remove_cache()
    project.upstream.archive.unlink()
    project.use_submodule()
    made = import_series(tmp_path / "again", checkout=project.checkout)
    assert made.commits == commits
    export_series(made.path, checkout=project.checkout)
    assert everything(project) == before
    status = (project.root / "vllm" / "setup.py").read_bytes()
    assert status == b"import setuptools\n"  # the submodule is as it was


# stats


def test_stats_of_a_series_counted_by_hand(series):
    series.commit(
        series.message("Touch two files", Kind="fix"),
        {"vllm/new.py": b"A = 1\nB = 2\n", **series.edited("vllm/add.py", b"FILL_10", b"FULL_10")},
    )
    export_series(checkout=series.checkout)
    found = load_series(series.root / "patches")
    assert [tuple(vars(row).values()) for row in stats.rows(found)] == [
        ("core/Add-three-numbers.patch", "core", 1, 2, 2, 1),
        ("extra/Subtract-twice.patch", "tune", 1, 1, 1, 1),
        ("core/Touch-two-files.patch", "fix", 2, 3, 1, 2),
    ]
    total = {"patches": 3, "hunks": 4, "added": 6, "removed": 4, "files": 2}
    plain = stats.as_json(found)
    assert plain["total"] == total and json.loads(json.dumps(plain)) == plain
    assert plain["files"]["vllm/add.py"] == [row["patch"] for row in plain["patches"]]
    table = stats.table(found)
    assert len({len(line) for line in table}) == 1 and table[-1].split() == [
        "3", "patches", "4", "6", "4", "2"
    ]  # fmt: skip


def test_stats_of_an_empty_series(project):
    assert stats.as_json([])["total"]["patches"] == 0
    assert stats.table([])[-1].split() == ["0", "patches", "0", "0", "0", "0"]
