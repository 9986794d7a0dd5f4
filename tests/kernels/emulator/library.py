"""Kernels of a compiled library: the PTX that it carries for GPUs newer than its machine code.

On such a GPU the driver compiles that PTX, so that it is what runs there.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path

from triton import knobs

from emulator.machine import Program
from emulator.parse import parse

_NAME = re.compile(r"\.entry\s+(\w+)")


class Library:
    """The PTX in a library.

    Args:
        path: Of the library (``.so``).

    Raises:
        FileNotFoundError: There is none.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"path: no library {path}")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [knobs.nvidia.cuobjdump.path, "-xptx", "all", path.absolute()],
                cwd=folder,
                check=True,
                capture_output=True,
                timeout=120,
            )
            self._texts = [text.read_text(encoding="utf-8") for text in Path(folder).iterdir()]

    @functools.cached_property
    def names(self) -> dict[str, int]:
        """Entries by their symbol, with the text that has each."""
        return {name: i for i, text in enumerate(self._texts) for name in _NAME.findall(text)}

    @functools.cache  # noqa: B019 - as long as the library.
    def program(self, symbol: str, threads: int) -> Program:
        """The entry whose symbol contains ``symbol``, for blocks of so many threads.

        Raises:
            LookupError: None has it, or several have.
            PtxError: It has an instruction that is not known here.
        """
        found = [name for name in self.names if symbol in name]
        if len(found) != 1:
            raise LookupError(f"symbol: {len(found)} entries contain {symbol}, allowed: one")
        return Program(parse(self._texts[self.names[found[0]]], found[0], threads))
