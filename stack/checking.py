"""``check``: hold the series to every law, and list every violation."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stack import importing, laws, shared, source, worktree
from stack.checkout import Checkout
from stack.errors import StackError
from stack.exporting import order_text, render
from stack.git import git
from stack.header import Patch, load
from stack.scratch import scratch
from stack.series import files_in, read_order, series_file
from stack.shared import SharedFiles


@dataclass(frozen=True)
class Law:
    """How one law fared.

    Args:
        name: A word or two.
        holds: What is true where it holds, with the numbers that were seen.
        violations: One line each, naming the file.
        skipped: Why it could not be checked, or nothing.
    """

    name: str
    holds: str
    violations: tuple[str, ...] = ()
    skipped: str = ""

    @property
    def lines(self) -> list[str]:
        """What is printed: one line where the law holds, else one for each violation."""
        if self.violations:
            return [f"FAIL  {self.name}: {line}" for line in self.violations]
        if self.skipped:
            return [f"----  {self.name}: not checked: {self.skipped}"]
        return [f"ok    {self.name}: {self.holds}"]


def check(checkout: Checkout | None = None) -> list[Law]:
    """Check every law of the series.

    Raises:
        StackError: The release cannot be had, or the list of shared files is missing.
    """
    checkout = checkout or Checkout()
    order, series = _order(checkout)
    listed = shared.load(checkout.shared_files)
    found = [order, *_headers(checkout, series, listed)]
    with scratch(checkout.root / ".build", ".check-") as folder:
        return found + _applied(folder / "tree", checkout, series, not order.violations)


def _order(checkout: Checkout) -> tuple[Law, list[Patch]]:
    """The order file is sound and complete, and every patch can be read."""
    order = read_order(checkout.patches)
    problems = list(order.problems)
    series = []
    for name in order.names:
        try:
            patch = load(checkout.patches, name)
            _ = patch.subject, patch.changes
        except StackError as error:
            problems.append(error.message)
        else:
            series.append(patch)
    problems += [
        f"patches/{name}: not in patches/series"
        for name in files_in(checkout.patches)
        if name not in order.names
    ]
    count = len(order.names)
    holds = f"patches/series names {count} patches, each once, and leaves no file out"
    return Law("order", holds, tuple(problems)), series


def _headers(checkout: Checkout, series: Sequence[Patch], listed: SharedFiles) -> list[Law]:
    """The laws that need no repository."""
    names = [patch.name for patch in series]
    most = max(series, key=laws.code_lines, default=None)
    total = sum(laws.code_lines(patch) for patch in series)
    shown = "no code" if most is None else f"{laws.code_lines(most)} at most ({most.name})"
    return [
        Law(
            "header",
            "subject, reason and trailers are complete, files are named after subjects",
            _each(series, laws.header),
        ),
        Law(
            "depends",
            "every patch that Depends names stands earlier; no core patch depends on an extra one",
            tuple(
                f"patches/{patch.name}: {line}"
                for number, patch in enumerate(series)
                for line in laws.dependencies(patch, names[:number], names)
            ),
        ),
        Law(
            "tests",
            "everything that Tests names exists",
            _each(series, lambda patch: _missing_tests(patch, checkout, listed, series)),
        ),
        Law(
            "seams",
            f"added lines of code a patch: {shown}, {total} in all (limit {laws.MOST_CODE_LINES})",
            _each(series, laws.seam),
        ),
        Law("white space", "no added line ends in blanks", _each(series, laws.white_space)),
        Law(
            "shared files",
            f"no patch touches one of the {len(listed.excluded)} files that may differ by source",
            _each(series, lambda patch: laws.shared_only(patch, listed)),
        ),
    ]


def _each(series: Iterable[Patch], law: Callable[[Patch], list[str]]) -> tuple[str, ...]:
    return tuple(f"patches/{patch.name}: {line}" for patch in series for line in law(patch))


def _missing_tests(
    patch: Patch, checkout: Checkout, listed: SharedFiles, series: Sequence[Patch]
) -> list[str]:
    """The entries of Tests that exist neither here nor in upstream's (patched) tree."""
    added = {path for other in series for path in other.paths}
    upstream = added | set(listed.files)
    lines = []
    for entry in patch.values("Tests"):
        path, *names = entry.split("::")
        names = [name.partition("[")[0] for name in names]
        path = path.rstrip("/")
        here = checkout.root / path
        if Path(path).is_absolute() or ".." in path.split("/"):
            lines.append(f"trailer Tests names {entry}, expected a path below the checkout")
        elif here.is_file():
            if names and not laws.defines_test(here.read_text(encoding="utf-8"), names):
                lines.append(f"trailer Tests names {entry}, but {path} does not define it")
        elif here.is_dir() and not names and any(here.rglob("test_*.py")):
            continue
        elif path not in upstream and not any(file.startswith(f"{path}/") for file in upstream):
            lines.append(f"trailer Tests names {entry}, which exists neither here nor upstream")
    return lines


