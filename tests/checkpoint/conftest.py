"""A tiny checkpoint, made once."""

from pathlib import Path

import pytest

from tests.checkpoint.sizes import config_of
from tests.checkpoint.writer import write_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    # In several files, as published checkpoints are.
    write_checkpoint(folder, config_of("tiny"), shard_bytes=4 << 20)
    return folder
