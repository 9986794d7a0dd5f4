"""``python -m tests.oracle.layers FOLDER STREAMS.npz --out LAYERS.npz``: each part of each layer.

The attention and the experts of a layer are computed from the streams that an engine gave them, so
that the rounding of this part alone lies between the engine's result and the oracle's. A whole
model's noise would hide small faults.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4DecoderLayer

from tests.oracle.faults import FAULTS
from tests.oracle.model import Arithmetic, Exact, log_probabilities
from tests.oracle.roundings import Rounded
from tests.oracle.sequences import Sequence
from tests.oracle.weights import Checkpoint


class _Given:
    """Gives each part of each layer the recorded streams, and keeps what it makes of them."""

    def __init__(self, streams: np.ndarray, arithmetic: Arithmetic) -> None:
        self._streams = torch.from_numpy(streams)
        self._arithmetic = arithmetic
        self.after: list[torch.Tensor] = []
        self.places: list[torch.Tensor] = []

    def layer(
        self, layer: DeepseekV4DecoderLayer, streams: torch.Tensor, **inputs: Any
    ) -> torch.Tensor:
        def place(module: Any, given: Any, mixing: tuple[torch.Tensor, ...]) -> None:
            self.places.append(mixing[0][0])

        def replace(module: Any, given: tuple[torch.Tensor]) -> None:
            self.after.append(given[0][0].clone())
            # In place, as the layer also mixes these streams into its result.
            given[0][0] = self._streams[len(self.after)]

        handles = [
            layer.attn_hc.register_forward_hook(place),
            layer.ffn_hc.register_forward_hook(place),
            layer.ffn_hc.register_forward_pre_hook(replace),
        ]
        given = self._streams[len(self.after)].unsqueeze(0)
        self.after.append(self._arithmetic.layer(layer, given, **inputs)[0])
        for handle in handles:
            handle.remove()
        return streams

    def logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return self._arithmetic.logits(hidden, head)


def parts(
    folder: Path,
    sequence: Sequence,
    streams: np.ndarray,
    arithmetic: Arithmetic | None = None,
    fault: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What each part of each layer makes of the streams that it was given.

    Args:
        streams: float32 ``[2 * L + 1, T, hc_mult, hidden]``, of an engine: before the attention and
            before the experts of each of L layers, and after the last.
        arithmetic: :class:`Exact` where it is ``None``.
        fault: One of :data:`tests.oracle.faults.FAULTS`, to compute with it.

    Returns:
        The streams after each part, float32 ``[2 * L, T, hc_mult, hidden]``, and the factors with
        which it places its output in the streams, float32 ``[2 * L, T, hc_mult]``.
    """
    given = _Given(streams, arithmetic or Exact())
    list(log_probabilities(Checkpoint(folder, fault=fault), [sequence], given))
    return torch.stack(given.after).numpy(), torch.stack(given.places).numpy()


def main(argv: list[str] | None = None) -> int:
    """Compute an engine's layers exactly, with its roundings, and exactly with each fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracle.layers")
    parser.add_argument("folder", type=Path, help="a checkpoint")
    parser.add_argument("streams", type=Path, help="from `python -m tests.engine.emulated.layers`")
    parser.add_argument("--out", type=Path, required=True, help="the streams after each, as .npz")
    args = parser.parse_args(argv)
    with np.load(args.streams, allow_pickle=False) as stored:
        sequence = Sequence(tuple(stored["tokens"].tolist()), int(stored["prompt"]))
        streams = stored["streams"]
    exact, places = parts(args.folder, sequence, streams)
    rounded, _ = parts(args.folder, sequence, streams, Rounded())
    results = {"exact": exact, "places": places, "rounded": rounded}
    for fault in FAULTS:
        results[fault], _ = parts(args.folder, sequence, streams, fault=fault)
    with args.out.open("wb") as file:
        np.savez(file, **results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
