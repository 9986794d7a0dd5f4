"""Accuracy by ``lm_eval``: GSM8K, five examples, greedily."""

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
from gates.workloads.base import Workload, mean
from stack.errors import StackError

TASK = "gsm8k"
LOCAL_TASK = "gsm8k_local"


class Params(Strict):
    """``questions`` of GSM8K with ``shots`` examples each, so many at once."""

    questions: int = Field(default=200, ge=1)
    shots: int = Field(default=5, ge=0)
    concurrency: int = Field(default=4, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=2048, ge=1)
    within_s: float = Field(default=14400.0, gt=0)


class Evaluation(Workload):
    """One row: the share of right answers."""

    Params = Params
    KEYS = frozenset({"task", "shots", "questions", "temperature", "concurrency"})
    FIGURES = frozenset({"exact_match_flexible", "exact_match_strict", "requests", "stderr"})

    def cells(self, gate: Gate, params: Params) -> list[list[Cell]]:
        """One row."""
        key = {
            "task": TASK,
            "shots": params.shots,
            "questions": params.questions,
            "temperature": params.temperature,
            "concurrency": params.concurrency,
        }
        weight = params.questions * 2000.0
        return [
            [
                Cell(gate.name, key, repeat, params, weight, params.questions)
                for repeat in range(1, gate.repeats + 1)
            ]
        ]

    def missing(self, params: Params, options: Mapping[str, Any]) -> str | None:
        """It needs lm_eval, and the data set from the network or from a folder."""
        program = options.get("lm_eval") or "lm_eval"
        if not programs.found(program):
            return f"the program {program} was not found (--lm-eval)"
        if options.get("gsm8k"):
            try:
                data_files(Path(options["gsm8k"]))
            except StackError as error:
                return error.message
        return None

    async def measure(self, session: Session) -> Figures:
        """Run it and read what it wrote."""
        params = session.cell.plan
        log = session.logs(f"lm_eval-{session.cell.repeat}-{session.attempt}.log")
        out = log.with_suffix("")
        offline: dict[str, str] = {}
        extra: list[str] = []
        if session.options.get("gsm8k"):
            offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
            out.mkdir(exist_ok=True)
            write_task(out / f"{LOCAL_TASK}.yaml", Path(session.options["gsm8k"]))
            extra = ["--include_path", str(out)]
        await programs.run(
            [*command(session, params, out, bool(extra)), *extra], log, params.within_s, offline
        )
        told = read(out)
        if told["requests"] != params.questions:
            # The key says how many were asked for: no row may stand under another number.
            raise StackError(
                f"lm_eval counted {told['requests']} questions, {params.questions} were asked for "
                f"(exact_match_strict {told['exact_match_strict']:.4g} of those counted)",
                "give the whole data set, or read the log beside it",
            )
        return told

    def row(self, measured: Any) -> Figures:
        """The mean over the repeats."""
        return mean(cell["figures"] for cell in measured)


def command(session: Session, params: Params, out: Path, local: bool) -> list[str]:
    """The command line: greedy completions of the server, no tokenizer of its own."""
    model = [
        f"model={session.server.model}",
        f"base_url={session.server.url}/v1/completions",
        f"num_concurrent={params.concurrency}",
        "tokenized_requests=False",
        "tokenizer_backend=None",
        "max_retries=2",
        "timeout=1800",
    ]
    return [
        *(session.options.get("lm_eval") or "lm_eval", "run", "--model", "local-completions"),
        *("--model_args", ",".join(model)),
        *("--tasks", LOCAL_TASK if local else TASK, "--num_fewshot", str(params.shots)),
        *("--limit", str(params.questions)),
        *("--gen_kwargs", f"temperature={params.temperature},max_gen_toks={params.max_tokens}"),
        *("--output_path", str(out), "--log_samples"),
    ]


def data_files(folder: Path) -> tuple[str, dict[str, str]]:
    """The format of a local GSM8K and its files: ``train.jsonl`` and ``test.jsonl``, or parquet.

    Raises:
        StackError: The folder has neither.
    """
    lines = {split: folder / f"{split}.jsonl" for split in ("train", "test")}
    if all(path.is_file() for path in lines.values()):
        return "json", {split: str(path.resolve()) for split, path in lines.items()}
    for place in (folder / "main", folder):
        tables = {split: sorted(place.glob(f"{split}-*.parquet")) for split in ("train", "test")}
        if all(tables.values()):
            return "parquet", {split: str(paths[0].resolve()) for split, paths in tables.items()}
    raise StackError(
        f"--gsm8k: {folder} has neither train.jsonl and test.jsonl nor "
        "[main/]train-*.parquet and [main/]test-*.parquet"
    )


def write_task(path: Path, folder: Path) -> None:
    """lm_eval's own task, with its data taken from a folder. JSON is YAML too."""
    kind, files = data_files(folder)
    task = {
        "group": LOCAL_TASK,
        "task": [
            {
                "task": TASK,
                "dataset_path": kind,
                "dataset_name": None,
                "dataset_kwargs": {"data_files": files},
            }
        ],
    }
    path.write_text(json.dumps(task, indent=2), encoding="utf-8")


def read(out: Path) -> Figures:
    """The figures of what lm_eval wrote under a folder.

    Raises:
        StackError: It wrote nothing, or something else.
    """
    written = sorted(out.rglob("results_*.json"))
    try:
        result = json.loads(written[-1].read_text(encoding="utf-8"))
        values = next(v for name, v in result["results"].items() if name == TASK)
        return {
            "exact_match_flexible": values["exact_match,flexible-extract"],
            "exact_match_strict": values["exact_match,strict-match"],
            "stderr": values["exact_match_stderr,flexible-extract"],
            "requests": result["n-samples"][TASK]["effective"],
        }
    except (OSError, ValueError, KeyError, IndexError, StopIteration) as error:
        raise StackError(
            f"{out}: no result of lm_eval: {type(error).__name__} {error}", "read the log beside it"
        ) from error
