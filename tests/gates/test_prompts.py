"""Prompts: the same from the same seed, cold where they must be, and as long as was asked."""

from __future__ import annotations

import asyncio
import hashlib
import re

import pytest

from gates.prompts import document
from gates.prompts.fit import fit, fit_characters
from stack.errors import StackError
from tests.gates.fake_server import words

LONG = ("archive", "story", "audit", "random")


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("kind", document.KINDS)
def test_a_seed_gives_the_same_text_and_another_seed_another_beginning(kind):
    make = document.KINDS[kind]
    assert make("a").text(5000) == make("a").text(5000)
    one, other = make("a").text(5000), make("b").text(5000)
    assert one[:40] != other[:40] and len(one.split("\n")[0]) == len(other.split("\n")[0])


def test_the_texts_do_not_change_from_release_to_release():
    """Figures of two releases compare only where the prompts are the same."""
    told = {kind: digest(document.KINDS[kind]("seed").text(4000)) for kind in LONG}
    assert told == PINNED


PINNED = {
    "archive": "606c08820d5b2065",
    "story": "0ce62cdf2fe31d64",
    "audit": "2dd8a036d55a4283",
    "random": "62d3adb021100805",
}


@pytest.mark.parametrize("kind", LONG)
def test_prompts_of_one_length_share_all_but_nonce_and_secrets(kind):
    one, other = (document.KINDS[kind](seed).text(20000).split("\n\n") for seed in "ab")
    same = sum(a == b for a, b in zip(one, other, strict=True))
    assert 0 < len(one) - same <= 20


def test_the_sentinels_stand_early_in_the_middle_and_late():
    made = document.archive("x")
    text = made.text(50000)
    places = [text.index(code) / len(text) for code in made.answers]
    assert places == pytest.approx([0.1, 0.5, 0.9], abs=0.03)
    assert all(text.count(code) == 1 for code in made.answers)
    assert text.count("the code of the") == 3


def test_the_story_hides_sixteen_numbers_that_differ():
    made = document.story("x")
    text = made.text(30000)
    assert len(made.answers) == 16
    numbers = [answer.partition("=")[2] for answer in made.answers]
    assert len(set(numbers)) == 16
    for answer in made.answers:
        name, _, number = answer.partition("=")
        assert re.search(rf"{name} opened the tin box, .* aloud: {number}\.", text)
    places = sorted(text.index(f"aloud: {number}.") / len(text) for number in numbers)
    assert max(b - a for a, b in zip(places, places[1:], strict=False)) < 0.15
    assert list(made.answers) == sorted(made.answers)


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ("Abel=123\nBrenna=456", 2),
        ("* **Abel** = 123\n* `brenna` =456.", 2),
        ("Abel=1234, Brenna=45", 0),
        ("XAbel=123", 0),
        ("", 0),
    ],
)
def test_what_was_recalled_is_counted_whole(answer, count):
    made = document.Document("", lambda seed: iter(()), "", (), "", ("Abel=123", "Brenna=456"))
    assert made.found(answer) == count


def counter(seen=None, broken=False):
    async def count(text):
        if seen is not None:
            seen.append(text)
        return None if broken else words([{"content": text}])

    return count


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("tokens", [300, 4047, 58980])
def test_a_prompt_is_as_long_as_asked_by_the_tokenizer(kind, tokens):
    if kind == "story":
        tokens = max(tokens, 1000)  # sixteen people do not fit into less
    seen = []
    made = asyncio.run(fit(document.KINDS[kind]("x"), tokens, counter(seen)))
    assert abs(words([{"content": made.text}]) - tokens) <= max(4, tokens * 0.002)
    assert made.tokens == words([{"content": made.text}])
    assert len(seen) <= 8
    # The next one like it needs no search.
    again = []
    asyncio.run(fit(document.KINDS[kind]("y"), tokens, counter(again), made.characters))
    assert len(again) <= 2


def test_without_a_tokenizer_the_length_is_a_guess_and_says_so():
    made = asyncio.run(fit(document.archive("x"), 2000, counter(broken=True)))
    assert made.tokens is None
    assert len(made.text) == pytest.approx(8000, rel=0.05)


def test_a_length_that_cannot_be_had_is_an_error():
    """What stands in every length is longer than 64; the error says from where on it goes."""
    least = words([{"content": document.story("x").text(0)}])
    with pytest.raises(StackError, match="no prompt of 64 tokens") as error:
        asyncio.run(fit(document.story("x"), 64, counter()))
    assert f"has {least} with this tokenizer; ask for {least} or more" in error.value.message
    made = asyncio.run(fit(document.story("x"), least, counter()))
    assert made.tokens == least


def test_a_length_between_two_words_is_an_error_that_names_the_nearest():
    """A tokenizer that gives every word a hundred tokens."""

    async def count(text):
        return 100 * len(text.split())

    with pytest.raises(StackError, match="no prompt of 9050 tokens, 18 off allowed") as error:
        asyncio.run(fit(document.archive("x"), 9050, count))
    assert "ask for 9000 in" in error.value.message or "ask for 9100 in" in error.value.message


@pytest.mark.parametrize("size", [6000, 65536, 124000])
def test_a_frontier_is_a_length_in_characters(size):
    assert len(fit_characters(document.story("x"), size)) == pytest.approx(size, abs=120)


def test_the_audit_has_faults_to_find():
    text = document.security_audit("x").text(20000)
    for fault in ('password = "', "request.name}'", 'address = "0.0.0.0"', "User=root", "['*']"):
        assert fault in text
    assert text.count("--- file:") > 40
