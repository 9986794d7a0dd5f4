"""A release of vLLM as one commit: from the submodule where it is checked out, else from the sdist.

The commit has no parent, a fixed author and date, and the files of ``stack.shared`` (the pinned
release) or of ``stack.sdist``'s rules (any other). Its id is therefore the same on every machine
and from both sources. It is kept in a bare repository in the download cache, made in a folder of
its own and moved into place: an interrupted run leaves nothing that a later one takes for whole.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stack import sdist as sdists
from stack import shared
from stack.checkout import Checkout
from stack.errors import StackError
from stack.git import EMAIL, EPOCH, NAME, git
from stack.scratch import scratch
from stack.sdist import File

# Part of the cache's key: raise it when the commit or the rules change.
FORMAT = 1
RELEASE_REF = "refs/heads/release"


@dataclass(frozen=True)
class Source:
    """Where the pinned release comes from: ``kind`` is ``submodule`` or ``sdist``."""

    kind: str
    where: Path


def submodule_head(checkout: Checkout) -> str | None:
    """The commit that ``vllm/`` is at, or ``None`` where the submodule is not checked out.

    Raises:
        StackError: ``vllm/`` has files but is no git repository, or has no commit yet.
    """
    folder = checkout.submodule
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    done = git("rev-parse", "--verify", "-q", "HEAD^{commit}", cwd=folder, check=False)
    if done.returncode:
        raise StackError(
            f"{folder} is not empty, and is no checked-out submodule: {done.last_error}",
            f"move its files away, or run `git submodule update --init --force {folder.name}`",
        )
    return done.text


def find(checkout: Checkout) -> Source:
    """Choose the source of the pinned release, without fetching anything.

    Only the commit's objects are read, never the submodule's files: edits there change nothing.

    Raises:
        StackError: The submodule is checked out at another commit.
    """
    head = submodule_head(checkout)
    if head is None:
        return Source("sdist", Path(checkout.pin.sdist.filename))
    if head != checkout.pin.commit:
        raise StackError(
            f"{checkout.submodule} is at {head}, but upstream.toml pins {checkout.pin.commit}",
            f"run `git submodule update --init --force {checkout.submodule.name}`",
        )
    return Source("submodule", checkout.submodule)


def pinned_sdist(checkout: Checkout) -> Path:
    """The pinned sdist, from the cache or the package index, its digest checked."""
    from stack import download

    return download.fetch(checkout.pin.sdist, project=checkout.pin.project)


def submodule_files(checkout: Checkout) -> dict[str, File]:
    """Every tracked file of the pinned commit in the submodule: mode (links too) and blob id."""
    listing = git("ls-tree", "-r", "-z", checkout.pin.commit, cwd=checkout.submodule)
    files = {}
    for line in listing.fields:
        meta, _, path = line.partition("\t")
        mode, _kind, object_id = meta.split(" ")
        files[path] = File(mode, object_id)
    return files


def differences(listed: Mapping[str, File], found: Mapping[str, File], where: str) -> list[str]:
    """One line for each listed file that ``found`` lacks or has with another mode or blob."""
    lines = []
    for path, file in listed.items():
        other = found.get(path)
        if other is None:
            lines.append(f"{path}: not in the {where}")
        elif other != file:
            lines.append(
                f"{path}: listed as {file.mode} {file.blob}, "
                f"the {where} has {other.mode} {other.blob}"
            )
    return lines


def base_commit(repo: Path, checkout: Checkout | None = None, *, borrow: bool = False) -> str:
    """Put the pinned release into a repository as one commit, and return the commit's id.

    Args:
        repo: An existing repository, bare or not. No ref of it is changed.
        checkout: Whose pin, submodule and list of shared files; this checkout without it.
        borrow: Refer to the cache's objects instead of copying them: for a repository that does not
            outlive the command.

    Raises:
        StackError: The submodule is at another commit, the sdist cannot be had, or a listed file
            differs in the source; the message names the first such file.
    """
    checkout = checkout or Checkout()
    pin = checkout.pin
    listed = shared.load(checkout.shared_files)
    source = find(checkout)
    if source.kind == "submodule":
        key = f"{pin.version}-commit-{pin.commit[:16]}"
    else:
        key = f"{pin.version}-sdist-{pin.sdist.sha256[:16]}"
    list_digest = hashlib.sha256(checkout.shared_files.read_bytes()).hexdigest()
    with _cached(f"{key}-{list_digest[:16]}") as (bare, fresh):
        if fresh:
            if source.kind == "submodule":
                _reject(differences(listed.files, submodule_files(checkout), "submodule"), checkout)
                _copy_blobs(checkout.submodule, bare, listed.files)
            else:
                archive = pinned_sdist(checkout)
                found = sdists.contents(archive)
                _reject(differences(listed.files, found.files, "sdist"), checkout)
                _store_blobs(archive, bare, listed.files)
            _commit(bare, listed.files, pin.version)
        return _bring(bare, repo, borrow and not fresh)


def release_commit(repo: Path, version: str, *, sdist: Path | None = None) -> str:
    """Put any release's sdist into a repository as one commit, and return the commit's id.

    Args:
        repo: An existing repository, bare or not. No ref of it is changed.
        version: The release, such as ``0.23.0``; named in the commit's subject.
        sdist: The archive; without it, ``stack.download.fetch_sdist`` brings it.

    For the pinned version this is the commit that ``base_commit`` makes.
    """
    if sdist is None:
        from stack import download

        sdist = download.fetch_sdist(version)
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    with _cached(f"{version}-sdist-{digest[:16]}-rules") as (bare, fresh):
        if fresh:
            files = sdists.contents(sdist).files
            _store_blobs(sdist, bare, files)
            _commit(bare, files, version)
        return _bring(bare, repo)


def tree_of(repo: Path, commit: str) -> str:
    """The id of a commit's tree."""
    return git("rev-parse", "--verify", f"{commit}^{{tree}}", cwd=repo).text


