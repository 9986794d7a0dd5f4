"""Which releases of vLLM the package index has, and which files belong to one of them."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stack import index
from stack.errors import StackError
from stack.pin import ARCHITECTURES, Artifact

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage

_VERSION = re.compile(r"\d+(\.\d+)+(\.post\d+)?")


@dataclass(frozen=True)
class Release:
    """A release's files on the index. ``wheels`` maps an architecture to upstream's wheel."""

    version: str
    date: datetime.date
    sdist: Artifact
    wheels: dict[str, Artifact]


def _listed(project: str) -> list[DistributionPackage]:
    import requests

    try:
        with index.session() as http:
            return index.listed(project, http)
    except requests.RequestException as error:
        raise StackError(
            f"the package index was not reached: {type(error).__name__}",
            "check the network and run again",
        ) from None


def _order(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _versions(packages: Iterable[DistributionPackage]) -> list[str]:
    """Final releases that have an sdist and were not yanked, oldest first."""
    found = {
        package.version
        for package in packages
        if package.package_type == "sdist" and package.version and not package.is_yanked
    }
    return sorted((v for v in found if _VERSION.fullmatch(v)), key=_order)


def newest(project: str) -> str:
    """The newest final release on the index.

    Raises:
        StackError: The index was not reached, or has none.
    """
    versions = _versions(_listed(project))
    if not versions:
        raise StackError(f"the package index has no sdist of {project}", "use another index")
    return versions[-1]


def require(project: str, version: str, known: Iterable[str] = ()) -> None:
    """Make sure that a release exists before anything is made for it.

    Args:
        project: The project on the index.
        version: What the user wrote.
        known: Releases that need not be asked for.

    Raises:
        StackError: It is no release's number, or the index does not have it; the hint names the
            nearest ones.
    """
    if not _VERSION.fullmatch(version):
        raise StackError(f"{version!r} is no release", "write it as in 0.23.0")
    if version in known:
        return
    versions = _versions(_listed(project))
    if version not in versions:
        raise StackError(
            f"the package index has no sdist of {project} {version}",
            f"the nearest are {', '.join(nearest(version, versions))}",
        )


def later(version: str, than: str) -> bool:
    """Whether a release comes after another."""
    return _order(version) > _order(than)


def nearest(version: str, versions: Iterable[str]) -> list[str]:
    """Up to two releases before ``version`` and two after it, in order."""
    before = [each for each in versions if _order(each) < _order(version)]
    after = [each for each in versions if _order(each) > _order(version)]
    return before[-2:] + after[:2]


def release(project: str, version: str) -> Release:
    """The files of one release, with the index's digests.

    Where a wheel was built again under a build number (``0.23.0-2``), the highest counts, as for
    pip.

    Raises:
        StackError: The index was not reached, or lacks the sdist or a wheel, or a digest.
    """
    packages = [package for package in _listed(project) if package.version == version]
    sdists = [package for package in packages if package.package_type == "sdist"]
    if not sdists:
        raise StackError(f"the package index has no sdist of {project} {version}")
    wheels = {}
    for arch in ARCHITECTURES:
        fitting = [
            package
            for package in packages
            if package.package_type == "wheel"
            and not package.is_yanked
            and re.search(rf"manylinux[0-9_]*_{arch}\.whl$", package.filename)
        ]
        if not fitting:
            raise StackError(f"the package index has no {arch} wheel of {project} {version}")
        wheels[arch] = _artifact(max(fitting, key=_build_number))
    uploaded = sdists[0].upload_time
    if uploaded is None:
        raise StackError(f"the package index does not say when {project} {version} was uploaded")
    return Release(version, uploaded.date(), _artifact(sdists[0]), wheels)


def _build_number(package: DistributionPackage) -> int:
    parts = package.filename.removesuffix(".whl").split("-")
    match = re.match(r"\d+", parts[2]) if len(parts) == 6 else None
    return int(match[0]) if match else 0


def _artifact(package: DistributionPackage) -> Artifact:
    sha256 = package.digests.get("sha256", "")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256) or package.size is None:
        raise StackError(f"the package index gives no size or no SHA-256 for {package.filename}")
    return Artifact(package.filename, package.size, sha256)
