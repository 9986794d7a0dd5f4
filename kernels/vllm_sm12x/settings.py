"""How the values of this package's environment variables are read, alike for each of them."""

from __future__ import annotations

from collections.abc import Collection


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
