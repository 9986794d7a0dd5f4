"""Make a prompt as long as a gate asks, counted by the server's own tokenizer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gates.prompts.document import Document
from stack.errors import StackError

# What a length may be off, and what is taken where nothing counts tokens.
TOLERANCE = 0.002
SLACK_TOKENS = 4
CHARACTERS_A_TOKEN = 4.0
TRIES = 8

Count = Callable[[str], Awaitable[int | None]]


@dataclass(frozen=True)
class Fitted:
    """A prompt, and its length by the tokenizer; ``tokens`` is None where nothing counted it.

    ``characters`` is the length of its body, a good start for the next one like it.
    """

    text: str
    tokens: int | None
    characters: int


async def fit(
    document: Document, tokens: int, count: Count, characters: int | None = None
) -> Fitted:
    """The document in a length of ``tokens``, off by two thousandths or four tokens at most.

    Args:
        document: What to lengthen.
        tokens: The length wanted, chat template included.
        count: Gives a prompt's tokens, or None where the server cannot count. Then the length is
            taken from the usual characters a token, and the answer's ``usage`` says what it was.
        characters: Where to begin: the length of a like document that fitted.

    Raises:
        StackError: The document cannot be had in that length: what stands in every length of it
            is longer, or no number of whole words comes near enough.
    """
    if characters is None:
        characters = max(0, round(tokens * CHARACTERS_A_TOKEN) - len(document.text(0)))
    allowed = max(SLACK_TOKENS, round(tokens * TOLERANCE))
    seen: list[tuple[int, int]] = []  # (characters, tokens), ascending
    for _ in range(TRIES):
        text = document.text(characters)
        got = await count(text)
        if got is None or abs(got - tokens) <= allowed:
            return Fitted(text, got, characters)
        if not characters and got > tokens:
            raise StackError(
                f"no prompt of {tokens} tokens: what stands in every length of it has {got} with "
                f"this tokenizer; ask for {got} or more in the gate's file (prompt_tokens)"
            )
        seen = sorted({*seen, (characters, got)})
        characters = _next(seen, tokens)
    nearest = min((length for _, length in seen), key=lambda length: abs(length - tokens))
    raise StackError(
        f"no prompt of {tokens} tokens, {allowed} off allowed: the nearest of {TRIES} tries has "
        f"{nearest}; ask for {nearest} in the gate's file (prompt_tokens)"
    )


def _next(seen: list[tuple[int, int]], tokens: int) -> int:
    """Where a line through the nearest two lengths meets the wanted one."""
    below = [point for point in seen if point[1] < tokens]
    above = [point for point in seen if point[1] > tokens]
    if below and above:
        (x0, y0), (x1, y1) = below[-1], above[0]
        step = round(x0 + (tokens - y0) * (x1 - x0) / (y1 - y0))
        return min(max(step, x0 + 1), x1 - 1) if x1 - x0 > 1 else x0
    x, y = below[-1] if below else above[0]
    return max(0, x + round((tokens - y) * max(1.0, x / y if y else CHARACTERS_A_TOKEN)))


def fit_characters(document: Document, characters: int) -> str:
    """The document with a whole length of about ``characters``."""
    return document.text(max(0, characters - len(document.text(0))))
