"""Score a checkpoint with ``transformers``."""

from __future__ import annotations

import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.checkpoint.digest import digest
from tests.oracle.model import log_probabilities
from tests.oracle.roundings import Rounded
from tests.oracle.scores import Scores, likeliest
from tests.oracle.sequences import Sequence
from tests.oracle.weights import Checkpoint


def score(
    folder: Path,
    sequences: list[Sequence],
    *,
    rounded: bool = False,
    fault: str | None = None,
    device: torch.device | str = "cpu",
) -> Scores:
    """Log-probabilities of a checkpoint in float32.

    Args:
        sequences: What to score.
        rounded: Round to the engine's formats (:mod:`tests.oracle.roundings`).
        fault: One of :data:`tests.oracle.faults.FAULTS`, to compute with it.

    Raises:
        RuntimeError: vLLM is imported in this process, which changes ``transformers``.
    """
    if "vllm" in sys.modules:
        raise RuntimeError("vLLM is imported here and changes transformers; run in a fresh process")
    began = time.perf_counter()
    checkpoint = Checkpoint(folder, fault=fault, device=device)
    vocab_size = checkpoint.config.vocab_size
    arithmetic = Rounded() if rounded else None
    kept = [
        likeliest(one.numpy())
        for one in log_probabilities(checkpoint, sequences, arithmetic, device=device)
    ]
    return Scores(
        checkpoint=digest(folder),
        sequences=sequences,
        tokens=np.concatenate([tokens for tokens, _ in kept]),
        logprobs=np.concatenate([logprobs for _, logprobs in kept]),
        vocab_size=vocab_size,
        facts={
            "implementation": "transformers",
            "arithmetic": "rounded to the engine's formats" if rounded else "float32",
            "fault": fault,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": str(device),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - began, 1),
        },
    )
