"""What a wheel says of itself: its name, METADATA, WHEEL, RECORD and ``vllm/_version.py``."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from collections.abc import Iterable, Mapping

from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

from stack.errors import StackError

GENERATOR = "vllm-sm12x-stack (1)"
LICENCE_PATH = "vllm_sm12x/LICENSE"
TOP_LEVEL = "vllm_sm12x"


def renamed(filename: str, version: str) -> str:
    """The file name of a wheel under another version, its tags kept.

    Raises:
        StackError: ``filename`` is not a wheel's.
    """
    try:
        parse_wheel_filename(filename)
    except InvalidWheelFilename as error:
        raise StackError(
            f"{filename} is not a wheel's name: {error}", "see upstream.toml"
        ) from None
    name, _, *rest = filename.removesuffix(".whl").split("-")
    # A build number orders wheels of one version; ours is another version.
    return "-".join([name, version, *rest[-3:]]) + ".whl"


def tags(filename: str) -> list[str]:
    """The tags that a wheel's file name stands for, one a Python, ABI and platform, sorted."""
    return sorted(str(tag) for tag in parse_wheel_filename(filename)[3])


def wheel_file(filename: str) -> bytes:
    """The WHEEL file that goes with a file name.

    Upstream's says ``linux_x86_64`` where its file name says ``manylinux_2_28_x86_64``: the name is
    what installers go by, hence what we repeat.
    """
    lines = ["Wheel-Version: 1.0", f"Generator: {GENERATOR}", "Root-Is-Purelib: false"]
    lines += [f"Tag: {tag}" for tag in tags(filename)]
    return ("\n".join(lines) + "\n").encode()


def metadata(upstream: bytes, *, old: str, new: str, note: str) -> bytes:
    """Upstream's METADATA under our version, with our licence file and a note that heads the text.

    Everything else is kept byte for byte: requirements, extras, the description.

    Args:
        upstream: The METADATA of upstream's wheel.
        old: The version that it must state.
        new: The version to state.
        note: One paragraph of Markdown, put before the description.

    Raises:
        StackError: The file is not the METADATA of ``vllm`` at version ``old``.
    """
    text = upstream.decode("utf-8")
    head, blank, body = text.partition("\n\n")
    lines = head.split("\n")
    for expected in (f"Version: {old}", "Name: vllm"):
        if lines.count(expected) != 1:
            raise StackError(
                f"METADATA of upstream's wheel does not say {expected!r}", "is it the pinned wheel?"
            )
    lines[lines.index(f"Version: {old}")] = f"Version: {new}"
    licences = [i for i, line in enumerate(lines) if line.startswith("License-File: ")]
    if not licences:
        raise StackError(
            "METADATA of upstream's wheel names no License-File", "is it the pinned wheel?"
        )
    lines.insert(licences[-1] + 1, f"License-File: {LICENCE_PATH}")
    return ("\n".join(lines) + "\n\n" + note + "\n" + (blank and "\n" + body)).encode("utf-8")


def version_file(upstream: bytes, *, old: str, new: str) -> bytes:
    """``vllm/_version.py`` under our version; the commit id in it stays upstream's.

    ``vllm.__version__`` reads it, and so do the key of torch.compile's cache, the usage report and
    the handshake of the NIXL connector. The tuple gets the local part as a string, as
    setuptools-scm writes it (``vllm/collect_env.py`` looks at its last item).

    Raises:
        StackError: The file does not assign version ``old`` as setuptools-scm writes it.
    """
    text = upstream.decode("utf-8")
    for assigned, value in (
        ("__version__ = version", lambda v: repr(v)),
        ("__version_tuple__ = version_tuple", lambda v: repr(version_tuple(v))),
    ):
        before, after = f"{assigned} = {value(old)}\n", f"{assigned} = {value(new)}\n"
        if text.count(before) != 1:
            raise StackError(
                f"vllm/_version.py of upstream's wheel has no line {before.strip()!r}",
                "upstream writes its version otherwise now: mend stack/wheel_metadata.py",
            )
        text = text.replace(before, after)
    return text.encode("utf-8")


def version_tuple(version: str) -> tuple[int | str, ...]:
    """``0.22.1+sm12x.1`` as ``(0, 22, 1, 'sm12x.1')``."""
    parsed = Version(version)
    return (*parsed.release, parsed.local) if parsed.local else parsed.release


def top_level(upstream: bytes) -> bytes:
    """``top_level.txt`` with our package added."""
    names = sorted({*upstream.decode().split(), TOP_LEVEL})
    return ("\n".join(names) + "\n").encode()


def record_hash(data: bytes) -> str:
    """A digest as RECORD writes it: URL-safe base64 without padding."""
    return encode_hash(hashlib.sha256(data).digest())


def encode_hash(digest: bytes) -> str:
    """A SHA-256 (32 bytes) as RECORD writes it."""
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def read_record(data: bytes) -> dict[str, tuple[str, str]]:
    """RECORD as path: (hash, size), both as written.

    Raises:
        StackError: A line has not three fields, or a path comes twice.
    """
    rows: dict[str, tuple[str, str]] = {}
    for row in csv.reader(io.StringIO(data.decode("utf-8"))):
        if len(row) != 3 or row[0] in rows:
            raise StackError(f"RECORD has a line that is not one file's: {row}", "damaged wheel?")
        rows[row[0]] = (row[1], row[2])
    return rows


def write_record(rows: Mapping[str, tuple[str, str]], path: str) -> bytes:
    """RECORD in the order of ``rows``, its own line (``path``) last and without a digest."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows((name, *row) for name, row in rows.items())
    writer.writerow((path, "", ""))
    return out.getvalue().encode("utf-8")


def dist_info(names: Iterable[str]) -> str:
    """The one ``.dist-info`` folder among a wheel's members.

    Raises:
        StackError: There is none, or more than one.
    """
    found = {m[1] for name in names if (m := re.match(r"([^/]+\.dist-info)/", name))}
    if len(found) != 1:
        raise StackError(
            f"a wheel has one .dist-info folder, found {sorted(found)}", "damaged wheel?"
        )
    return found.pop()
