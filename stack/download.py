"""Releases of vLLM from the package index, into a cache, checked by digest.

A file is in the cache under its own name only once its size and SHA-256 are right, and both are
checked again at each use. What a broken run leaves is a ``.part`` file, named after the digest that
it is to have: the next run goes on from there, or begins anew where the server cannot. A file put
into the cache by hand is used like a downloaded one. The cache is ``$SM12X_CACHE``, or
``~/.cache/vllm-sm12x``; nothing in it is needed once the wheel is made.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stack import index
from stack.errors import StackError
from stack.pin import Artifact, load_pin, tomllib

if TYPE_CHECKING:
    import requests

T = TypeVar("T")

CACHE_ENV = "SM12X_CACHE"
RELEASES_FILE = Path(__file__).with_name("releases.toml")

# Tries in a row that bring nothing, and the first pause between two (doubled each time), seconds.
ATTEMPTS = 5
PAUSE = 1.0
LONGEST_PAUSE = 60.0
CHUNK = 1 << 20
# Read from the network at a time: what a broken connection costs is less than this.
PIECE = 1 << 16
# Between two lines of progress where standard error is not a terminal, seconds.
LINE_EVERY = 10.0


class _TryAgain(Exception):
    """A failure that may pass: a dropped connection, a busy server. ``wait`` is in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _WrongFile(Exception):
    """The server's file is not the pinned one."""


def cache_dir() -> Path:
    """The folder of downloaded releases: ``$SM12X_CACHE``, or ``~/.cache/vllm-sm12x``."""
    told = os.environ.get(CACHE_ENV)
    return Path(told).expanduser().absolute() if told else Path.home() / ".cache" / "vllm-sm12x"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces, as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _mismatch(path: Path, artifact: Artifact) -> str | None:
    """How the file differs from the artifact, or ``None`` where it is the artifact."""
    size = path.stat().st_size
    if size != artifact.size:
        return f"expected {artifact.size} bytes, got {size}"
    got = sha256_of(path)
    return None if got == artifact.sha256 else f"expected sha256 {artifact.sha256}, got {got}"


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Turn what the operating system says of the cache folder into one line for people."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StackError(
                f"no space left in {folder}",
                f"free some space there, or set {CACHE_ENV} to a folder on another disk; "
                "the download goes on from where it stopped",
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StackError(
                f"{error.filename or folder} cannot be written: {error.strerror}",
                f"mend its permissions, or set {CACHE_ENV} to a folder of your own",
            ) from None
        if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise StackError(
                f"{error.filename or folder}: {error.strerror}",
                f"move it away, or set {CACHE_ENV} to a folder",
            ) from None
        raise StackError(
            f"{error.filename or folder}: {error.strerror or error}",
            f"mend that and run again ({CACHE_ENV} chooses the folder of downloads)",
        ) from None


