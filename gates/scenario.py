"""The scenarios of the tool-call battery: what is asked, what the tools say, what is right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from gates import toml
from gates.toml import Strict
from stack.errors import StackError

FOLDER = Path(__file__).with_name("scenarios")
Category = Literal["selection", "precision", "chain", "restraint", "recovery"]
Value = str | int | float | bool | list[Any] | dict[str, Any]


class Result(Strict):
    """What a tool says to a call: the first of the scenario's results that fits the call.

    ``arguments`` must be among the call's. With ``once`` it is said one time only.
    """

    tool: str
    arguments: dict[str, Value] = {}
    result: str
    once: bool = False


class Check(Strict):
    """One thing that must hold of a conversation.

    ``called``: so a call was made, ``times`` times if given. ``not_called``: none was. ``calls``:
    between ``min`` and ``max`` calls in all. ``order``: these tools were called in this order.
    ``said``: the last answer holds one of ``any``. ``not_said``: none of them.
    """

    kind: Literal["called", "not_called", "calls", "order", "said", "not_said"]
    tool: str = ""
    arguments: dict[str, Value] = {}
    times: int | None = None
    min: int = 0
    max: int | None = None
    tools: list[str] = []
    any: list[str] = []

    @model_validator(mode="after")
    def _whole(self) -> Check:
        needs = {"called": "tool", "not_called": "tool", "order": "tools"}
        name = needs.get(self.kind, "any" if "said" in self.kind else "")
        if name and not getattr(self, name):
            raise ValueError(f"a check of kind {self.kind!r} needs {name}")
        return self


class Scenario(Strict):
    """One scenario. All of ``full`` holds: 2 points; all of ``partial``: 1; else 0."""

    id: str = Field(pattern=r"^[a-z]+(-[a-z0-9]+)+$")
    category: Category
    title: str
    system: str = ""
    user: str
    tools: list[str] = Field(min_length=1)
    max_turns: int = Field(default=6, ge=1, le=12)
    results: list[Result] = []
    full: list[Check] = Field(min_length=1)
    partial: list[Check] = Field(min_length=1)


def load(folder: Path = FOLDER) -> list[Scenario]:
    """Every scenario of a folder, by category and id.

    Raises:
        StackError: A file is wrong, or names a tool that ``tools.json`` does not have.
    """
    known = tools(folder)
    scenarios = []
    for path in sorted(folder.glob("*.toml")):
        scenario = toml.check(Scenario, toml.read(path), path.name)
        if scenario.id != path.stem:
            raise StackError(f"{path.name}: id: must be {path.stem!r} as the file")
        named = {result.tool for result in scenario.results} | {
            name
            for check in (*scenario.full, *scenario.partial)
            for name in (check.tool, *check.tools)
            if name
        }
        for name in sorted({*scenario.tools, *named} - known.keys()):
            raise StackError(
                f"{path.name}: there is no tool {name!r}; tools.json has {', '.join(sorted(known))}"
            )
        for name in sorted(named - set(scenario.tools)):
            raise StackError(f"{path.name}: {name!r} is not among the scenario's tools")
        scenarios.append(scenario)
    return scenarios


@cache
def tools(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The tools by name, as a request carries them."""
    entries = json.loads((folder / "tools.json").read_text(encoding="utf-8"))
    return {entry["name"]: {"type": "function", "function": entry} for entry in entries}


class Conversation:
    """The tools' side of one run of a scenario: it answers calls and keeps them."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.calls: list[tuple[str, Any]] = []
        self.answer = ""
        self._spent: set[int] = set()

    def call(self, name: str, arguments: str) -> str:
        """What the tool says. Wrong JSON, and a call without a result, are said as errors."""
        try:
            given = json.loads(arguments or "{}")
        except ValueError:
            self.calls.append((name, None))
            return json.dumps({"error": "the arguments are no JSON"})
        self.calls.append((name, given))
        if name not in self.scenario.tools:
            return json.dumps({"error": f"there is no tool {name}"})
        for number, result in enumerate(self.scenario.results):
            if number in self._spent or result.tool != name:
                continue
            if matches(result.arguments, given):
                if result.once:
                    self._spent.add(number)
                return result.result
        return json.dumps({"error": "nothing found for these arguments"})

    def points(self) -> int:
        """2, 1 or 0."""
        if all(self._holds(check) for check in self.scenario.full):
            return 2
        return 1 if all(self._holds(check) for check in self.scenario.partial) else 0

    def _holds(self, check: Check) -> bool:
        fitting = [
            name
            for name, given in self.calls
            if name == check.tool and matches(check.arguments, given)
        ]
        # Models write the apostrophe of "can't" in two ways.
        answer = self.answer.lower().replace("\u2019", "'")
        said = any(words.lower() in answer for words in check.any)
        if check.kind == "called":
            return len(fitting) == check.times if check.times is not None else bool(fitting)
        if check.kind == "not_called":
            return not fitting
        if check.kind == "calls":
            enough = len(self.calls) >= check.min
            return enough and (check.max is None or len(self.calls) <= check.max)
        if check.kind == "order":
            made = iter(name for name, _ in self.calls)
            return all(wanted in made for wanted in check.tools)
        return said if check.kind == "said" else not said


def matches(wanted: Mapping[str, Any], given: Any) -> bool:
    """Whether a call's arguments hold those that are wanted.

    Texts are compared without case and outer spaces, numbers by value, lists as sets.
    ``{contains = "x"}`` wants a text with ``x`` in it.
    """
    return isinstance(given, Mapping) and all(
        name in given and _same(value, given[name]) for name, value in wanted.items()
    )


def _same(wanted: Any, given: Any) -> bool:
    if isinstance(wanted, Mapping) and wanted.keys() == {"contains"}:
        return str(wanted["contains"]).lower() in str(given).lower()
    if isinstance(wanted, Mapping):
        return matches(wanted, given)
    if isinstance(wanted, bool) or isinstance(given, bool):
        return wanted is given
    if isinstance(wanted, int | float):
        try:
            return abs(float(given) - wanted) < 1e-6
        except (TypeError, ValueError):
            return False
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        return (
            isinstance(given, list)
            and len(given) == len(wanted)
            and all(any(_same(one, other) for other in given) for one in wanted)
        )
    return str(wanted).strip().lower() == str(given).strip().lower()
