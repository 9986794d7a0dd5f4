"""Log-probabilities against a stored reference: the same model, another build or path."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from gates.figures import Figures
from gates.prompts import document
from gates.prompts.fit import fit_characters
from gates.session import Cell, Session
from gates.spec import Gate
from gates.toml import Strict
from gates.workloads.base import Workload
from gates.workloads.load import Kind
from stack.errors import StackError

FORMAT = 1
# The prompts are the same in every run: here nothing must be cold.
SEED = "log-probabilities"


class Prompt(Strict):
    """A text of so many characters."""

    kind: Kind
    characters: int = Field(ge=256)


class Params(Strict):
    """``top`` alternatives a position are asked for; ``answer_tokens`` of each prompt are generated
    greedily after it.
    """

    prompts: list[Prompt] = Field(min_length=1)
    top: int = Field(default=5, ge=1, le=20)
    answer_tokens: int = Field(default=32, ge=1)


class Logprobs(Workload):
    """A row a prompt. The prompt's own tokens are compared: no divergence adds up there."""

    Params = Params
    KEYS = frozenset({"prompt"})
    FIGURES = frozenset(
        {
            "requests",
            "failures",
            "positions",
            "difference_mean",
            "difference_p99",
            "difference_max",
            "bias",
            "same_first",
            "answer_same",
            "written",
        }
    )

    def cells(self, gate: Gate, params: Params) -> list[list[Cell]]:
        """A row a prompt, not repeated: greedy answers are compared, not timed."""
        rows = []
        for prompt in params.prompts:
            tokens = prompt.characters // 3
            key = {"prompt": f"{prompt.kind} {prompt.characters}"}
            plan = (params, prompt.kind, prompt.characters)
            rows.append([Cell(gate.name, key, 1, plan, tokens, 1, tokens + params.answer_tokens)])
        return rows

    def missing(self, params: Params, options: Mapping[str, Any]) -> str | None:
        """It needs a reference to compare with, or a place to write one."""
        if options.get("write_reference"):
            return None
        if not options.get("reference"):
            return "there is no reference (--reference, or --write-reference to make one)"
        if not Path(options["reference"]).is_file():
            return f"--reference: there is no file {options['reference']}"
        return None

    async def measure(self, session: Session) -> Figures:
        """Ask once; write the reference, or compare with it."""
        params, kind, size = session.cell.plan
        name = session.cell.key["prompt"]
        text = fit_characters(document.KINDS[kind](SEED), size)
        reply = await session.http.post(
            "/v1/completions",
            json={
                "model": session.server.model,
                "prompt": text,
                "max_tokens": params.answer_tokens,
                "temperature": 0.0,
                "echo": True,
                "logprobs": params.top,
            },
            timeout=session.timeouts.total_s,
        )
        if not reply.is_success:
            raise ValueError(f"/v1/completions answered {reply.status_code}: {reply.text[:200]}")
        mine = measured(reply.json())
        if session.options.get("write_reference"):
            write(Path(session.options["write_reference"]), name, mine, session.server.model)
            return {"requests": 1, "failures": 0, "written": len(mine["tokens"])}
        theirs = reference(Path(session.options["reference"]), name)
        return {"requests": 1, "failures": 0} | compare(mine, theirs)

    def unproven(self, rows: Sequence[Figures]) -> str:
        """A reference that was written is held against nothing."""
        return "reference written" if any("written" in row for row in rows) else ""

    def row(self, measured: Any) -> Figures:
        """As it was."""
        return dict(measured[-1]["figures"])


def measured(reply: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens, log-probabilities, the likeliest token of each position and the prompt's length.

    Raises:
        ValueError: The server did not give them.
    """
    try:
        choice = reply["choices"][0]
        given = choice["logprobs"]
        tokens, values = given["tokens"], given["token_logprobs"]
        first = [max(top, key=top.get) if top else None for top in given["top_logprobs"]]
        prompt = reply["usage"]["prompt_tokens"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the answer has no log-probabilities of the prompt: {error!r}") from error
    if not 1 < prompt < len(tokens) or len(values) != len(tokens) or len(first) != len(tokens):
        raise ValueError(
            f"{len(tokens)} tokens, {len(values)} log-probabilities, a prompt of {prompt}"
        )
    # The first token follows nothing and has none.
    wrong = [at for at, value in enumerate(values) if at and not _is_logprob(value)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(values)} log-probabilities are no numbers, the first at "
            f"position {wrong[0]}: {values[wrong[0]]!r}"
        )
    return {"tokens": tokens, "logprobs": values, "first": first, "prompt": prompt}


def _is_logprob(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)


def compare(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Figures:
    """The difference at the prompt's positions, and how much of the greedy answer is the same.

    ``bias`` is the share of positions at which ours is above, less that at which it is below.

    Raises:
        ValueError: The two have other tokens in the prompt.
    """
    count = theirs["prompt"]
    if mine["prompt"] != count or mine["tokens"][:count] != theirs["tokens"][:count]:
        raise ValueError("the reference was made of other tokens: another tokenizer or text")
    # The first token follows nothing and has no probability.
    ours = np.array(mine["logprobs"][1:count], dtype=np.float64)
    others = np.array(theirs["logprobs"][1:count], dtype=np.float64)
    apart = ours - others
    same = [a == b for a, b in zip(mine["first"][1:count], theirs["first"][1:count], strict=True)]
    answer, wanted = mine["tokens"][count:], theirs["tokens"][count:]
    alike = next(
        (n for n, pair in enumerate(zip(answer, wanted, strict=False)) if pair[0] != pair[1]),
        min(len(answer), len(wanted)),
    )
    return {
        "positions": count - 1,
        "difference_mean": float(np.abs(apart).mean()),
        "difference_p99": float(np.percentile(np.abs(apart), 99)),
        "difference_max": float(np.abs(apart).max()),
        "bias": float((apart > 0).mean() - (apart < 0).mean()),
        "same_first": sum(same) / len(same),
        "answer_same": alike / max(1, len(wanted)),
    }


def write(path: Path, name: str, kept: Mapping[str, Any], model: str) -> None:
    """Add a prompt's reference to a file, which is made where it is not there."""
    entries = _load(path) if path.is_file() else {"format": FORMAT, "model": model, "prompts": {}}
    entries["prompts"][name] = dict(kept)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(entries) + "\n", encoding="utf-8")
    part.replace(path)


def reference(path: Path, name: str) -> dict[str, Any]:
    """A prompt's reference.

    Raises:
        StackError: The file is no reference, or has none of this prompt.
    """
    prompts = _load(path)["prompts"]
    if name not in prompts:
        raise StackError(f"{path}: no reference of {name!r}; it has {', '.join(prompts) or 'none'}")
    return prompts[name]


def _load(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if entries["format"] != FORMAT or not isinstance(entries["prompts"], dict):
            raise ValueError(f"its format is {entries['format']}, not {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StackError(f"{path}: no reference of log-probabilities: {error}") from error
    return entries
