"""Turn the commits of a work tree into ``patches/``: the inverse of ``stack.importing``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stack import importing, laws, pinfile, shared, source, worktree
from stack.checkout import Checkout
from stack.errors import StackError
from stack.git import git
from stack.header import Patch, slug
from stack.scratch import scratch
from stack.series import FOLDERS, files_in, load_series, read_order, series_file

# Full ids, no signature (it names git's version) and no diffstat (its layout is for reading, and
# changed over time): a patch is the same bytes whoever exports it.
FORMAT = (
    *("format-patch", "-1", "--stdout", "--zero-commit", "--full-index", "--no-signature"),
    *(
        "--no-stat",
        "-p",
        "--always",
        "--no-numbered",
        "--subject-prefix=PATCH",
        "--no-encode-email-headers",
    ),
    *("--no-attach", "--no-thread", "--no-cover-letter", "--no-add-header", "--no-to", "--no-cc"),
    *(
        "--no-from",
        "--no-signoff",
        "--no-notes",
        "--no-base",
        "--no-renames",
        "--no-ext-diff",
        "--no-textconv",
    ),
    *("--diff-algorithm=histogram", "--indent-heuristic", "-U3", "--inter-hunk-context=0"),
    *("--src-prefix=a/", "--dst-prefix=b/", "--binary", "--no-color", "-O/dev/null"),
)


@dataclass(frozen=True)
class ExportedSeries:
    """What an export did.

    Args:
        patches: The names of the series, in order, the held-back ones included.
        written: Patches that are new or whose bytes changed.
        removed: Patches whose commits are gone.
        patched_tree: Id of the tree after the series, or ``None`` where held-back patches do not
            apply to what was exported.
        notes: Lines for the user.
    """

    patches: tuple[str, ...]
    written: tuple[str, ...]
    removed: tuple[str, ...]
    patched_tree: str | None
    notes: tuple[str, ...]


def render(repo: Path, commit: str, folder: str = "core") -> Patch:
    """One commit as a patch below ``folder``, in the series' form.

    The result depends on the commit's tree, its parent's tree, its message, author and author's
    date, and on nothing else.
    """
    raw = git(*FORMAT, commit, cwd=repo).stdout
    return Patch(f"{folder}/{slug(Patch('', raw).subject)}.patch", raw)


def export_series(
    work_tree: Path | None = None,
    *,
    checkout: Checkout | None = None,
    extra: Collection[str] = (),
    core: Collection[str] = (),
    echo: Callable[[str], None] = lambda line: None,
) -> ExportedSeries:
    """Write the work tree's commits to ``patches/`` and the tree's id to ``upstream.toml``.

    Before anything is written, the patches are applied to a fresh copy of the release, and must
    give the same tree and, rendered again, the same bytes. Either everything is written or nothing.

    Args:
        work_tree: A folder made by ``import``; ``.build/vllm`` without it.
        checkout: Whose ``patches/`` and ``upstream.toml``; this checkout without it.
        extra: File names of patches that belong in ``extra/``.
        core: File names of patches that belong in ``core/``. A patch that is named in neither stays
            where it was; a new one goes to ``core/``.
        echo: Called with a line for each patch, as it applies to the fresh copy.

    Raises:
        StackError: There are edits, merges, ``fixup!`` commits, commits that break a law of the
            header, or the patches do not give the commits back. All of it is listed.
    """
    checkout = checkout or Checkout()
    work_tree = Path(work_tree or checkout.work_tree).absolute()
    state = worktree.read_state(work_tree)
    _reject_state(work_tree, state, checkout)
    known = _known(checkout)
    commits = git("rev-list", "--reverse", f"{state.base}..HEAD", cwd=work_tree).lines
    patches = _place([render(work_tree, commit) for commit in commits], known, extra, core)
    # A commit that has the name of a held-back patch takes its place.
    stems = {Path(patch.name).stem for patch in patches}
    held_back = [
        known[name] for name in state.held_back if name in known and Path(name).stem not in stems
    ]
    _reject_patches(work_tree, commits, patches, checkout)

    tree = source.tree_of(work_tree, "HEAD")
    patched_tree, notes = _verify(patches, held_back, tree, state, checkout, echo)
    series = [*patches, *held_back]
    written, removed = _write(checkout, series, patched_tree)
    waiting = tuple(patch.name for patch in held_back)
    worktree.write_state(
        work_tree, worktree.State(state.release, state.base, worktree.head(work_tree), waiting)
    )
    names = tuple(patch.name for patch in series)
    return ExportedSeries(names, tuple(written), tuple(removed), patched_tree, tuple(notes))


def order_text(old_lines: Sequence[str], names: Sequence[str]) -> str:
    """The order file for ``names``, with the comments of the old one.

    Comment and blank lines at the top, up to the first blank line, stay at the top. Others stay
    before the patch that they precede. Of a patch that is gone, the lines right above it go with
    it, and those that a blank line sets apart move to the next patch of the old order.
    """
    top: list[str] = []
    rest = list(old_lines)
    if rest and rest[0].startswith("#") and "" in (stripped := [line.strip() for line in rest]):
        blank = stripped.index("")
        if all(line.startswith("#") for line in rest[:blank]):
            top, rest = rest[: blank + 1], rest[blank + 1 :]
    above: dict[str, list[str]] = {}
    waiting: list[str] = []
    for line in rest:
        name = line.strip()
        if not name or name.startswith("#"):
            waiting.append(line)
        elif name in names:
            above[name] = waiting
            waiting = []
        else:
            kept = [number for number, other in enumerate(waiting) if not other.strip()]
            waiting = waiting[: kept[-1] + 1] if kept else []
    lines = [*top]
    for name in names:
        lines += [*above.get(name, []), name]
    return "".join(f"{line}\n" for line in [*lines, *waiting])


def _known(checkout: Checkout) -> dict[str, Patch]:
    if not series_file(checkout.patches).exists():
        return {}
    return {patch.name: patch for patch in load_series(checkout.patches)}


def _reject_state(work_tree: Path, state: worktree.State, checkout: Checkout) -> None:
    if state.release != checkout.pin.version:
        raise StackError(
            f"{work_tree} was imported from {state.release}, upstream.toml pins "
            f"{checkout.pin.version}",
            "import again into another folder, and carry the commits over with git",
        )
    stopped = worktree.in_progress(work_tree)
    if stopped:
        raise StackError(
            f"{work_tree}: a `{stopped}` has stopped half-way there",
            f"finish it with `{stopped} --continue`, or run `{stopped} --abort` there",
        )
    edits = worktree.edits(work_tree)
    if edits:
        raise StackError(
            f"{work_tree} has edits that are not committed:\n"
            + "\n".join(f"    {line}" for line in edits),
            "commit them (`git commit -a --fixup=COMMIT`), or drop them (`git restore FILE`)",
        )
    ancestor = git(*("merge-base", "--is-ancestor", state.base, "HEAD"), cwd=work_tree, check=False)
    if ancestor.returncode:
        raise StackError(
            f"{work_tree}: the release's commit {state.base[:12]} is not below the head",
            "put the commits back on it with `git rebase --onto base`",
        )
    merges = git("log", "--merges", "--format=%h %s", f"{state.base}..HEAD", cwd=work_tree).lines
    if merges:
        raise StackError(
            f"{work_tree}: merge commits cannot be exported: {'; '.join(merges)}",
            "make the history a line with `git rebase base`",
        )


def _place(
    patches: list[Patch],
    known: Mapping[str, Patch],
    extra: Collection[str],
    core: Collection[str],
) -> list[Patch]:
    """Give each patch its folder: as told, as it was, or ``core``."""
    wanted = {
        Path(name).name.removesuffix(".patch"): folder
        for folder, names in (("extra", extra), ("core", core))
        for name in names
    }
    slugs = {Path(patch.name).stem for patch in patches}
    unknown = sorted(set(wanted) - slugs)
    if unknown:
        raise StackError(
            f"--extra/--core: no commit's subject gives the file name {unknown[0]}.patch",
            f"use one of: {', '.join(sorted(slugs))}",
        )
    by_slug = {Path(name).stem: name.partition("/")[0] for name in known}
    # A commit that was only reworded has the diff of a patch that is gone.
    by_diff = {
        _diff(patch): name.partition("/")[0]
        for name, patch in known.items()
        if Path(name).stem not in slugs
    }
    placed = []
    for patch in patches:
        stem = Path(patch.name).stem
        folder = wanted.get(stem) or by_slug.get(stem) or by_diff.get(_diff(patch)) or FOLDERS[0]
        placed.append(Patch(f"{folder}/{stem}.patch", patch.raw))
    return placed


def _diff(patch: Patch) -> bytes:
    return patch.raw.partition(b"\ndiff --git ")[2]


def _reject_patches(
    work_tree: Path,
    commits: Sequence[str],
    patches: Sequence[Patch],
    checkout: Checkout,
) -> None:
    problems: list[str] = []
    seen: dict[str, str] = {}
    listed = shared.load(checkout.shared_files)
    for commit, patch in zip(commits, patches, strict=True):
        who = f"{commit[:12]} ({patch.subject})"
        stem = Path(patch.name).stem
        if not _diff(patch):
            problems.append(f"{who}: changes no file")
            continue
        if stem in seen:
            problems.append(f"{who}: its file name {stem}.patch is taken by {seen[stem]}")
        seen[stem] = who
        problems += [f"{who}: {line}" for line in laws.header(patch)]
        problems += [f"{who}: {line}" for line in laws.shared_only(patch, listed)]
    if problems:
        raise StackError(
            f"{work_tree}: nothing was exported:\n" + "\n".join(f"    {line}" for line in problems),
            "mend the commits with `git rebase -i --autosquash base` and export again",
        )


def _verify(
    patches: Sequence[Patch],
    held_back: Sequence[Patch],
    tree: str,
    state: worktree.State,
    checkout: Checkout,
    echo: Callable[[str], None],
) -> tuple[str | None, list[str]]:
    """Apply the patches to a fresh copy; return the series' tree and notes for the user."""
    with scratch(checkout.root / ".build", ".export-") as folder:
        made = importing.apply_series(folder / "tree", checkout, patches, echo)
        if made.base != state.base:
            raise StackError(
                f"the work tree stands on {state.base[:12]}, the release's commit is now "
                f"{made.base[:12]}",
                "import again into another folder, and carry the commits over with git",
            )
        for commit, patch in zip(made.commits, patches, strict=True):
            if render(made.path, commit).raw != patch.raw:
                raise StackError(
                    f"the commit {patch.subject!r} does not come back from its patch unchanged",
                    "see whether its message has a line that begins with `---` or `diff --git`",
                )
        if source.tree_of(made.path, made.head) != tree:
            raise StackError("the patches do not give the work tree's files back")
        for patch in held_back:
            failed = importing.apply_patch(made.path, patch)
            if failed is not None:
                note = (
                    f"patches/{patch.name} was held back, and does not apply to what was exported "
                    f"({failed}): [tree].patched is left as it was until it does"
                )
                return None, [note]
        return source.tree_of(made.path, "HEAD"), []


