"""Readable English in any length from a seed: the day book of a harbour town.

The text has the statistics of prose, not of random tokens: drafting and prefix caches meet what
they meet in use. Everything is written here; nothing is quoted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

_PEOPLE = (
    "the harbour master",
    "the ferry's mate",
    "a clerk of the customs house",
    "the widow at the chandlery",
    "the new lamp keeper",
    "an apprentice from the rope walk",
    "the baker's eldest son",
    "a surveyor from the capital",
    "the schoolteacher",
    "two fishermen of the lower quay",
    "the notary",
    "the pilot on duty",
    "a carpenter named Oller",
    "the keeper of the weigh house",
    "the mayor's secretary",
    "a sailmaker called Brenna",
)
_PLACES = (
    "the north mole",
    "the fish market",
    "the old granary",
    "the signal tower",
    "the lower quay",
    "the customs house",
    "the timber yard",
    "the bridge of boats",
    "the salt store",
    "the tavern at the steps",
    "the dry dock",
    "the weigh house",
    "the square behind the chapel",
    "the ferry landing",
)
_THINGS = (
    "a ledger with two pages missing",
    "forty barrels of tar",
    "a letter sealed in green wax",
    "the spare anchor of the dredger",
    "a crate of lamp glass",
    "the plans for the second sluice",
    "three coils of new rope",
    "a clock that would not run",
    "the list of unpaid berths",
    "a chest of surveying tools",
    "sixty sacks of barley",
    "the bronze bell from the wreck",
    "a basket of eels",
    "the key to the lower gate",
)
_DEEDS = (
    "brought {thing} to {place}",
    "asked for {thing} and was sent to {place}",
    "found {thing} where nobody had looked, behind {place}",
    "spent the morning at {place} over {thing}",
    "counted {thing} twice and came to a different number each time",
    "refused to sign for {thing} until {other} had seen it",
    "carried {thing} as far as {place} and left it there under a sheet",
    "wrote down what {other} had said about {thing}",
    "walked with {other} from {place} to {place2} without a word",
    "sold {thing} for less than it was worth",
    "promised {other} to return {thing} before the next tide",
    "had {thing} repaired at {place}, at the town's expense",
)
_TURNS = (
    "It rained until noon.",
    "The wind had gone round to the east, and the boats stayed in.",
    "Nobody could say afterwards who had given the order.",
    "There was some laughter at that, and then a long silence.",
    "The matter was left for the council to decide.",
    "By evening the tide had covered the lower steps.",
    "The price of oil had gone up again.",
    "A lamp burned in the upper window all night.",
    "The ferry was late, as it had been all week.",
    "What had looked simple in the morning looked less so by lamplight.",
    "No entry was made for the afternoon.",
    "The old people said that it had been the same in the year of the flood.",
)
_LINKS = (
    "In the morning",
    "A little after ten",
    "Before the bell had rung",
    "Towards evening",
    "On the way back",
    "While the nets were being mended",
    "Against all advice",
    "As agreed the day before",
    "Without giving a reason",
    "When the fog lifted",
)
_REASONS = (
    "because the berth had been promised to another",
    "since the old one no longer served",
    "so that the inspectors would find everything in order",
    "although the weather gave no cause for it",
    "and said that it was the last time",
    "for which there was a receipt",
    "to the surprise of those who stood by",
    "as the rules of the port require",
)
_MONTHS = "January February March April May June July August September October November December"


def paragraphs(seed: str) -> Iterator[str]:
    """Paragraphs without end, the same for the same seed.

    Each is an entry of one day: its date, four to seven sentences, a sum of money or a count.
    """
    # A string seeds `random` by its SHA-512, on every Python alike.
    draw = random.Random(seed)
    months = _MONTHS.split()
    day = 0
    while True:
        day += draw.randint(1, 3)
        year, rest = divmod(day, 336)
        month, date = divmod(rest, 28)
        sentences = [f"{date + 1} {months[month]} of {_year(year + 1)}."]
        sentences += [_sentence(draw) for _ in range(draw.randint(3, 6))]
        sentences.append(
            f"The toll came to {draw.randint(3, 97)} crowns and {draw.randint(1, 19)} pence from "
            f"{draw.randint(2, 24)} ships."
        )
        yield " ".join(sentences)


def _sentence(draw: random.Random) -> str:
    if draw.random() < 0.2:
        return draw.choice(_TURNS)
    who, other = draw.sample(_PEOPLE, 2)
    place, place2 = draw.sample(_PLACES, 2)
    deed = draw.choice(_DEEDS).format(
        thing=draw.choice(_THINGS), place=place, place2=place2, other=other
    )
    start = f"{draw.choice(_LINKS)} {who} {deed}" if draw.random() < 0.6 else f"{who} {deed}"
    end = f", {draw.choice(_REASONS)}" if draw.random() < 0.35 else ""
    return f"{start[:1].upper()}{start[1:]}{end}."


def _year(number: int) -> str:
    names = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
    return f"the {names[number - 1]} year" if number <= len(names) else f"year {number}"
