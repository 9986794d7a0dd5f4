"""Where the parts of a checkout of this project lie. Tests point it at a small one of their own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stack.pin import ROOT, Pin, load_pin


@dataclass(frozen=True)
class Checkout:
    """A checkout of this project: ``root`` holds ``upstream.toml``, ``patches/`` and ``vllm/``."""

    root: Path = ROOT

    @property
    def pin_file(self) -> Path:
        """``upstream.toml``."""
        return self.root / "upstream.toml"

    @cached_property
    def pin(self) -> Pin:
        """The pin as it was when first asked for."""
        return load_pin(self.pin_file)

    @property
    def patches(self) -> Path:
        """The folder of the series and its patches."""
        return self.root / "patches"

    @property
    def submodule(self) -> Path:
        """Upstream's submodule: checked out, or an empty folder."""
        return self.root / "vllm"

    @property
    def shared_files(self) -> Path:
        """The list of files that the submodule and the sdist share, for the pinned release."""
        return self.root / "stack" / "shared-files" / f"{self.pin.version}.txt"

    @property
    def work_tree(self) -> Path:
        """Where ``import`` puts the patched release unless told otherwise."""
        return self.root / ".build" / "vllm"