@contextmanager
def _locked(folder: Path, filename: str) -> Iterator[None]:
    """Hold the lock of one file of the cache, so that two runs do not write into each other."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / f"{filename}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another run that downloads {filename}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, filename: str, size: int, done: int) -> None:
        self.filename, self.size, self.done = filename, size, done
        self.bar = None
        self.next_line = time.monotonic() + LINE_EVERY
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                desc=filename, total=size, initial=done, unit="B", unit_scale=True, file=sys.stderr
            )
        else:
            more = f", {done / 1e6:.1f} MB of it here already" if done else ""
            print(f"downloading {filename} ({size / 1e6:.1f} MB{more})", file=sys.stderr)

    def at(self, done: int) -> None:
        """``done`` bytes of the file are on disk."""
        if self.bar is not None:
            self.bar.update(done - self.done)
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + LINE_EVERY
            percent = 100 * done // self.size if self.size else 100
            print(f"downloading {self.filename}: {percent}%", file=sys.stderr)
        self.done = done

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _check_answer(response: requests.Response, artifact: Artifact, have: int) -> int:
    """The offset at which the body of ``response`` begins.

    Raises:
        StackError: An answer that a retry does not mend (404, 403).
        _TryAgain: A busy or failing server.
        _WrongFile: The server's file has another size, or its range is not the one asked for.
    """
    status = response.status_code
    if status in (408, 425, 429) or status >= 500:
        told = response.headers.get("Retry-After", "")
        raise _TryAgain(f"the server answered {status}", float(told) if told.isdigit() else 0.0)
    if status == 206:
        told = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", told)
        if not match or int(match[1]) != have or match[2] not in ("*", str(artifact.size)):
            raise _WrongFile(f"asked for bytes {have} and on of {artifact.size}, got {told!r}")
        return have
    if status == 416:
        raise _WrongFile(f"the server has no bytes after {have}, expected {artifact.size}")
    if status != 200:
        raise StackError(
            f"{artifact.filename}: the server answered {status} {response.reason or ''}".rstrip(),
            f"asked {index.without_credentials(response.url)}; try later, or another index "
            "through PIP_INDEX_URL",
        )
    length = response.headers.get("Content-Length", "")
    encoded = response.headers.get("Content-Encoding", "identity") != "identity"
    if length.isdigit() and not encoded and int(length) != artifact.size:
        raise _WrongFile(f"expected {artifact.size} bytes, the server offers {length}")
    return 0


def _receive(http: requests.Session, url: str, artifact: Artifact, part: Path) -> None:
    """Bring ``part`` to the size of the artifact, going on from what it holds.

    Raises:
        _TryAgain: The connection broke; what came is kept.
        _WrongFile: The server sends more than the artifact, or another file.
    """
    have = part.stat().st_size if part.exists() else 0
    if have > artifact.size:
        part.unlink()
        have = 0
    if have == artifact.size:
        return
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with http.get(url, headers=headers, stream=True, timeout=index.TIMEOUT) as response:
        offset = _check_answer(response, artifact, have)
        needed = artifact.size - offset
        with _disk(part.parent):
            if shutil.disk_usage(part.parent).free + (have - offset) < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        progress = _Progress(artifact.filename, artifact.size, offset)
        try:
            with _disk(part.parent), part.open("r+b" if offset else "wb") as file:
                file.seek(offset)
                for chunk in _chunks(response):
                    offset += len(chunk)
                    if offset > artifact.size:
                        raise _WrongFile(f"expected {artifact.size} bytes, the server sends more")
                    file.write(chunk)
                    progress.at(offset)
        finally:
            progress.close()
    if offset < artifact.size:
        raise _TryAgain(f"the connection ended at {offset} of {artifact.size} bytes")


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """The body, piece by piece.

    requests' errors are OSErrors: turned here, so that they do not pass for errors of the disk.
    """
    import requests

    try:
        yield from response.iter_content(PIECE)
    except requests.RequestException as error:
        raise _TryAgain(f"the connection broke ({type(error).__name__})") from None


def _persist(what: str, step: Callable[[], T], grown: Callable[[], bool] = lambda: False) -> T:
    """Call ``step`` until it returns, with growing pauses while its failures may pass.

    Args:
        what: What is wanted, for the messages.
        step: May raise ``_TryAgain`` or errors of requests.
        grown: Whether the failed call brought something nevertheless; the count begins anew then.

    Raises:
        StackError: ``step`` failed ``ATTEMPTS`` times in a row, or in a way that will not pass.
    """
    import requests

    failures = 0
    while True:
        try:
            return step()
        except _TryAgain as error:
            reason, wait = str(error), error.wait
        except requests.exceptions.SSLError as error:
            raise StackError(
                f"{what}: the server's certificate was not accepted: {_root(error)}",
                "set PIP_CERT or REQUESTS_CA_BUNDLE to your network's certificates, "
                "and check the clock",
            ) from None
        except requests.HTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status < 500 and status not in (408, 425, 429):
                raise StackError(
                    f"{what}: the package index answered {status}",
                    f"asked {index.without_credentials(index.index_url())}; "
                    "is PIP_INDEX_URL or pip's index-url right?",
                ) from None
            reason, wait = f"the package index answered {status}", 0.0
        except requests.RequestException as error:
            reason, wait = f"no connection ({_root(error)})", 0.0
        failures = 1 if grown() else failures + 1
        if failures >= ATTEMPTS:
            raise StackError(
                f"{what} could not be downloaded: {reason}",
                "check the network and run again: it goes on from where it stopped; or put the "
                f"file into {cache_dir()}",
            )
        wait = min(max(wait, PAUSE * 2 ** (failures - 1)), LONGEST_PAUSE)
        print(f"{what}: {reason}; again in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)


def _download(artifact: Artifact, project: str, part: Path) -> None:
    """Fill ``part``; on return it has the size of the artifact, its digest is not checked.

    Raises:
        StackError: The network, the index or the disk does not let us.
        _WrongFile: The server's file is not the pinned one.
    """
    size = 0

    def grown() -> bool:
        nonlocal size
        before, size = size, part.stat().st_size if part.exists() else 0
        return size > before

    grown()
    with index.session() as http:
        package = _persist(artifact.filename, lambda: index.find(project, artifact.filename, http))
        _persist(artifact.filename, lambda: _receive(http, package.url, artifact, part), grown)


def _root(error: BaseException) -> str:
    """The innermost reason of a requests error, in a few words."""
    while True:
        inner = getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((arg for arg in error.args if isinstance(arg, BaseException)), None)
        if inner is None:
            break
        error = inner
    text = getattr(error, "strerror", None) or str(error)
    # urllib3 puts its objects in front: "<...HTTPSConnection object at 0x...>: Failed to …".
    return re.sub(r"^.*object at 0x[0-9a-f]+>: |HTTPS?Connection\([^)]*\): ", "", text).strip()


def fetch(artifact: Artifact, *, project: str) -> Path:
    """A verified file in the cache, downloaded from the package index where it is not there yet.

    Args:
        artifact: Name, size in bytes and SHA-256 of the file.
        project: The project that the index lists it under (``vllm``).

    Returns:
        The path of the file in :func:`cache_dir`; its size and digest were checked in this call.

    Raises:
        StackError: The file cannot be downloaded, is not what the digest says, or cannot be kept
            (disk full, no permission). Nothing is left that a later run would take for it.
    """
    folder = cache_dir()
    path = folder / artifact.filename
    # The digest in the name keeps the parts of two releases of one name apart.
    part = folder / f"{artifact.filename}.{artifact.sha256[:16]}.part"
    with _disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file() and _mismatch(path, artifact) is None:
            return path
        with _locked(folder, artifact.filename):
            if path.is_file():
                wrong = _mismatch(path, artifact)
                if wrong is None:
                    return path
                print(f"removing {path}: {wrong}", file=sys.stderr)
                path.unlink()
            resumed = part.exists()
            try:
                _download(artifact, project, part)
                wrong = _mismatch(part, artifact)
            except _WrongFile as error:
                wrong = str(error)
            if wrong is not None and resumed:
                # The fault may lie in what an earlier run left.
                print(f"{artifact.filename}: {wrong}; beginning anew", file=sys.stderr)
                part.unlink(missing_ok=True)
                try:
                    _download(artifact, project, part)
                    wrong = _mismatch(part, artifact)
                except _WrongFile as error:
                    wrong = str(error)
            if wrong is not None:
                part.unlink(missing_ok=True)
                raise StackError(
                    f"{artifact.filename} is not the pinned file: {wrong}",
                    "nothing was kept; run again, and if it stays so, the index serves another "
                    "file than the one that was pinned: do not use it",
                )
            part.replace(path)
    return path


def releases(path: Path = RELEASES_FILE) -> dict[str, Artifact]:
    """The sdists whose digests this repository pins, by version."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return {version: Artifact(**entry) for version, entry in table.items()}