def _write(
    checkout: Checkout, series: Sequence[Patch], patched_tree: str | None
) -> tuple[list[str], list[str]]:
    """Write the patches, the order file and the pin; all of it, or nothing."""
    patches = checkout.patches
    old_lines: tuple[str, ...] = ()
    old_names: tuple[str, ...] = ()
    if series_file(patches).exists():
        order = read_order(patches)
        old_lines, old_names = order.lines, order.names
    names = [patch.name for patch in series]
    wanted: dict[Path, bytes] = {patches / patch.name: patch.raw for patch in series}
    wanted[series_file(patches)] = order_text(old_lines, names).encode("utf-8")
    if patched_tree is not None:
        text = checkout.pin_file.read_text(encoding="utf-8")
        new = pinfile.replaced(text, {"tree.patched": patched_tree})
        wanted[checkout.pin_file] = new.encode("utf-8")
    changed = {
        path: data
        for path, data in wanted.items()
        if not path.exists() or path.read_bytes() != data
    }
    # A file that the order file never named is not ours to delete: `check` reports it.
    removed = sorted(set(old_names) & set(files_in(patches)) - set(names))
    _replace_all(checkout.root / ".build", changed, [patches / name for name in removed])
    written = [patch.name for patch in series if patches / patch.name in changed]
    return written, removed


def _replace_all(build: Path, changed: Mapping[Path, bytes], removed: Sequence[Path]) -> None:
    """Replace and delete files. What fails half-way, or is interrupted, is put back."""
    with scratch(build, ".write-") as folder:
        new, old = folder / "new", folder / "old"
        new.mkdir()
        old.mkdir()
        targets = list(changed)
        for number, path in enumerate(targets):
            (new / str(number)).write_bytes(changed[path])
        touched = [*targets, *removed]
        for number, path in enumerate(touched):
            if path.exists():
                shutil.copy2(path, old / str(number))
        try:
            for number, path in enumerate(targets):
                path.parent.mkdir(parents=True, exist_ok=True)
                (new / str(number)).replace(path)
            for path in removed:
                path.unlink()
        except BaseException:
            for number, path in enumerate(touched):
                saved = old / str(number)
                if saved.exists():
                    shutil.copy2(saved, path)
                else:
                    path.unlink(missing_ok=True)
            raise
