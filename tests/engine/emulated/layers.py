"""``python -m tests.engine.emulated.layers FOLDER …``: the streams between the layers.

One request is alone in the engine, which reads its prompt in chunks and is fed its other tokens one
at a time. From what the engine gave a layer, another implementation can compute this layer alone:
see :mod:`tests.oracle.layers`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tests.engine.emulated.engine import SCORING, emulated_engine, print_launches

if TYPE_CHECKING:
    from vllm.models.deepseek_v4.nvidia.model import DeepseekV4Model

# No multiple of the 4 tokens of a compressed entry: a chunk ends within one.
CHUNK = 90


class Recorder:
    """Takes the streams before each part of each layer: its attention, then its experts.

    A part only leaves what is to be mixed into the streams. The first operation of the next part
    mixes, and gives the streams among its results; after the last layer the model itself mixes.
    """

    def __init__(self, model: DeepseekV4Model) -> None:
        self._steps: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        self._parts = 2 * len(model.layers)
        model.layers[0].register_forward_pre_hook(self._begin)
        for layer in model.layers:
            layer.mhc_fused_post_pre.register_forward_hook(lambda m, i, given: self._add(given[0]))
            layer.mhc_post.register_forward_hook(lambda m, i, streams: self._add(streams))

    def _begin(self, layer: Any, given: tuple[Any, ...]) -> None:
        streams, positions = given[:2]
        self._steps.append((positions.clone(), []))
        self._add(streams)

    def _add(self, streams: torch.Tensor) -> None:
        self._steps[-1][1].append(streams.float().clone())

    def streams(self, tokens: int) -> np.ndarray:
        """float32 ``[2 * L + 1, tokens, hc_mult, hidden]``: before each part, and after the last.

        Raises:
            ValueError: The engine computed other positions than each of ``tokens`` once, in order,
                or the hooks saw other parts than two a layer.
        """
        positions = [one for step, _ in self._steps for one in step.tolist()]
        if positions != list(range(tokens)):
            raise ValueError(f"positions: {positions}, allowed: 0 to {tokens - 1} in order")
        seen = {len(parts) for _, parts in self._steps}
        if seen != {self._parts + 1}:
            raise ValueError(f"streams seen in a step: {seen}, allowed: {self._parts + 1}")
        return torch.cat([torch.stack(parts) for _, parts in self._steps], dim=1).numpy()


def main(argv: list[str] | None = None) -> int:
    """Record the layers of one sequence."""
    parser = argparse.ArgumentParser(prog="python -m tests.engine.emulated.layers")
    parser.add_argument("folder", type=Path, help="a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the streams, as .npz")
    parser.add_argument("--prompt", type=int, default=270, help="its tokens (default: 270)")
    parser.add_argument("--fed", type=int, default=4, help="tokens fed one at a time (default: 4)")
    parser.add_argument("--kernels", choices=("all", "none"), default="none")
    args = parser.parse_args(argv)
    config = json.loads((args.folder / "config.json").read_text(encoding="utf-8"))
    from score_checkpoint import score
    from tests.oracle.sequences import draw_sequences

    (sequence,) = draw_sequences(config["vocab_size"], (args.prompt,), args.fed)
    with emulated_engine(
        args.kernels,
        model=str(args.folder),
        max_model_len=len(sequence.tokens) + 2,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=1,
        **SCORING,
    ) as (llm, driver):
        (recorder,) = llm.apply_model(lambda model: Recorder(model.model))
        score(llm, [sequence], 1)
        streams = recorder.streams(len(sequence.tokens))
    with args.out.open("wb") as file:
        np.savez(file, tokens=sequence.tokens, prompt=sequence.prompt, streams=streams)
    print_launches(driver)
    return 0


if __name__ == "__main__":
    sys.exit(main())
