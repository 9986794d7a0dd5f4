"""The token sequences that are scored, the same for every implementation."""

from __future__ import annotations

import random
from dataclasses import dataclass

# Where a kernel's path changes: one token; less than a compressed entry of C4A; the window of 128
# and the first entry of C128A; their second; 512 tokens; more than the 512 entries of C4A that the
# indexer selects (2,048 tokens); far beyond, with 23 entries of C128A.
PROMPT_LENGTHS = (1, 3, 115, 250, 505, 2040, 3000)
# Tokens fed one at a time after the prompt. The lengths above let these steps cross 128, 256, 512
# and 2,048 tokens.
FED_TOKENS = 24


@dataclass(frozen=True)
class Sequence:
    """Token ids, of which the first ``prompt`` are prefilled and the others fed one at a time."""

    tokens: tuple[int, ...]
    prompt: int


def draw_sequences(
    vocab_size: int, prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS, fed: int = FED_TOKENS
) -> list[Sequence]:
    """Random sequences without the ids 0 and 1, which begin and end a text.

    Raises:
        ValueError: There are no other ids, or a length is not positive.
    """
    if vocab_size < 3:
        raise ValueError(f"vocab_size: {vocab_size}, allowed: 3 and more")
    if not prompt_lengths or min(prompt_lengths) < 1 or fed < 0:
        raise ValueError(f"prompt_lengths: {prompt_lengths}, fed: {fed}, allowed: positive lengths")
    random_ids = random.Random(20261123)
    return [
        Sequence(tuple(random_ids.randrange(2, vocab_size) for _ in range(length + fed)), length)
        for length in prompt_lengths
    ]
