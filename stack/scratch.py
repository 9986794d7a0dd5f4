"""Folders for work that is thrown away, or moved into place once it is whole."""

from __future__ import annotations

import glob
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stack.errors import StackError

# A folder this old (seconds) belongs to a run that was killed.
STALE = 24 * 3600


@contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder below ``parent`` that is removed at the end, and with it what killed runs left.

    Raises:
        StackError: For any ``OSError`` of the body too: the disk is full, a folder is read-only.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for old in parent.glob(f"{glob.escape(prefix)}*"):
            # Another run may remove its folder just now.
            with suppress(FileNotFoundError):
                if time.time() - old.stat().st_mtime > STALE:
                    shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            prefix=prefix, dir=parent, ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder)
    except OSError as error:
        raise StackError(
            f"{error.filename or parent}: {error.strerror or error}",
            "nothing was changed; see to the space and the permissions there, and run again",
        ) from None
