"""``python -m tests.oracle score FOLDER --out RUN.npz`` and ``… compare FIRST.npz SECOND.npz``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.oracle.agreement import (
    Agreement,
    as_json,
    compare,
    fault_share,
    judge,
    judge_share,
    table,
)
from tests.oracle.scores import Scores
from tests.oracle.sequences import FED_TOKENS, PROMPT_LENGTHS, draw_sequences


def main(argv: list[str] | None = None) -> int:
    """Score a checkpoint with the oracle, or compare two stored runs."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description=__doc__)
    commands = parser.add_subparsers(required=True)
    score = commands.add_parser("score", help="log-probabilities by transformers, in float32")
    score.add_argument("folder", type=Path, help="a checkpoint")
    score.add_argument("--out", type=Path, required=True, help="the run, as .npz")
    score.add_argument(
        "--rounded", action="store_true", help="round to the engine's formats: the noise of them"
    )
    score.add_argument("--fault", help="compute with a known fault: a name from faults.py")
    score.add_argument(
        "--prompts",
        type=lambda text: tuple(int(n) for n in text.split(",")),
        default=PROMPT_LENGTHS,
        metavar="N,N,…",
        help="lengths of the prompts (default: %(default)s)",
    )
    score.add_argument(
        "--fed",
        type=int,
        default=FED_TOKENS,
        help="tokens fed one at a time after each prompt (default: %(default)s)",
    )
    score.add_argument("--device", default="cpu", help="where layers run (default: cpu)")
    score.set_defaults(run=_score)
    comparison = commands.add_parser("compare", help="how far a run is from another")
    comparison.add_argument("first", type=Path, help="the exact oracle's run")
    comparison.add_argument("second", type=Path, help="an engine's run")
    comparison.add_argument(
        "--noise", type=Path, help="the rounded oracle's run: fail where SECOND is further away"
    )
    comparison.add_argument(
        "--faults",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="the oracle's runs with known faults: fail where one is in SECOND",
    )
    comparison.add_argument("--out", type=Path, help="write the figures as JSON")
    comparison.set_defaults(run=_compare)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _score(args: argparse.Namespace) -> int:
    from tests.oracle.run import score

    config = json.loads((args.folder / "config.json").read_text(encoding="utf-8"))
    sequences = draw_sequences(config["vocab_size"], args.prompts, args.fed)
    scores = score(
        args.folder, sequences, rounded=args.rounded, fault=args.fault, device=args.device
    )
    scores.save(args.out)
    print(f"{args.out}: {len(scores.tokens)} positions in {scores.facts['seconds']} s")
    return 0


def _compare(args: argparse.Namespace) -> int:
    first, second = Scores.load(args.first), Scores.load(args.second)
    seen = table(first, compare(first, second))
    report: dict[str, object] = {"seen": as_json(seen)}
    noise, rounded, problems = None, None, []
    if args.noise:
        rounded = Scores.load(args.noise)
        noise = table(first, compare(first, rounded))
        problems = judge(seen, noise)
        report["noise"] = as_json(noise)
    _print(seen, noise)
    shares = {}
    for path in args.faults:
        faulty = Scores.load(path)
        share, error = fault_share(first, faulty, second, rounded)
        shares[str(faulty.facts["fault"])] = {"share": share, "error": error}
        verdict = judge_share(share, error)
        print(f"share of {faulty.facts['fault']}: {share:.3f} +- {error:.3f}, {verdict}")
        if verdict == "present":
            problems.append(f"{faulty.facts['fault']}: share {share:.3f} +- {error:.3f}")
    report |= {"fault_shares": shares, "problems": problems}
    for problem in problems:
        print(f"problem: {problem}")
    if args.out:
        report["runs"] = {"first": first.facts, "second": second.facts}
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if problems else 0


def _print(seen: dict[str, Agreement], noise: dict[str, Agreement] | None) -> None:
    print(f"{'':17} positions   mean KL median KL  largest KL  same top  covered")
    for name, one in seen.items():
        _row(name, one)
        if noise:
            _row("  formats alone", noise[name])


def _row(title: str, one: Agreement) -> None:
    print(
        f"{title:17} {one.positions:9} {one.mean_kl:9.2e} {one.median_kl:9.2e}"
        f" {one.largest_kl:11.2e} {one.same_top:9.4f} {one.covered:8.4f}"
    )


if __name__ == "__main__":
    sys.exit(main())
