"""How the values of this package's environment variables are read, alike for each of them."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection


class Choice:
    """One of a few words that a variable holds; unset or empty it is ``auto``.

    A call gives the word, which is read once a process, at the first call. A module makes it when
    it is imported: a bad value stops whatever imports that, before a model is loaded.

    Raises:
        ValueError: The variable holds none of ``allowed``.
    """

    def __init__(self, variable: str, allowed: Collection[str]) -> None:
        self.variable, self.allowed = variable, allowed
        self._word = functools.cache(self._read)
        self._read()

    def __call__(self) -> str:
        return self._word()

    def parse(self, value: str) -> str:
        """What the variable would mean with this value.

        Raises:
            ValueError: It is none of ``allowed``.
        """
        return choice(self.variable, value, self.allowed)

    def cache_clear(self) -> None:
        """Read the variable again at the next call, for tests that set it."""
        self._word.cache_clear()

    def _read(self) -> str:
        return self.parse(os.environ.get(self.variable, "auto"))


def choice(variable: str, value: str, allowed: Collection[str]) -> str:
    """One of a few words; an empty value is ``auto``.

    Args:
        variable: Its name, for the error.

    Raises:
        ValueError: It is none of ``allowed``.
    """
    word = value.strip() or "auto"
    if word not in allowed:
        raise ValueError(f"{variable}={value!r} is not allowed; allowed: {', '.join(allowed)}")
    return word


def names(variable: str, value: str, known: Collection[str], allowed: str) -> frozenset[str] | None:
    """The names that ``all``, ``none`` or a comma-separated list means. A list is exact.

    Args:
        variable: Its name, for the error.
        known: What a list may hold.
        allowed: What the error says is allowed.

    Returns:
        ``None`` for ``auto`` and for an empty value.

    Raises:
        ValueError: A word of the list is not known; the first of them is named.
    """
    words = [word.strip() for word in value.split(",")]
    if words in (["auto"], [""]):
        return None
    if words == ["all"]:
        return frozenset(known)
    if words == ["none"]:
        return frozenset()
    for word in words:
        if word not in known:
            raise ValueError(f"{variable}={value!r}: {word!r} is not allowed; allowed: {allowed}")
    return frozenset(words)
