"""A checkpoint's tensors for ``transformers``: dequantised by its own code, one layer at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import DeepseekV4Config, DeepseekV4Model
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from tests.oracle.faults import FAULTS, Fault

# Tensors of the model that belong to no layer; the head is not part of `DeepseekV4Model`.
_OUTSIDE = ("embed.weight", "norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale")


class Checkpoint:
    """A folder with ``config.json``, an index and shards.

    Args:
        fault: One of :data:`tests.oracle.faults.FAULTS`, to compute with it.
        device: Where weights are dequantised. The results lie on the CPU.

    Raises:
        ValueError: There is no such fault.
    """

    def __init__(
        self, folder: Path, fault: str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        if fault is not None and fault not in FAULTS:
            raise ValueError(f"fault: {fault!r}, allowed: {', '.join(FAULTS)}")
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        self._folder = folder
        self._place: dict[str, str] = index["weight_map"]
        self._device = device
        self._dequantize = Fp8Dequantize(None)
        self._fault = FAULTS[fault] if fault is not None else Fault("none")
        self._json = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # Weights are dequantised here: the model is an ordinary one.
        self._json.pop("quantization_config")
        self._json |= self._fault.fields(self._json)
        self.config = DeepseekV4Config(**self._json)

    def layer(self, number: int) -> DeepseekV4Model:
        """A model of this one layer, with the whole model's embedding, norm and final mix.

        Raises:
            ValueError: A tensor is missing or unknown to ``transformers``.
        """
        prefix = f"layers.{number}."
        names = [*_OUTSIDE, *(name for name in self._place if name.startswith(prefix))]
        state = {
            name.replace(prefix, "layers.0.", 1): value for name, value in self._dequantized(names)
        }
        ratio = self._json["compress_ratios"][number]
        hashed = number < self._json["num_hash_layers"]
        config = DeepseekV4Config(
            **self._json
            | {
                "num_hidden_layers": 1,
                "compress_ratios": [ratio],
                "num_hash_layers": int(hashed),
            }
        )
        model, found = DeepseekV4Model.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if found[problem]:
                raise ValueError(f"{self._folder}: {problem} {sorted(found[problem])[:5]}")
        self._fault.change(model.layers[0])
        return model.eval()

    def head(self) -> torch.Tensor:
        """The output projection, float32 ``[V, hidden]``."""
        return dict(self._dequantized(["head.weight"]))["head.weight"].float()

    def _dequantized(self, names: Iterable[str]) -> Iterable[tuple[str, Any]]:
        wanted = [name for name in names if not name.endswith(".scale")]
        missing = [name for name in wanted if name not in self._place]
        if missing:
            raise ValueError(f"{self._folder}: {missing[0]} is missing")
        for name in wanted:
            value = self._read(name)
            scale = name.removesuffix(".weight") + ".scale"
            if name.endswith(".weight") and scale in self._place:
                # To bfloat16, which holds e4m3 and e2m1 times a power of two exactly.
                pair = {"weight$": value, "weight_scale_inv": self._read(scale)}
                value = self._dequantize.convert(pair)["weight"]
            yield name, value.cpu()

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self._folder / self._place[name], "pt") as shard:
            return shard.get_tensor(name).to(self._device)
