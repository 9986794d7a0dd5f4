"""Throughput by vLLM's own benchmark, so that its figures are those that others publish."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from gates import programs
from gates.figures import Figures
from gates.session import Cell, Session
from gates.spec import Gate
from gates.toml import Strict
from gates.workloads.base import RowNumbers, Workload, mean
from stack.errors import StackError

HOURS_S = 3600.0


class Params(Strict):
    """``vllm bench serve`` on mt-bench, ``prompts`` of it, at each concurrency."""

    concurrency: RowNumbers = Field(min_length=1)
    prompts: int = Field(default=80, ge=1)
    temperature: float = Field(ge=0, le=2)
    output_tokens: int = Field(default=256, ge=1)
    within_s: float = Field(default=2 * HOURS_S, gt=0)


class Bench(Workload):
    """Rows that ``vllm bench serve`` measures."""

    Params = Params
    KEYS = frozenset({"concurrency", "temperature", "prompts"})
    FIGURES = frozenset(
        {
            "requests",
            "failures",
            "output_tok_s",
            "ttft_mean",
            "ttft_median",
            "tpot_mean",
            "itl_p99",
            "acceptance",
            "acceptance_length",
        }
    )

    def cells(self, gate: Gate, params: Params) -> list[list[Cell]]:
        """A row a concurrency."""
        return [
            [
                Cell(
                    gate.name,
                    {
                        "concurrency": concurrency,
                        "temperature": params.temperature,
                        "prompts": params.prompts,
                    },
                    repeat,
                    (params, concurrency),
                    weight=params.prompts * params.output_tokens * 10 / min(concurrency, 8),
                    requests=params.prompts,
                )
                for repeat in range(1, gate.repeats + 1)
            ]
            for concurrency in params.concurrency
        ]

    def missing(self, params: Params, options: Mapping[str, Any]) -> str | None:
        """It needs vLLM, and the data set from the network or from a folder."""
        if not programs.found(options.get("vllm") or "vllm"):
            return f"the program {options.get('vllm') or 'vllm'} was not found (--vllm)"
        data = options.get("mt_bench")
        if data and not Path(data).is_dir():
            return f"--mt-bench: there is no folder {data}"
        return None

    async def measure(self, session: Session) -> Figures:
        """Run it once and read what it saved."""
        params, concurrency = session.cell.plan
        name = f"bench-c{concurrency}-{session.cell.repeat}-{session.attempt}"
        log = session.logs(f"{name}.log")
        saved = log.with_suffix(".json")
        data = session.options.get("mt_bench")
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if data else {}
        await programs.run(
            command(session, params, concurrency, saved),
            log,
            params.within_s,
            {"VLLM_NO_USAGE_STATS": "1", **offline},
        )
        return read(saved)

    def row(self, measured: Any) -> Figures:
        """The mean over the repeats; requests and failures are added up."""
        repeats = [cell["figures"] for cell in measured]
        total = {name: sum(one[name] for one in repeats) for name in ("requests", "failures")}
        return mean(repeats) | total


def command(session: Session, params: Params, concurrency: int, saved: Path) -> list[str]:
    """The command line of one row."""
    options = session.options
    given = [
        *(options.get("vllm") or "vllm", "bench", "serve"),
        *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
        *("--base-url", session.server.url, "--model", session.server.model),
        *("--dataset-name", "hf", "--hf-name", "philschmid/mt-bench"),
        *("--dataset-path", options.get("mt_bench") or "philschmid/mt-bench"),
        # The server applies its own template to the question.
        *("--skip-chat-template", "--num-prompts", str(params.prompts)),
        *("--hf-output-len", str(params.output_tokens)),
        *("--max-concurrency", str(concurrency), "--temperature", str(params.temperature)),
        *("--seed", str(session.cell.repeat), "--disable-tqdm"),
        *("--save-result", "--result-dir", str(saved.parent), "--result-filename", saved.name),
    ]
    if options.get("tokenizer"):
        given += ["--tokenizer", str(options["tokenizer"])]
    return given


def read(saved: Path) -> Figures:
    """The figures of a result file of ``vllm bench serve``: seconds, shares of 1.

    Raises:
        StackError: It is missing or is another file.
    """
    try:
        result = json.loads(saved.read_text(encoding="utf-8"))
        completed, failed = result["completed"], result["failed"]
        told: Figures = {
            "requests": completed + failed,
            "failures": failed,
            "output_tok_s": result["output_throughput"],
            "ttft_mean": result["mean_ttft_ms"] / 1000,
            "ttft_median": result["median_ttft_ms"] / 1000,
            "tpot_mean": result["mean_tpot_ms"] / 1000,
            "itl_p99": result["p99_itl_ms"] / 1000,
        }
        if result.get("spec_decode_acceptance_rate") is not None:
            told["acceptance"] = result["spec_decode_acceptance_rate"] / 100
            told["acceptance_length"] = result["spec_decode_acceptance_length"]
        # Shares of 1, unlike the rate.
        if positions := result.get("spec_decode_per_position_acceptance_rates"):
            told["acceptance_by_position"] = positions
        return told
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StackError(
            f"{saved}: no result of vllm bench serve: {type(error).__name__} {error}",
            "read the log beside it",
        ) from error
