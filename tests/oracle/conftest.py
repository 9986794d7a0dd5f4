"""A tiny checkpoint, and short sequences over it."""

from pathlib import Path

import pytest

from tests.checkpoint.sizes import config_of
from tests.checkpoint.writer import write_checkpoint
from tests.oracle.sequences import Sequence, draw_sequences


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_checkpoint(folder, config_of("tiny"))
    return folder


@pytest.fixture(scope="session")
def sequences() -> list[Sequence]:
    # Beyond the window of 128, two entries of C128A, and twice the tiny indexer's 32 entries.
    return draw_sequences(config_of("tiny")["vocab_size"], (1, 3, 126, 270), 4)
