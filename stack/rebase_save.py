"""Keep the result of a rebase in ``carried/RELEASE/``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from stack import download, rebase_report, rebasing, resolutions, worktree
from stack.carried import RELEASE_FILE, REPORT, RESOLUTIONS, CarriedCheckout, release_text
from stack.checkout import Checkout
from stack.errors import StackError
from stack.exporting import export_series
from stack.resolutions import Resolutions
from stack.scratch import scratch
from stack.source import tree_of


@dataclass(frozen=True)
class Saved:
    """What was kept: the folder, each patch's status, and how many resolutions there are."""

    folder: Path
    statuses: dict[str, str]
    learned: Resolutions


def learn(work: Path, carried: list[rebasing.Carried]) -> Resolutions:
    """The resolutions that the finished rebase stands on."""
    pairs = [(c.patch, c.old, c.new) for c in carried if c.new is not None or c.dropped]
    return resolutions.learn(work, pairs)


def hand_over(work: Path, state: rebasing.State) -> None:
    """Let ``export`` read the work repository: it stands on the new release."""
    worktree.write_state(work, worktree.State(state.onto, state.new_base, state.new_base))


def save(
    work: Path, folder: Path, *, checkout: Checkout | None = None, sdist: Path | None = None
) -> Saved:
    """Write the carried series, its resolutions and the report.

    The folder is replaced once everything in it is there.

    Args:
        work: The work repository of a finished rebase.
        folder: The folder to write; what it holds of an earlier save is replaced.
        checkout: The checkout that the rebase was started from; this one without it.
        sdist: The new release's archive; fetched without it.

    Raises:
        StackError: The rebase is not finished, the folder holds something else, or the carried
            commits break a law of the series.
    """
    checkout = checkout or Checkout()
    state, carried = rebasing.result(work)
    if folder.exists() and not (folder / RELEASE_FILE).is_file() and any(folder.iterdir()):
        raise StackError(
            f"{folder} holds no carried series", "move it away, or name another folder"
        )
    archive = sdist or download.fetch_sdist(state.onto)
    learned = learn(work, carried)
    with scratch(checkout.root / ".build", ".carried-") as part:
        made = part / "made"
        made.mkdir()
        base_tree = tree_of(work, state.new_base)
        text = release_text(state.onto, archive, base_tree)
        (made / RELEASE_FILE).write_text(text, encoding="utf-8")
        # The order file's comments, and which patch is extra, come from the old series.
        shutil.copytree(checkout.patches, made / "patches", ignore=shutil.ignore_patterns("*.md"))
        hand_over(work, state)
        export_series(work, checkout=CarriedCheckout(checkout.root, made, archive))
        _remove_strays(made / "patches")
        resolutions.save(made / RESOLUTIONS, learned)
        report = rebase_report.markdown(work, state, carried, learned)
        (made / REPORT).write_text(report, encoding="utf-8")
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            folder.rename(part / "old")
        made.rename(folder)
    return Saved(folder, rebase_report.table(work, state, carried, learned), learned)


def _remove_strays(patches: Path) -> None:
    """Keep what the series is made of, and nothing that stood beside it."""
    from stack.series import files_in, read_order

    named = set(read_order(patches).names)
    for name in files_in(patches):
        if name not in named:
            (patches / name).unlink()
    for path in patches.iterdir():
        if path.name not in ("series", "core", "extra"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
