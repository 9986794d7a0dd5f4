"""The tool-call battery: each scenario in each thinking mode, the tools' answers scripted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from gates import figures, scenario
from gates.answer import Answer
from gates.figures import Figures
from gates.scenario import Category, Conversation, Scenario
from gates.session import Cell, Request, Session
from gates.spec import Gate
from gates.toml import Strict
from gates.workloads.base import Workload, waves

Mode = Literal["chat", "thinking", "thinking-max"]
# chat_template_kwargs.thinking, and the effort, as DeepSeek V4's template reads them.
MODES: dict[str, tuple[bool, str | None]] = {
    "chat": (False, None),
    "thinking": (True, None),
    "thinking-max": (True, "max"),
}
CATEGORIES = get_args(Category)
BEST = 2


class Params(Strict):
    """The modes, and the sampling; ``scenarios`` names some of them, all if empty."""

    modes: list[Mode] = Field(default=["chat", "thinking", "thinking-max"], min_length=1)
    scenarios: list[str] = []
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=4096, ge=16)

    @field_validator("scenarios")
    @classmethod
    def _known(cls, named: list[str]) -> list[str]:
        known = [one.id for one in scenario.load()]
        if unknown := sorted(set(named) - set(known)):
            raise ValueError(f"there is no {', '.join(unknown)}; allowed: {', '.join(known)}")
        return named


class Tools(Workload):
    """A row a mode; a round of all scenarios is one repeat."""

    Params = Params
    KEYS = frozenset({"thinking"})
    FIGURES = frozenset(
        {"cases", "points", "score", "failed_cases", "failures", "imperfect", "reasoned"}
    ) | set(CATEGORIES)

    def cells(self, gate: Gate, params: Params) -> list[list[Cell]]:
        """A row a mode."""
        chosen = [s for s in scenario.load() if not params.scenarios or s.id in params.scenarios]
        return [
            [
                Cell(
                    gate.name,
                    {"thinking": mode},
                    repeat,
                    (params, mode, chosen),
                    weight=len(chosen) * (20000.0 if MODES[mode][0] else 6000.0),
                    requests=3 * len(chosen),
                )
                for repeat in range(1, gate.repeats + 1)
            ]
            for mode in params.modes
        ]

    async def measure(self, session: Session) -> Figures:
        """Hold each conversation to its end and score it."""
        params, mode, chosen = session.cell.plan
        points: dict[str, int] = {}
        for wave, one in enumerate(chosen):
            points[one.id] = await self._play(session, params, mode, one, wave)
        return {"points_of": points}

    async def _play(
        self, session: Session, params: Params, mode: str, one: Scenario, wave: int
    ) -> int:
        thinking, effort = MODES[mode]
        known, talk = scenario.tools(), Conversation(one)
        messages: list[dict[str, Any]] = [{"role": "user", "content": one.user}]
        if one.system:
            messages.insert(0, {"role": "system", "content": one.system})
        for turn in range(one.max_turns):
            answer = await session.ask(
                Request(
                    list(messages),
                    max_tokens=params.max_tokens,
                    temperature=params.temperature,
                    top_p=params.top_p,
                    seed=session.cell.repeat,
                    thinking=thinking,
                    effort=effort,
                    tools=[known[name] for name in one.tools],
                    note={"scenario": one.id, "turn": turn},
                ),
                wave=wave,
            )
            if answer.fault:
                return 0
            if not answer.tool_calls:
                talk.answer = answer.text
                return talk.points()
            messages.append(_assistant(answer, turn))
            for number, call in enumerate(answer.tool_calls):
                messages.append(
                    {
                        "role": "tool",
                        "tool_call_id": call["id"] or f"call-{turn}-{number}",
                        "content": talk.call(call["name"], call["arguments"]),
                    }
                )
        # It never came to an answer: what was called still counts.
        return min(talk.points(), 1)

    def row(self, measured: Sequence[Mapping[str, Any]]) -> Figures:
        """Points over all rounds, by category too, and the cases that had none."""
        kinds = {one.id: one.category for one in scenario.load()}
        scored = [
            (name, points)
            for cell in measured
            for name, points in cell["figures"]["points_of"].items()
        ]
        answers = [wave for cell in measured for wave in waves(cell["answers"])]
        told: Figures = {
            "cases": len(scored),
            "points": sum(points for _, points in scored),
            "imperfect": sum(points < BEST for _, points in scored),
            "failed_cases": sum(points == 0 for _, points in scored),
            "failures": figures.row(answers)["failures"],
        }
        # A server may ignore chat_template_kwargs and say nothing of it.
        good = [answer for wave in answers for answer in wave if not answer.fault]
        if good:
            told["reasoned"] = sum(bool(answer.reasoning.strip()) for answer in good) / len(good)
        if scored:
            told["score"] = told["points"] / (BEST * len(scored))
        for category in CATEGORIES:
            of_kind = [points for name, points in scored if kinds.get(name) == category]
            if of_kind:
                told[category] = sum(of_kind) / (BEST * len(of_kind))
        return told


def _assistant(answer: Answer, turn: int) -> dict[str, Any]:
    """The answer as the next request repeats it, its reasoning with it."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer.text or None,
        "tool_calls": [
            {
                "id": call["id"] or f"call-{turn}-{number}",
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"] or "{}"},
            }
            for number, call in enumerate(answer.tool_calls)
        ],
    }
    if answer.reasoning:
        message["reasoning"] = answer.reasoning
    return message