def _applied(folder: Path, checkout: Checkout, series: Sequence[Patch], whole: bool) -> list[Law]:
    """The laws of the series as commits."""
    base = importing.prepare(folder, checkout, series)
    touched = importing.touched_problems(folder, checkout, series)
    failed, commits = _apply_all(folder, series)
    count = len(series)
    found = [
        _base_tree(folder, base, checkout, touched),
        Law("apply", f"{count} patches apply without fuzz", tuple(failed)),
        Law(
            "prefixes",
            f"each of the {count} prefixes of the series applies and compiles",
            tuple(_compile_errors(folder, checkout, series, commits)),
        ),
    ]
    why = "" if whole and not failed else "the series does not apply as a whole"
    found.append(_round_trip(folder, checkout, series, commits, why))
    found.append(_patched_tree(folder, checkout, commits, base, why))
    git("reset", "-q", "--hard", base, cwd=folder)
    found.append(_core_alone(folder, checkout, series, why))
    return found


def _apply_all(folder: Path, series: Sequence[Patch]) -> tuple[list[str], list[str | None]]:
    """Apply what applies. A patch that fails is left out, and the next ones are tried."""
    failed = []
    commits: list[str | None] = []
    for patch in series:
        places = importing.apply_patch(folder, patch)
        if places is None:
            commits.append(worktree.head(folder))
        else:
            commits.append(None)
            failed.append(f"patches/{patch.name}: does not apply: {places}")
    return failed, commits


def _base_tree(folder: Path, base: str, checkout: Checkout, touched: list[str]) -> Law:
    tree = source.tree_of(folder, base)
    problems = list(touched)
    if tree != checkout.pin.base_tree:
        problems.insert(
            0,
            f"upstream.toml: [tree].base is {checkout.pin.base_tree or 'empty'}, "
            f"the release's tree is {tree}",
        )
    kind = source.find(checkout).kind
    return Law("base", f"the release's tree is {tree} (from the {kind})", tuple(problems))


def _compile_errors(
    folder: Path,
    checkout: Checkout,
    series: Sequence[Patch],
    commits: Sequence[str | None],
) -> list[str]:
    """Compile the Python files that each patch touches, as they are right after it.

    The files that it does not touch are those of the prefix before. The grammar is that of the
    oldest Python that the release takes.
    """
    match = re.search(r">=\s*3\.(\d+)", checkout.pin.requires_python)
    oldest = (3, int(match[1])) if match else (3, 10)
    problems = []
    for patch, commit in zip(series, commits, strict=True):
        for path in patch.paths if commit else ():
            if not path.endswith(".py"):
                continue
            shown = git("cat-file", "blob", f"{commit}:{path}", cwd=folder, check=False)
            if shown.returncode:
                continue  # the patch deletes it
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tree = ast.parse(shown.stdout, path, feature_version=oldest)
                    compile(tree, path, "exec", dont_inherit=True)
            except (SyntaxError, ValueError) as error:
                line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
                text = error.msg if isinstance(error, SyntaxError) else error
                problems.append(f"patches/{patch.name}: {path}{line}: {text}")
    return problems


def _round_trip(
    folder: Path,
    checkout: Checkout,
    series: Sequence[Patch],
    commits: Sequence[str | None],
    why: str,
) -> Law:
    problems = []
    for patch, commit in zip(series, commits, strict=True):
        if commit and render(folder, commit).raw != patch.raw:
            problems.append(f"patches/{patch.name}: import and export change it")
    order = read_order(checkout.patches)
    text = series_file(checkout.patches).read_text(encoding="utf-8")
    if not order.problems and order_text(order.lines, order.names) != text:
        problems.append("patches/series: import and export change it")
    holds = f"import and export give {len(series)} patches and the order file back byte for byte"
    return Law("round trip", holds, tuple(problems), why)


def _patched_tree(
    folder: Path, checkout: Checkout, commits: Sequence[str | None], base: str, why: str
) -> Law:
    if why:
        return Law("tree", "", skipped=why)
    tree = source.tree_of(folder, (commits[-1] if commits else None) or base)
    wanted = checkout.pin.patched_tree
    problems = []
    if tree != wanted:
        problems.append(
            f"upstream.toml: [tree].patched is {wanted or 'empty'}, the series gives {tree}"
        )
    return Law("tree", f"the tree after the series is {tree}", tuple(problems))


def _core_alone(folder: Path, checkout: Checkout, series: Sequence[Patch], why: str) -> Law:
    """The core patches apply and compile where every extra one is parked."""
    core = [patch for patch in series if patch.name.startswith("core/")]
    holds = f"the {len(core)} core patches apply and compile without the extra ones"
    if why:
        return Law("core alone", holds, skipped=why)
    failed, commits = _apply_all(folder, core)
    problems = [f"{line} (without the extra patches)" for line in failed]
    problems += _compile_errors(folder, checkout, core, commits)
    return Law("core alone", holds, tuple(problems))
