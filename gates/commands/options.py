"""Options that several commands share, and what they name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from stack.errors import StackError

if TYPE_CHECKING:
    from gates.spec import Gate, Profile


def add_selection(p: argparse.ArgumentParser) -> None:
    """Which gates, in which size, for which hardware."""
    p.add_argument(
        "--profile",
        required=True,
        metavar="NAME",
        help="the hardware: a name in gates/profiles/, or a path of such a file",
    )
    p.add_argument(
        "--size",
        choices=("full", "short"),
        default="full",
        help="full: figures to publish; short: does it all work (default: full)",
    )
    p.add_argument("--gate", action="append", metavar="NAME", help="this gate alone; repeatable")
    p.add_argument(
        "--gates",
        type=Path,
        metavar="FOLDER",
        help="gate files of your own in place of gates/files/",
    )
    p.add_argument("--repeats", type=int, metavar="N", help="repeats of every row")


def add_data(p: argparse.ArgumentParser) -> None:
    """Where data and programs are that the suite does not hold."""
    p.add_argument("--tokenizer", metavar="PATH", help="for vllm bench and lm_eval: a local folder")
    p.add_argument(
        "--mt-bench", type=Path, metavar="FOLDER", help="philschmid/mt-bench as a local data set"
    )
    p.add_argument("--gsm8k", type=Path, metavar="FOLDER", help="GSM8K as a local data set")
    p.add_argument("--vllm", default="vllm", metavar="PROGRAM", help="the vllm program")
    p.add_argument("--lm-eval", default="lm_eval", metavar="PROGRAM", help="the lm_eval program")
    p.add_argument(
        "--reference", type=Path, metavar="FILE", help="log-probabilities to compare with"
    )
    p.add_argument(
        "--write-reference",
        type=Path,
        metavar="FILE",
        help="write this server's log-probabilities here, to compare another one with",
    )
    p.add_argument("--server-log", type=Path, metavar="FILE", help="the log of a running server")


def data(args: argparse.Namespace) -> dict[str, object]:
    """What `add_data` took, as workloads read it."""
    names = "tokenizer mt_bench gsm8k vllm lm_eval reference write_reference server_log"
    found = {name: getattr(args, name) for name in names.split()}
    return {key: str(v) if isinstance(v, Path) else v for key, v in found.items()}


def selected_gates(args: argparse.Namespace) -> list[Gate]:
    """The gates that the command line asks for.

    Raises:
        StackError: One is not there, or a file is wrong.
    """
    from gates.spec import load_gates

    gates = load_gates(args.gates) if args.gates else load_gates()
    unknown = sorted(set(args.gate or ()) - gates.keys())
    if unknown:
        raise StackError(
            f"--gate: there is no gate {', '.join(unknown)}", f"there are: {', '.join(gates)}"
        )
    if args.repeats is not None and not 1 <= args.repeats <= 100:
        raise StackError(f"--repeats: must be 1 to 100, not {args.repeats}")
    chosen = [gate for name, gate in gates.items() if not args.gate or name in args.gate]
    if args.repeats:
        chosen = [
            gate.model_copy(
                update={
                    "repeats": args.repeats,
                    "short": {**gate.short, "repeats": args.repeats} if gate.short else {},
                }
            )
            for gate in chosen
        ]
    return chosen


def selected_profile(args: argparse.Namespace) -> Profile:
    """The hardware profile that the command line names.

    Raises:
        StackError: It is not there, or its file is wrong.
    """
    from gates import toml
    from gates.spec import Profile, load_profiles

    path = Path(args.profile)
    if path.suffix == ".toml":
        return toml.check(Profile, toml.read(path), str(path))
    profiles = load_profiles()
    if args.profile not in profiles:
        raise StackError(
            f"--profile: there is no profile {args.profile}", f"there are: {', '.join(profiles)}"
        )
    return profiles[args.profile]
