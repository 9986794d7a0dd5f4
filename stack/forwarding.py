"""How the series fares on later releases: each patch tried in turn, on what applied before it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stack import download
from stack.checkout import Checkout
from stack.git import git
from stack.importing import apply_series
from stack.pin import Artifact
from stack.scratch import scratch
from stack.series import load_series, series_file
from stack.source import release_commit
from stack.trial import Outcome, Trial, attempt


@dataclass(frozen=True)
class Line:
    """What became of one patch.

    Attributes:
        patch: Its path below ``patches/``.
        trial: How it went.
        missing: Patches that it depends on and that were left out before it.
    """

    patch: str
    trial: Trial
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forwarded:
    """The series on one release: the release, its sdist, and a line a patch in order."""

    version: str
    sdist: Artifact
    lines: tuple[Line, ...]

    def count(self, outcome: Outcome) -> int:
        """How many patches fared so."""
        return sum(line.trial.outcome is outcome for line in self.lines)


def series_digest(patches: Path) -> str:
    """SHA-256 over the order file and each patch's name and bytes, as 64 hex digits."""
    digest = hashlib.sha256(series_file(patches).read_bytes())
    for patch in load_series(patches):
        digest.update(f"\0{patch.name}\0{len(patch.raw)}\0".encode())
        digest.update(patch.raw)
    return digest.hexdigest()


def forward(
    versions: Sequence[str],
    *,
    checkout: Checkout | None = None,
    sdists: dict[str, Path] | None = None,
    started: Callable[[str], None] = lambda version: None,
    tried: Callable[[Line], None] = lambda line: None,
) -> list[Forwarded]:
    """Try the series on each release.

    A patch in conflict is left out, and the next ones are tried on what applied; one that is
    already upstream changes nothing. No recorded resolution is used: this shows what git alone
    makes of the series. The work is done in a temporary repository.

    Args:
        versions: The releases, in the order of the result.
        checkout: Whose pin, source and series; this checkout without it.
        sdists: Archives of releases, for those that are not to be fetched.
        started: Called with each release before its patches.
        tried: Called with each line as it is known.

    Raises:
        StackError: The series does not apply to its own release, or a release cannot be had.
    """
    checkout = checkout or Checkout()
    series = load_series(checkout.patches)
    archives = {v: (sdists or {}).get(v) or download.fetch_sdist(v) for v in versions}
    results = []
    with scratch(checkout.root / ".build", ".forward-") as folder:
        work = folder / "tree"
        imported = apply_series(work, checkout, series)
        for version in versions:
            started(version)
            archive = archives[version]
            release = release_commit(work, version, sdist=archive)
            git("checkout", "-q", "-f", "--detach", release, cwd=work)
            left_out: set[str] = set()
            lines = []
            for patch, commit in zip(series, imported.commits, strict=True):
                trial = attempt(work, commit)
                if trial.outcome in (Outcome.APPLIES, Outcome.THREE_WAY):
                    git("commit", "-q", "--no-verify", "-C", commit, cwd=work)
                else:
                    git("reset", "-q", "--hard", cwd=work)
                missing = tuple(name for name in patch.values("Depends") if name in left_out)
                if trial.outcome is Outcome.CONFLICT:
                    left_out.add(patch.name)
                lines.append(Line(patch.name, trial, missing))
                tried(lines[-1])
            artifact = Artifact(archive.name, archive.stat().st_size, download.sha256_of(archive))
            results.append(Forwarded(version, artifact, tuple(lines)))
    return results