def _reject(lines: list[str], checkout: Checkout) -> None:
    if lines:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise StackError(
            f"{checkout.shared_files.name}: {lines[0]}{more}",
            "run `python -m stack sources --compare` for all of them",
        )


@contextmanager
def _cached(key: str) -> Iterator[tuple[Path, bool]]:
    """Yield a bare repository in the cache, and whether it is new: then the caller fills it."""
    from stack import download

    folder = download.cache_dir() / "trees"
    place = folder / f"{key}-v{FORMAT}.git"
    if place.is_dir():
        yield place, False
        return
    with scratch(folder, "part-") as part:
        bare = part / "release.git"
        bare.mkdir()
        git("init", "-q", "--bare", "--template=", cwd=bare)
        yield bare, True
        try:
            bare.rename(place)
        except OSError:
            # Another run was faster: its repository is as good.
            if not place.is_dir():
                raise


def _store_blobs(archive: Path, bare: Path, wanted: Mapping[str, File]) -> None:
    """Write the wanted files of an sdist into a repository, as one pack."""
    stream = b"".join(
        b"blob\ndata %d\n%b\n" % (len(data), data)
        for path, _mode, data in sdists.read(archive)
        if path in wanted
    )
    git(
        *("fast-import", "--quiet", "--done", "--force"),
        cwd=bare,
        input=stream + b"done\n",
        # The pack is read more often than it is sent, and once written it is not written again.
        config={"pack.compression": "1", "fastimport.unpackLimit": "0", "pack.depth": "0"},
    )


def _copy_blobs(source: Path, bare: Path, wanted: Mapping[str, File]) -> None:
    """Copy blobs from the submodule's object store, whether it is shallow or not."""
    names = "".join(f"{blob}\n" for blob in sorted({file.blob for file in wanted.values()}))
    pack = git("pack-objects", "--stdout", "-q", "--window=0", cwd=source, input=names)
    git("index-pack", "--stdin", cwd=bare, input=pack.stdout)


def _commit(bare: Path, files: Mapping[str, File], version: str) -> None:
    entries = "".join(f"{file.mode} {file.blob}\t{path}\0" for path, file in sorted(files.items()))
    with tempfile.TemporaryDirectory(prefix="sm12x-index-") as folder:
        env = {"GIT_INDEX_FILE": os.path.join(folder, "index")}
        git("update-index", "-z", "--index-info", cwd=bare, input=entries, env=env)
        # write-tree fails where a blob is missing.
        tree = git("write-tree", cwd=bare, env=env).text
    identity = {
        f"GIT_{role}_{what}": value
        for role in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", NAME), ("EMAIL", EMAIL), ("DATE", EPOCH))
    }
    message = f"vLLM {version}\n\nThe files that upstream's repository and the sdist share.\n"
    commit = git("commit-tree", tree, "-F", "-", cwd=bare, input=message, env=identity).text
    git("update-ref", RELEASE_REF, commit, cwd=bare)


def _bring(bare: Path, repo: Path, borrow: bool = False) -> str:
    found = git("rev-parse", "--verify", "-q", f"{RELEASE_REF}^{{tree}}", cwd=bare, check=False)
    if found.returncode:
        raise StackError(f"{bare} is damaged", f"delete {bare}: it is made again")
    commit = git("rev-parse", "--verify", RELEASE_REF, cwd=bare).text
    if borrow:
        alternates = git("rev-parse", "--git-path", "objects/info/alternates", cwd=repo).text
        with (repo / alternates).open("a", encoding="utf-8") as file:
            file.write(f"{bare / 'objects'}\n")
        return commit
    present = git("cat-file", "-e", f"{commit}^{{commit}}", cwd=repo, check=False)
    if present.returncode:
        git("fetch", "-q", "--no-tags", "--no-write-fetch-head", bare, RELEASE_REF, cwd=repo)
    return commit
