"""The series on another release than the pinned one, kept in ``carried/RELEASE/``.

* ``release.toml``: the release, its sdist's digest, and the trees before and after the series;
* ``patches/``: the series there, in the same form as the main one;
* ``resolutions/``: what it took to get there (``stack.resolutions``);
* ``CHANGES.md``: a line a patch, and how each differs from the main one.
"""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from stack import download, sdist, shared
from stack.checkout import Checkout
from stack.errors import StackError
from stack.pin import ROOT, Artifact, Pin, load_pin, tomllib

RELEASE_FILE = "release.toml"
RESOLUTIONS = "resolutions"
REPORT = "CHANGES.md"

_TEMPLATE = """\
# The release that patches/ in this folder stands on. Made by `python -m stack rebase --save`.

[release]
version = "{version}"
# As far as the sdist tells it.
commit = "{commit}"

[sdist]
filename = "{sdist.filename}"
size = {sdist.size}
sha256 = "{sdist.sha256}"

[tree]
# git tree ids over the sdist's files: as released, and after the series.
base = "{base_tree}"
patched = ""
"""


def folder_of(version: str, root: Path = ROOT) -> Path:
    """Where the series on a release is kept."""
    return root / "carried" / version


def releases(root: Path = ROOT) -> list[str]:
    """The releases that a carried series is kept for."""
    return sorted(path.parent.name for path in (root / "carried").glob(f"*/{RELEASE_FILE}"))


@dataclass(frozen=True)
class CarriedCheckout(Checkout):
    """A checkout whose pin and patches are those of a carried series.

    Everything else (tests, kernels) is the checkout's own. The release comes from its sdist; the
    list of its files is made from the sdist, whose digest is in ``release.toml``.

    Attributes:
        folder: The folder of the carried series.
        archive: The sdist; fetched without it.
    """

    folder: Path = Path()
    archive: Path | None = None

    @property
    def pin_file(self) -> Path:
        """``release.toml``."""
        return self.folder / RELEASE_FILE

    @cached_property
    def pin(self) -> Pin:
        """The pin, with the release's own version, commit, sdist and trees; it has no wheels.

        The commit is as long as the sdist tells it.
        """
        table = _read(self.pin_file)
        return replace(
            load_pin(self.root / "upstream.toml"),
            version=table["release"]["version"],
            commit=table["release"]["commit"],
            sdist=Artifact(**table["sdist"]),
            wheels={},
            base_tree=table["tree"]["base"],
            patched_tree=table["tree"]["patched"],
        )

    @property
    def patches(self) -> Path:
        """The folder of the carried patches."""
        return self.folder / "patches"

    @property
    def submodule(self) -> Path:
        """A path that is never there: the release comes from its sdist."""
        return self.folder / "vllm"

    @property
    def shared_files(self) -> Path:
        """The list of the sdist's files, made on first use."""
        pin = self.pin
        name = f"{pin.version}-{pin.sdist.sha256[:16]}.txt"
        path = self.root / ".build" / "shared-files" / name
        if not path.exists():
            archive = self.archive or download.fetch(pin.sdist, project=pin.project)
            shared.write(path, shared.render(sdist.contents(archive), pin.version))
        return path


def _read(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        texts = [table["release"][key] for key in ("version", "commit")]
        texts += [table["sdist"][key] for key in ("filename", "sha256")]
        texts += [table["tree"][key] for key in ("base", "patched")]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a value is no text")
        if set(table["sdist"]) != {"filename", "size", "sha256"}:
            raise KeyError("sdist")
        if not re.fullmatch(r"[0-9a-f]{64}", table["sdist"]["sha256"]):
            raise ValueError("sdist.sha256 is not 64 hex digits")
        return table
    except FileNotFoundError:
        raise StackError(
            f"{path} does not exist", "run `python -m stack rebase --onto RELEASE --save`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise StackError(f"{path} is malformed: {error!r}", "restore it from git") from None


def open_carried(version: str, root: Path = ROOT) -> CarriedCheckout:
    """The carried series of a release.

    Raises:
        StackError: There is none; the hint names those that there are.
    """
    folder = folder_of(version, root)
    if not (folder / RELEASE_FILE).is_file():
        have = ", ".join(releases(root)) or "none"
        raise StackError(f"no series is carried to {version}", f"carried: {have}")
    return CarriedCheckout(root, folder, None)


def release_text(version: str, archive: Path, base_tree: str) -> str:
    """The text of ``release.toml``, before the series' tree is known."""
    artifact = Artifact(archive.name, archive.stat().st_size, download.sha256_of(archive))
    return _TEMPLATE.format(
        version=version, commit=told_commit(archive), sdist=artifact, base_tree=base_tree
    )


def told_commit(archive: Path) -> str:
    """The abbreviated commit that an sdist says it was made from; empty where it says none."""
    text = read_file(archive, "vllm/_version.py")
    match = re.search(r"^__commit_id__\s*=.*'g([0-9a-f]{7,40})'", text or "", flags=re.M)
    return match[1] if match else ""


def read_file(archive: Path, path: str) -> str | None:
    """One text file of an sdist, by its path below the top folder."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.isreg() and member.name.partition("/")[2] == path:
                    file = tar.extractfile(member)
                    assert file is not None  # a plain file always has contents
                    return file.read().decode("utf-8")
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise StackError(f"{archive}: cannot be read: {error}") from None
    return None
