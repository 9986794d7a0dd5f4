"""The stored form of a run: the likeliest next tokens at every position of every sequence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracle.sequences import Sequence

# Where a vocabulary is larger than this, only so many log-probabilities are kept at a position.
MOST_KEPT = 1024


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the next token, after each token of each sequence.

    Attributes:
        checkpoint: Digest of the checkpoint (:func:`tests.checkpoint.digest.digest`).
        sequences: What was scored.
        tokens: int32 ``[P, K]``: the K likeliest token ids, in any order, at P positions: those of
            the first sequence, then of the second, and so on.
        logprobs: float32 ``[P, K]``: theirs, natural logarithms.
        vocab_size: Token ids that the probabilities are over. Where it is K, all are kept.
        facts: What made the run: implementation, versions, machine, options.
    """

    checkpoint: str
    sequences: list[Sequence]
    tokens: np.ndarray
    logprobs: np.ndarray
    vocab_size: int
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        positions = sum(len(sequence.tokens) for sequence in self.sequences)
        for name, array in (("tokens", self.tokens), ("logprobs", self.logprobs)):
            if array.ndim != 2 or array.shape[0] != positions or array.shape != self.tokens.shape:
                raise ValueError(f"{name}: shape {array.shape}, allowed: ({positions}, K) for both")
        if not 0 < self.tokens.shape[1] <= self.vocab_size:
            raise ValueError(f"tokens: {self.tokens.shape[1]} kept of {self.vocab_size}")
        if not np.isfinite(self.logprobs).all():
            bad = int(np.argwhere(~np.isfinite(self.logprobs).all(1))[0, 0])
            raise ValueError(f"logprobs: not finite at position {bad}, allowed: finite values")
        if self.tokens.min() < 0 or self.tokens.max() >= self.vocab_size:
            raise ValueError(f"tokens: an id outside 0 to {self.vocab_size - 1}")
        ordered = np.sort(self.tokens, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError("tokens: an id twice at one position")

    def save(self, path: Path) -> None:
        """Write one compressed ``.npz``, without pickles."""
        about = {
            "checkpoint": self.checkpoint,
            "vocab_size": self.vocab_size,
            "facts": dict(self.facts),
            "sequences": [{"tokens": s.tokens, "prompt": s.prompt} for s in self.sequences],
        }
        with path.open("wb") as file:
            np.savez_compressed(
                file, tokens=self.tokens, logprobs=self.logprobs, about=np.array(json.dumps(about))
            )

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no stored run, or holds values that cannot be.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                tokens, logprobs = stored["tokens"], stored["logprobs"]
                about = json.loads(str(stored["about"]))
            sequences = [Sequence(tuple(s["tokens"]), s["prompt"]) for s in about["sequences"]]
            return cls(
                checkpoint=about["checkpoint"],
                sequences=sequences,
                tokens=tokens,
                logprobs=logprobs,
                vocab_size=about["vocab_size"],
                facts=about["facts"],
            )
        except (KeyError, EOFError) as error:
            raise ValueError(f"{path}: no stored run ({error})") from error


def likeliest(logprobs: np.ndarray, most: int = MOST_KEPT) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and log-probabilities to keep of ``[P, V]``: all where V is at most ``most``.

    Returns:
        int32 and float32 arrays ``[P, K]``: all by their id, or the likeliest first.
    """
    if logprobs.shape[1] <= most:
        every = np.broadcast_to(np.arange(logprobs.shape[1], dtype=np.int32), logprobs.shape)
        return every.copy(), logprobs.astype(np.float32)
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, :most]
    kept = np.take_along_axis(logprobs, order, axis=1)
    return order.astype(np.int32), kept.astype(np.float32)
