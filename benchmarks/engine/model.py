"""The model that is measured: DeepSeek V4 Flash's full width, of a chosen depth, without weights.

The folder holds the configuration and a tokenizer; the weights are made on the GPU while the server
loads (``tests/engine/made_weights.py``), in the checkpoint's formats and sizes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.checkpoint.tokenizer import write_tokenizer
from tests.engine.flash_config import COMPRESS_RATIOS, flash_config

# The published model: two layers of the window alone, then C4A and C128A in turn.
PUBLISHED = (0, 0, *((4, 128) * 20), 4)
PUBLISHED_HASH_LAYERS = 3


def compress_ratios(layers: int) -> tuple[int, ...]:
    """The kinds of the layers: the published model's for 43, else one window layer and the rest.

    Raises:
        ValueError: Fewer than 5 layers, which would not hold every kind before kinds repeat, or
            more than the published model has.
    """
    least, most = len(COMPRESS_RATIOS), len(PUBLISHED)
    if not least <= layers <= most:
        raise ValueError(f"layers: {layers}, allowed: {least} to {most}")
    return PUBLISHED if layers == most else (0, *((4, 128) * most))[:layers]


def config(layers: int) -> dict[str, Any]:
    """``config.json`` of the model.

    Raises:
        ValueError: As :func:`compress_ratios`.
    """
    made = flash_config(compress_ratios(layers))
    if layers == len(PUBLISHED):
        made["num_hash_layers"] = PUBLISHED_HASH_LAYERS
    return made


def write_model(folder: Path, layers: int) -> int:
    """Write ``config.json`` and the tokenizer into a folder, and return the vocabulary's size."""
    made = config(layers)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(folder, made)
    return int(made["vocab_size"])
