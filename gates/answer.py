"""One streamed answer as it arrived: when each chunk came and how many tokens it brought."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# How an answer can end badly. A row with any of these counts as a failure.
FAULTS = {
    "refused": "no connection",
    "http": "an HTTP status that is not 200",
    "first_token": "no first token in time",
    "stall": "no further token in time",
    "total": "not at its end in time",
    "disconnected": "the connection ended in the middle",
    "cut_off": "the stream ended without its closing event",
    "garbled": "an event that is no JSON object of the protocol",
    "server_error": "an error inside the stream",
    "empty": "no token at all",
    "usage": "token counts missing, or counts that cannot be",
    "client": "the request could not be sent or read for another reason",
}


@dataclass
class Chunk:
    """One arrival: ``at`` in seconds since the request was sent, ``tokens`` where known."""

    at: float
    tokens: int | None = None


@dataclass
class Answer:
    """What came back for one request.

    Times are seconds since the request was sent, by one monotonic clock. Token counts are the
    server's ``usage``, never the number of chunks: with speculative decoding a chunk holds several
    tokens. ``fault`` is a key of ``FAULTS``, or empty.
    """

    sent_at: float = 0.0  # the monotonic clock
    chunks: list[Chunk] = field(default_factory=list)
    ended: float = 0.0
    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    fault: str = ""
    detail: str = ""

    def fail(self, fault: str, detail: str = "") -> None:
        """Note what went wrong; the first thing stands."""
        if fault not in FAULTS:
            raise ValueError(f"{fault!r} is none of {', '.join(FAULTS)}")
        if not self.fault:
            self.fault, self.detail = fault, detail[:300]

    def record(self) -> dict[str, Any]:
        """As JSON keeps it: arrivals as two lists, seconds rounded to microseconds."""
        kept = asdict(self)
        kept.pop("chunks")
        kept["sent_at"], kept["ended"] = round(self.sent_at, 6), round(self.ended, 6)
        kept["chunk_at"] = [round(chunk.at, 6) for chunk in self.chunks]
        kept["chunk_tokens"] = [chunk.tokens for chunk in self.chunks]
        return kept

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Answer:
        """What ``record`` gave, back."""
        kept = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        pairs = zip(record["chunk_at"], record["chunk_tokens"], strict=True)
        return cls(**kept, chunks=[Chunk(at, tokens) for at, tokens in pairs])
