"""Long prompts with something to find in them: a text, what is hidden in it and the question.

A document is a list of parts. Lengthening it adds parts between the hidden ones, so that what is
to be found keeps its place (a tenth, a half, nine tenths of the way).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gates.prompts import audit, prose

Source = Callable[[str], Iterator[str]]
NONCE_DIGITS = 24


@dataclass(frozen=True)
class Document:
    """A prompt that can be made in any length.

    Attributes:
        opening: What stands first: the nonce of a cold prompt is in it.
        source: The parts without end, from ``seed``. Prompts of one length share the seed, so that
            they are of one length; the nonce tells them apart.
        hidden: ``(place, sentence)``: how far into the text, from 0 to 1, which sentence.
        question: What stands last.
        answers: What the answer must hold, one string each.
    """

    opening: str
    source: Source
    seed: str
    hidden: tuple[tuple[float, str], ...]
    question: str
    answers: tuple[str, ...]

    def text(self, characters: int) -> str:
        """The prompt with about that many characters of text between opening and question.

        The text ends inside a part where need be, so that the length grows in single words.
        """
        parts, size = [], 0
        for part in self.source(self.seed):
            if size + len(part) > characters:
                part = _cut(part, characters - size)
            if part:
                parts.append(part)
            size += len(part) + 2
            if size >= characters:
                break
        places: dict[int, list[str]] = {}
        for place, sentence in self.hidden:
            places.setdefault(round(place * len(parts)), []).append(sentence)
        body: list[str] = []
        for number, part in enumerate([*parts, ""]):
            body += places.get(number, [])
            body += [part] if part else []
        return "\n\n".join([self.opening, *body, self.question])

    def found(self, answer: str) -> int:
        """How many of ``answers`` an answer holds whole; case, marks and spaces at ``=`` apart."""
        flat = re.sub(r"[ \t]*=[ \t]*", "=", re.sub(r"[*`_]+", "", answer)).lower()
        return sum(
            bool(re.search(rf"(?<!\w){re.escape(wanted.lower())}(?!\w)", flat))
            for wanted in self.answers
        )


def _cut(part: str, characters: int) -> str:
    """The words of a part that fit."""
    return part[: max(0, characters)].rpartition(" ")[0]


def nonce(seed: str) -> str:
    """A line that no other prompt begins with; of a fixed length, so that lengths do not move."""
    digits = "".join(random.Random(seed).choices("0123456789", k=NONCE_DIGITS))
    return f"Archive copy {digits}."


def _codes(seed: str, count: int) -> list[str]:
    """Codes such as ``KTR-4821``: letters that are no word, and digits."""
    draw = random.Random(f"codes {seed}")
    letters = "BCDFGHJKLMNPQRSTVWXZ"
    return [
        "".join(draw.choices(letters, k=3)) + f"-{draw.randint(1000, 9999)}" for _ in range(count)
    ]


def archive(seed: str, body: str = "archive") -> Document:
    """The harbour's day book with three sentinels, all of which must be recalled.

    ``seed`` makes the nonce and the sentinels, ``body`` the text around them.
    """
    gates = ("north gate", "water gate", "upper gate")
    codes = _codes(seed, len(gates))
    return Document(
        opening=f"{nonce(seed)}\n\nBelow is the day book of a harbour town. A question follows it.",
        source=prose.paragraphs,
        seed=body,
        hidden=tuple(
            (place, f"Note of the watch: the code of the {gate} is {code}.")
            for place, gate, code in zip((0.1, 0.5, 0.9), gates, codes, strict=True)
        ),
        question=(
            "The book holds three notes of the watch. First write the codes of the north gate, the "
            "water gate and the upper gate, one a line. Then describe at length, day by day, what "
            "happened at the harbour."
        ),
        answers=tuple(codes),
    )


_NAMES = [
    "Abel",
    "Brenna",
    "Corin",
    "Dagny",
    "Edda",
    "Falk",
    "Greta",
    "Hauke",
    "Imke",
    "Jorun",
    "Kester",
    "Liva",
    "Mads",
    "Nella",
    "Oller",
    "Petra",
]


def story(seed: str, body: str = "story") -> Document:
    """A long story in which sixteen people tell a number each; the answer is a list of them."""
    draw = random.Random(f"story {seed}")
    numbers = draw.sample(range(100, 1000), len(_NAMES))
    order = list(zip(_NAMES, numbers, strict=True))
    draw.shuffle(order)
    hidden = tuple(
        (
            (place + 0.5) / len(order),
            f"That day {name} opened the tin box, took out the slip and read the number aloud: "
            f"{number}. {name} was to keep the number {number} until the end.",
        )
        for place, (name, number) in enumerate(order)
    )
    return Document(
        opening=f"{nonce(seed)}\n\nRead this chronicle. Sixteen people draw numbers in it.",
        source=prose.paragraphs,
        seed=body,
        hidden=hidden,
        question=(
            "List the number that each of the sixteen people drew, one a line, exactly in the form "
            "Name=number, in the order of the alphabet. Write nothing else."
        ),
        answers=tuple(f"{name}={number}" for name, number in sorted(order)),
    )


def security_audit(seed: str, body: str = "audit") -> Document:
    """The files of a made-up service with planted faults, and the request for an audit."""
    return Document(
        opening=f"{nonce(seed)}\n\nAudit the configuration and code of a service. Files follow.",
        source=audit.files,
        seed=body,
        hidden=(),
        question=(
            "Write the audit: for each finding the file, the line, what can go wrong, how grave it "
            "is and how to mend it. Begin with the gravest."
        ),
        answers=(),
    )


def random_words(seed: str, body: str = "random") -> Document:
    """Words drawn at random: nothing to recall, nothing that drafting can guess from sense."""
    return Document(nonce(seed), _random_lines, body, (), "Continue this list of words.", ())


def _random_lines(seed: str) -> Iterator[str]:
    draw = random.Random(f"words {seed}")
    while True:
        yield " ".join(
            "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(size))
            for size in draw.choices((1, 2, 3, 4), k=12)
        )


def question(seed: str, body: str = "") -> Document:
    """A short prompt for a long answer; ``body`` names the topic, or the seed draws one."""
    topic = random.Random(f"topic {body or seed}").choice(_TOPICS)
    return Document(
        opening=nonce(seed),
        source=lambda _: iter(()),
        seed=seed,
        hidden=(),
        question=f"Explain in detail, for a careful reader who is new to it: {topic}.",
        answers=(),
    )


_TOPICS = (
    "how a canal lock lifts a ship",
    "why bread rises and what can keep it from rising",
    "how a compiler turns a loop into machine code",
    "how to plan a garden for a dry summer",
    "why clocks on ships made it possible to find longitude",
    "how a database keeps its promises when the power fails",
    "what makes a bridge sway and how builders stop it",
    "how to read a weather chart",
    "how a letter found its way across the world before the telegraph",
    "why some materials break and others bend",
    "how to sort a million records on a small machine",
    "how the tides come about and why they differ from port to port",
)

# By the name that a gate file gives.
KINDS: dict[str, Callable[..., Document]] = {
    "archive": archive,
    "story": story,
    "audit": security_audit,
    "random": random_words,
    "question": question,
}