def fetch_sdist(version: str) -> Path:
    """The sdist of one release of vLLM, verified.

    Releases in ``stack/releases.toml`` are checked against the digest there; for others the digest
    is the index's own word, and standard error says so.

    Raises:
        StackError: As :func:`fetch`; or the index has no sdist of that version.
    """
    pin = load_pin()
    pinned = {**releases(), pin.version: pin.sdist}
    if version in pinned:
        return fetch(pinned[version], project=pin.project)
    return fetch(_index_sdist(pin.project, version), project=pin.project)


def _index_sdist(project: str, version: str) -> Artifact:
    with index.session() as http, _disk(cache_dir()):
        packages = _persist(f"{project} {version}", lambda: index.listed(project, http))
    sdists = {p.version: p for p in packages if p.package_type == "sdist" and p.version}
    if version not in sdists:
        raise StackError(
            f"the package index has no sdist of {project} {version}",
            f"it has {', '.join(sorted(sdists, key=_numbers)[-8:])}",
        )
    package = sdists[version]
    sha256 = package.digests.get("sha256", "")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256) or package.size is None:
        raise StackError(
            f"the package index gives no size or no SHA-256 for {package.filename}",
            "add the release to stack/releases.toml, or use another index through PIP_INDEX_URL",
        )
    print(
        f"{package.filename}: not pinned in stack/releases.toml; checked against the index's own "
        f"sha256 {sha256}",
        file=sys.stderr,
    )
    return Artifact(filename=package.filename, size=package.size, sha256=sha256)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
