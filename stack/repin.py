"""Move the pin: write a finished rebase into ``patches/`` and ``upstream.toml``."""

from __future__ import annotations

import datetime
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stack import download, rebase_report, rebase_save, rebasing, release_index, sdist, shared
from stack.carried import read_file, told_commit
from stack.checkout import Checkout
from stack.errors import StackError
from stack.exporting import export_series
from stack.git import git
from stack.pin import Pin, tomllib
from stack.pinfile import replaced
from stack.release_index import Release
from stack.scratch import scratch
from stack.series import files_in
from stack.source import tree_of

# Days after its upload that a release's locks are resolved as of: what it needs is out by then.
SETTLED = datetime.timedelta(days=2)


@dataclass(frozen=True)
class Moved:
    """What was done: each patch's status, and what is left to type."""

    statuses: dict[str, str]
    todo: tuple[str, ...]


def move(work: Path, *, checkout: Checkout | None = None, commit: str | None = None) -> Moved:
    """Write the carried series and the new pin into a checkout.

    The old files are in its history: it refuses where they are not, or are changed.

    Args:
        work: The work repository of a finished rebase.
        checkout: The checkout to change; this one without it.
        commit: The release's full commit; asked of upstream's repository without it.

    Raises:
        StackError: The rebase is not finished, the files are changed, the commit is not known or is
            another one than the sdist tells, or the index lacks a file of the release.
    """
    checkout = checkout or Checkout()
    state, carried = rebasing.result(work)
    old = checkout.pin
    if state.origin != old.version:
        raise StackError(
            f"{work} carries the series from {state.origin}, but the pin is {old.version}",
            "`python -m stack rebase --abort`, then start again",
        )
    _refuse_changes(checkout)
    archive = download.fetch_sdist(state.onto)
    release = release_index.release(old.project, state.onto)
    if release.sdist.sha256 != (got := download.sha256_of(archive)):
        raise StackError(
            f"the index lists {release.sdist.filename} with sha256 {release.sdist.sha256}, the "
            f"series was carried to one with {got}",
            "do not go on before you know why",
        )
    commit = _full_commit(commit, archive, old, state.onto)
    learned = rebase_save.learn(work, carried)
    with scratch(checkout.root / ".build", ".pin-") as folder:
        staged = Checkout(folder)
        text = checkout.pin_file.read_text(encoding="utf-8")
        new_text, torch = _pin_text(text, release, commit, archive, tree_of(work, state.new_base))
        staged.pin_file.write_text(new_text, encoding="utf-8")
        listing = shared.render(sdist.contents(archive), state.onto)
        shared.write(staged.shared_files, listing)
        shutil.copytree(checkout.patches, staged.patches)
        rebase_save.hand_over(work, state)
        export_series(work, checkout=staged)
        _put_in_place(staged, checkout)
    report = checkout.root / ".build" / f"rebase-{state.onto}.md"
    report.write_text(rebase_report.markdown(work, state, carried, learned), encoding="utf-8")
    statuses = rebase_report.table(work, state, carried, learned)
    return Moved(statuses, tuple(_todo(checkout, old, state.onto, commit, torch, report)))


def _refuse_changes(checkout: Checkout) -> None:
    done = git("rev-parse", "--is-inside-work-tree", cwd=checkout.root, check=False)
    if done.returncode:
        raise StackError(
            f"{checkout.root} is no git checkout: the old series could not be had back",
            "move the pin in a clone of the project",
        )
    paths = ["patches", "upstream.toml", "stack/shared-files"]
    changed = git("status", "--porcelain", "--", *paths, cwd=checkout.root).lines
    if changed:
        raise StackError(
            f"{changed[0][3:]} is changed or new, and would be replaced",
            "commit it, or put it back with `git restore`",
        )


def _full_commit(given: str | None, archive: Path, pin: Pin, version: str) -> str:
    told = told_commit(archive)
    commit = given
    if commit is None:
        tag = f"refs/tags/v{version}"
        names = (tag, f"{tag}^{{}}")
        shown = git("ls-remote", pin.repository, *names, cwd=archive.parent, check=False)
        found = dict(reversed(line.split("\t")) for line in shown.lines)
        commit = found.get(names[1]) or found.get(names[0])
        if commit is None:
            reason = shown.last_error if shown.returncode else f"it has no tag v{version}"
            raise StackError(
                f"the commit of {version} was not told by {pin.repository}: {reason}",
                f"give it with --commit; it begins with {told or 'what the release says'}",
            )
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise StackError(f"--commit is {commit!r}, expected 40 hex digits")
    if not commit.startswith(told):
        raise StackError(
            f"commit {commit} is not the one that {archive.name} was made from: {told}",
            "look for a moved tag",
        )
    return commit


