"""Compare the two sources of the pinned release, file by file, with the list of shared files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stack import sdist, shared, source
from stack.checkout import Checkout
from stack.errors import StackError
from stack.sdist import File
from stack.shared import SharedFiles


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Args:
        compared: The sources that were read: ``sdist``, ``submodule``.
        differences: One line for each listed file that a source lacks or has otherwise.
        submodule_only: Tracked files of the submodule that are not on the list, with why.
    """

    compared: tuple[str, ...]
    differences: tuple[str, ...]
    submodule_only: tuple[str, ...]


def compare(checkout: Checkout, archive: Path | None, submodule: bool) -> Comparison:
    """Compare the list of shared files with the sources that are at hand.

    Args:
        checkout: Whose pin, submodule and list.
        archive: The sdist, or ``None`` to leave it out.
        submodule: Whether to read the submodule, which must be at the pinned commit.

    Raises:
        StackError: The list is missing or malformed, or a source cannot be read.
    """
    listed = shared.load(checkout.shared_files)
    compared: list[str] = []
    differences: list[str] = []
    submodule_only: tuple[str, ...] = ()
    if archive is not None:
        compared.append("sdist")
        contents = sdist.contents(archive)
        differences += source.differences(listed.files, contents.files, "sdist")
        differences += _unlisted(listed, contents)
    if submodule:
        compared.append("submodule")
        tracked = source.submodule_files(checkout)
        differences += source.differences(listed.files, tracked, "submodule")
        submodule_only = tuple(_only_tracked(tracked, listed))
    return Comparison(tuple(compared), tuple(differences), submodule_only)


def _unlisted(listed: SharedFiles, contents: sdist.Contents) -> list[str]:
    """Files of the sdist that the list says nothing of, or says otherwise than the rules do."""
    lines = [
        f"{path}: in the sdist, not listed" for path in contents.files if path not in listed.files
    ]
    for path in sorted(set(listed.excluded) | set(contents.excluded)):
        if listed.excluded.get(path) != contents.excluded.get(path):
            lines.append(
                f"{path}: the list gives {listed.excluded.get(path, 'no exclusion')!r}, "
                f"the rules {contents.excluded.get(path, 'no exclusion')!r}"
            )
    return lines


def _only_tracked(tracked: Mapping[str, File], listed: SharedFiles) -> list[str]:
    return [
        f"{path}: {listed.excluded.get(path, 'not in the sdist')}"
        for path in tracked
        if path not in listed.files
    ]


def by_reason(excluded: Mapping[str, str]) -> list[str]:
    """The excluded files as lines: each reason, then its files."""
    lines: list[str] = []
    for reason in dict.fromkeys(excluded.values()):
        paths = [path for path, other in excluded.items() if other == reason]
        lines.append(f"  {reason}: {len(paths)}")
        lines += [f"    {path}" for path in paths]
    return lines


def cached_sdist(checkout: Checkout) -> Path | None:
    """The pinned sdist where the cache has it, its digest checked; nothing is downloaded."""
    from stack import download

    if not (download.cache_dir() / checkout.pin.sdist.filename).is_file():
        return None
    return source.pinned_sdist(checkout)


def demand_submodule(checkout: Checkout) -> None:
    """Raise unless the submodule is checked out at the pinned commit.

    Raises:
        StackError: It is not, with the command to type.
    """
    if source.find(checkout).kind != "submodule":
        raise StackError(
            f"{checkout.submodule} is not checked out, and --compare needs both sources",
            f"run `git submodule update --init {checkout.submodule.name}` where its host can be "
            "reached",
        )


def report(found: Sequence[str], limit: int) -> list[str]:
    """The first lines, and how many more there are; ``limit`` 0 gives all."""
    if limit and len(found) > limit:
        return [*found[:limit], f"... and {len(found) - limit} more (--compare lists all)"]
    return list(found)
