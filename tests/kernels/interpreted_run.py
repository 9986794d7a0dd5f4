"""Runs the checks of ``interpreted/`` in a process of its own, where Triton interprets kernels."""

from __future__ import annotations

from pathlib import Path

from child_checks import run_checks

HERE = Path(__file__).resolve().parent


def run_interpreted(name: str, at_least: int) -> None:
    """Fail unless ``interpreted/NAME`` passes, with no fewer checks than ``at_least``."""
    run_checks(HERE / "interpreted" / name, at_least, TRITON_INTERPRET="1")
