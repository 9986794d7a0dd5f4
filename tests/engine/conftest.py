"""The scripts of this folder import each other by name, as they do from the command line."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    """What is too long for every run, or needs what not every machine has."""
    parser.addoption("--long", action="store_true", help="also what takes ten minutes and more")
    parser.addoption(
        "--sources",
        type=Path,
        metavar="FOLDER",
        help="--sources=FOLDER, vLLM's (.build/vllm, which `python -m stack import` makes): hold"
        " the stand-ins of the emulated engine against its CUDA kernels",
    )
