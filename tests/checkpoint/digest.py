"""One digest of a checkpoint's weights and configuration, to tell whether two runs had the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.checkpoint.writer import INDEX


def digest(folder: Path) -> str:
    """SHA-256, in hex, over ``config.json`` and every shard that the index names.

    Raises:
        FileNotFoundError: The configuration, the index or a shard is missing.
    """
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    total = hashlib.sha256()
    for name in ["config.json", *sorted(set(index["weight_map"].values()))]:
        part = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                part.update(block)
        total.update(f"{name} {part.hexdigest()}\n".encode())
    return total.hexdigest()