def _pin_text(
    text: str, release: Release, commit: str, archive: Path, base_tree: str
) -> tuple[str, str]:
    """The new ``upstream.toml``, and the torch that the release wants."""
    requirements = read_file(archive, "requirements/cuda.txt") or ""
    torch = re.search(r"^torch\s*==\s*([0-9.]+)", requirements, flags=re.M)
    if torch is None:
        raise StackError(f"{archive.name}: requirements/cuda.txt pins no torch", "pin it by hand")
    project = tomllib.loads(read_file(archive, "pyproject.toml") or "").get("project", {})
    values = {
        "release.version": release.version,
        "release.commit": commit,
        "release.torch": torch[1],
        "release.exclude-newer": (release.date + SETTLED).isoformat(),
        "tree.base": base_tree,
        "tree.patched": "",
    }
    if isinstance(project.get("requires-python"), str):
        values["release.requires-python"] = project["requires-python"]
    numbers = {"build.number": 1}
    files = {"sdist": release.sdist}
    files |= {f"wheel.{arch}": wheel for arch, wheel in release.wheels.items()}
    for table, artifact in files.items():
        values[f"{table}.filename"] = artifact.filename
        values[f"{table}.sha256"] = artifact.sha256
        numbers[f"{table}.size"] = artifact.size
    return _with_numbers(replaced(text, values), numbers), torch[1]


def _with_numbers(text: str, numbers: Mapping[str, int]) -> str:
    """Replace integers by dotted key; every other byte stays."""
    for dotted, number in numbers.items():
        table, _, key = dotted.rpartition(".")
        pattern = rf"(^\[{re.escape(table)}\]$(?:\n(?!\[).*)*?\n{re.escape(key)}[ ]*=[ ]*)\d+"
        text, count = re.subn(pattern, rf"\g<1>{number}", text, count=1, flags=re.M)
        if not count:
            raise StackError(f"upstream.toml: no line {key} = NUMBER in [{table}]", "add it")
    return text


def _put_in_place(staged: Checkout, checkout: Checkout) -> None:
    """Copy what was made over the checkout's files; the pin comes last."""
    old_listing = checkout.shared_files
    kept = set(files_in(staged.patches))
    for name in files_in(checkout.patches):
        if name not in kept:
            (checkout.patches / name).unlink()
    shutil.copytree(staged.patches, checkout.patches, dirs_exist_ok=True)
    new_listing = checkout.root / staged.shared_files.relative_to(staged.root)
    new_listing.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(staged.shared_files, new_listing)
    if old_listing != new_listing:
        old_listing.unlink(missing_ok=True)
    shared.write(checkout.pin_file, staged.pin_file.read_text(encoding="utf-8"))
    name = checkout.submodule.name
    staged_link = git("ls-files", "-s", "--", name, cwd=checkout.root).text
    if staged_link.startswith("160000 "):
        commit = staged.pin.commit
        git("update-index", "--cacheinfo", f"160000,{commit},{name}", cwd=checkout.root)


def _todo(
    checkout: Checkout, old: Pin, version: str, commit: str, torch: str, report: Path
) -> list[str]:
    lines = []
    name = checkout.submodule.name
    if (checkout.submodule / ".git").exists():
        lines.append(f"git -C {name} fetch --depth 1 origin {commit}")
        lines.append(f"git -C {name} checkout -q {commit}")
    if torch != old.torch:
        lines.append(
            f"edit upstream.toml    # triton and cuda are still those of torch {old.torch}; "
            f"{version} wants torch {torch}"
        )
    lines.append(f"python -m stack constraints    # the locks are still those of {old.version}")
    lines.append("python -m stack check")
    lines.append(f"edit CHANGELOG.md    # the range-diff is in {rebasing.shown_path(report)}")
    return lines
