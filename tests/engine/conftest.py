"""The scripts of this folder import each other by name, as they do from the command line."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--long``: also what takes too long for every run."""
    parser.addoption("--long", action="store_true", help="also what takes ten minutes and more")
