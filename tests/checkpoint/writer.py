"""Write a checkpoint: shards and their index, configuration and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.checkpoint.layout import Weight, weights
from tests.checkpoint.tokenizer import write_tokenizer
from tests.checkpoint.values import make

INDEX = "model.safetensors.index.json"
# A shard is closed before it grows beyond this; a larger weight has a shard of its own.
SHARD_BYTES = 4 << 30


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    device: torch.device | str = "cpu",
) -> int:
    """Write a checkpoint into ``folder``, which is made where it does not exist.

    Args:
        config: ``config.json``, as :func:`tests.checkpoint.sizes.config_of` gives it.
        shard_bytes: Most bytes of tensors in a file.
        device: Where values are drawn and quantised. CPU and CUDA draw other numbers.

    Returns:
        The bytes of all tensors.

    Raises:
        FileExistsError: ``folder`` holds something already.
        ValueError: ``shard_bytes`` is not positive.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes: {shard_bytes}, allowed: 1 and more")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a new folder for the checkpoint")
    shards = plan(weights(config), shard_bytes)
    place: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for weight in shard:
            made = make(weight, config["n_routed_experts"], seed, device)
            tensors |= {name: tensor.cpu().contiguous() for name, tensor in made.items()}
            total += weight.nbytes
        save_file(tensors, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(tensors, file)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": place})
    _write_json(folder / "config.json", dict(config))
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]},
    )
    write_tokenizer(folder, config)
    return total


def plan(found: list[Weight], shard_bytes: int) -> list[list[Weight]]:
    """Cut the weights into shards, in their order; a weight and its scales stay together."""
    shards: list[list[Weight]] = []
    size = 0
    for weight in found:
        if not shards or size + weight.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += weight.nbytes
    return shards


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
