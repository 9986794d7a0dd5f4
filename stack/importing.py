"""Turn the series into commits: the release's commit, then one commit a patch, by ``git am``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stack import shared, source, worktree
from stack.checkout import Checkout
from stack.errors import StackError
from stack.git import git
from stack.header import Patch
from stack.scratch import scratch
from stack.series import load_series

# No three-way merge, no reduced context (-C), no white-space mending: a patch applies as it is
# written or not at all. The committer's date is the author's: an id depends on the patches alone.
AM = (
    *("am", "-q", "--no-3way", "--keep-cr", "--keep-non-patch", "--no-scissors"),
    *("--whitespace=nowarn", "--committer-date-is-author-date", "--no-gpg-sign"),
)
UPTO_BASE = "base"


@dataclass(frozen=True)
class ImportedSeries:
    """A work tree with the series on it.

    Args:
        path: The git work tree.
        base: Id of the release's commit.
        head: Id of the last patch's commit; ``base`` for an empty series.
        patches: Names of the imported patches, in order.
        commits: Their commit ids, in the same order.
    """

    path: Path
    base: str
    head: str
    patches: tuple[str, ...]
    commits: tuple[str, ...]


def import_series(
    destination: Path | None = None,
    *,
    checkout: Checkout | None = None,
    upto: str | None = None,
    force: bool = False,
    echo: Callable[[str], None] = lambda line: None,
) -> ImportedSeries:
    """Make a git work tree of the pinned release with the series on it, a commit a patch.

    The commits are made in a folder beside the destination, and put in place once every patch has
    applied. A failure or an interruption leaves the destination as it was.

    Args:
        destination: The work tree's folder; ``.build/vllm`` without it. It may be missing, empty,
            or made by an earlier import.
        checkout: Whose pin and patches; this checkout without it.
        upto: The last patch to import, by its name in the series or its file's name; ``base`` for
            none. The patches after it are held back, and ``export`` leaves them as they are.
        force: Replace edits and commits that were not exported. The edits go to git's stash and the
            commits to a branch ``kept-ID``.
        echo: Called with a line for each patch, as it applies.

    Raises:
        StackError: A patch does not apply, a file that it touches differs from the list of shared
            files, or the destination holds work that was not exported.
    """
    checkout = checkout or Checkout()
    destination = Path(destination or checkout.work_tree).absolute()
    series = load_series(checkout.patches)
    chosen = _prefix(series, upto)
    existing = _may_replace(destination, force)
    with scratch(destination.parent, f".{destination.name}.part-") as folder:
        made = apply_series(folder / "applied", checkout, chosen, echo, destination)
        tree = destination
        if not existing:
            tree = folder / "tree"
            tree.mkdir()
            git("init", "-q", "--template=", "-b", worktree.BRANCH, cwd=tree)
            source.base_commit(tree, checkout)
        git("fetch", "-q", "--no-tags", "--no-write-fetch-head", made.path, made.head, cwd=tree)
        state = worktree.State(
            release=checkout.pin.version,
            base=made.base,
            exported=made.head,
            held_back=tuple(patch.name for patch in series[len(chosen) :]),
        )
        if existing and force:
            _put_aside(destination, echo)
        git("checkout", "-q", "-f", "-B", worktree.BRANCH, made.head, cwd=tree)
        worktree.write_state(tree, state)
        if not existing:
            if destination.is_dir():
                destination.rmdir()
            tree.rename(destination)
    return ImportedSeries(destination, made.base, made.head, made.patches, made.commits)


def apply_series(
    folder: Path,
    checkout: Checkout,
    series: Sequence[Patch],
    echo: Callable[[str], None] = lambda line: None,
    destination: Path | None = None,
) -> ImportedSeries:
    """Make a new repository in ``folder`` with the release and these patches on it.

    It borrows the release's objects from the cache, and has only the files checked out that the
    patches touch: it is for a look, and is thrown away by the caller.

    Args:
        folder: A path that does not exist yet.
        checkout: Whose pin and list of shared files.
        series: The patches, in order.
        echo: Called with a line for each patch.
        destination: The folder to name in an error's hint.
    """
    base = prepare(folder, checkout, series)
    verify_touched(folder, checkout, series)
    commits: list[str] = []
    for number, patch in enumerate(series, start=1):
        echo(f"[{number}/{len(series)}] {patch.name}")
        failed = apply_patch(folder, patch)
        if failed is not None:
            previous = series[number - 2].name if number > 1 else UPTO_BASE
            raise _failure(patch, failed, previous, checkout, destination)
        commits.append(worktree.head(folder))
    names = tuple(patch.name for patch in series)
    return ImportedSeries(folder, base, (commits or [base])[-1], names, tuple(commits))


def prepare(folder: Path, checkout: Checkout, series: Sequence[Patch]) -> str:
    """Make a new repository in ``folder`` for ``apply_patch``, and return the release's commit.

    It borrows the release's objects from the cache, and has only the files checked out that the
    patches touch.
    """
    folder.mkdir()
    git("init", "-q", "--template=", "-b", worktree.BRANCH, cwd=folder)
    base = source.base_commit(folder, checkout, borrow=True)
    paths = sorted({path for patch in series for path in patch.paths})
    patterns = "".join(re.sub(r"([\\*?\[ ])", r"\\\1", f"/{path}") + "\n" for path in paths)
    info = folder / ".git" / "info"
    info.mkdir(exist_ok=True)
    # A file that does not exist matches the second pattern: no file at all is checked out then.
    (info / "sparse-checkout").write_text(patterns or "/.git\n", encoding="utf-8")
    git("config", "core.sparseCheckout", "true", cwd=folder)
    git("reset", "-q", "--hard", base, cwd=folder)
    return base


def apply_patch(folder: Path, patch: Patch) -> str | None:
    """Commit a patch on a repository's head; where it fails, say where, and leave the head.

    Returns:
        ``None``, or the places: upstream's file and the line of the hunk.
    """
    done = git(*AM, cwd=folder, input=patch.raw, check=False)
    if done.returncode == 0:
        return None
    git("am", "--abort", cwd=folder, check=False)
    text = done.stderr.decode("utf-8", "replace")
    places = [
        f"{path}, hunk at line {line}"
        for path, line in re.findall(r"^error: patch failed: (.+):(\d+)$", text, flags=re.M)
    ]
    if not places:
        places = re.findall(r"^(?:error|fatal): (.+)$", text, flags=re.M)[:1]
    return "; ".join(places) or done.last_error


def verify_touched(folder: Path, checkout: Checkout, series: Sequence[Patch]) -> None:
    """Compare each shared file that the patches touch, as checked out, with the list's blob id.

    Raises:
        StackError: A file differs, or a patch touches one that the sources do not share.
    """
    problems = touched_problems(folder, checkout, series)
    if problems:
        raise StackError(problems[0], "run `python -m stack sources --compare`")


def touched_problems(folder: Path, checkout: Checkout, series: Sequence[Patch]) -> list[str]:
    """What ``verify_touched`` finds, a line for each file."""
    listed = shared.load(checkout.shared_files)
    touched: dict[str, str] = {}
    for patch in series:
        for path in patch.paths:
            touched.setdefault(path, patch.name)
    problems = [
        f"patches/{name} touches {path}, which the submodule and the sdist are not known to share: "
        f"{listed.excluded[path]}"
        for path, name in touched.items()
        if path in listed.excluded
    ]
    paths = sorted(path for path in touched if path in listed.files)
    found = git(
        *("hash-object", "--no-filters", "--stdin-paths"),
        cwd=folder,
        input="".join(f"{path}\n" for path in paths),
    ).lines
    problems += [
        f"{path} (touched by patches/{touched[path]}) is blob {blob}, but "
        f"{checkout.shared_files.name} lists {listed.files[path].blob}"
        for path, blob in zip(paths, found, strict=True)
        if blob != listed.files[path].blob
    ]
    return problems


def _prefix(series: list[Patch], upto: str | None) -> list[Patch]:
    if upto is None:
        return series
    if upto == UPTO_BASE:
        return []
    wanted = upto.removeprefix("patches/")
    matching = [
        number
        for number, patch in enumerate(series, start=1)
        if wanted in (patch.name, patch.name.partition("/")[2], Path(patch.name).stem)
    ]
    if not matching:
        names = ", ".join([UPTO_BASE, *(patch.name for patch in series)])
        raise StackError(f"--upto: {upto} is not in the series", f"use one of: {names}")
    return series[: matching[0]]


def _may_replace(destination: Path, force: bool) -> bool:
    """Whether the destination is a work tree to update; false where it is to be made.

    Raises:
        StackError: It is something else, or holds work that would be lost.
    """
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise StackError(f"{destination} is not a folder", "choose another with --to")
    if not destination.exists() or not any(destination.iterdir()):
        return False
    if not worktree.is_work_tree(destination):
        raise StackError(
            f"{destination} is not empty and was not made by import: it is left alone",
            "choose another folder with --to",
        )
    stopped = worktree.in_progress(destination)
    if stopped:
        raise StackError(
            f"{destination}: a `{stopped}` has stopped half-way there",
            f"finish it, or run `{stopped} --abort` there",
        )
    if force:
        return True
    state = worktree.read_state(destination)
    losses = [f"commit {line}" for line in worktree.unexported(destination, state)]
    losses += [f"edit {line}" for line in worktree.edits(destination)]
    if losses:
        raise StackError(
            f"{destination} holds work that was not exported:\n"
            + "\n".join(f"    {line}" for line in losses),
            "commit and run `python -m stack export` to keep it, or import with --force",
        )
    return True


def _put_aside(destination: Path, echo: Callable[[str], None]) -> None:
    """Keep edits in the stash and commits on a branch of their own before they are replaced."""
    state = worktree.read_state(destination)
    if worktree.edits(destination):
        message = "replaced by `stack import --force`"
        git("stash", "push", "-q", "--include-untracked", "-m", message, cwd=destination)
        echo("edits that were not committed: kept, see `git stash list`")
    if worktree.unexported(destination, state):
        commit = worktree.head(destination)
        branch = f"kept-{commit[:12]}"
        git("branch", "-f", branch, commit, cwd=destination)
        echo(f"commits that were not exported: kept on the branch {branch}")


def _failure(
    patch: Patch,
    places: str,
    previous: str,
    checkout: Checkout,
    destination: Path | None,
) -> StackError:
    to = ""
    if destination is not None and destination != checkout.work_tree.absolute():
        to = f" --to {destination}"
    tree = destination or checkout.work_tree
    shown = os.path.relpath(checkout.patches / patch.name, tree)
    return StackError(
        f"patches/{patch.name} does not apply: {places}",
        f"run `python -m stack import --upto {previous}{to}`, then in {tree} "
        f"`git am --reject --keep-cr --keep-non-patch {shown}`; do by hand what its .rej files "
        "say, delete them, `git add` and `git am --continue`; then `python -m stack export`",
    )
