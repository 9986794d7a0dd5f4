"""``doctor``: what of this machine will matter, and the flags that follow."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

TEXT = """Look at this machine before a run: GPU and capability, driver, NCCL and peer-to-peer, free
memory and the KV cache that it allows, nvcc, FlashInfer's sampler. Exits with 1 where something
stops a run."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str) -> None:
    """Add the command's parser."""
    p = subparsers.add_parser(name, help="what of this machine will matter", description=TEXT)
    p.add_argument("--profile", metavar="NAME", help="the hardware (default: by the GPUs seen)")
    p.add_argument(
        "--python",
        default=sys.executable,
        metavar="PROGRAM",
        help="the Python that serves, where torch and vLLM are (default: this one)",
    )
    p.add_argument("--context", type=int, default=131072, metavar="TOKENS", help="of one request")
    p.add_argument("--utilization", type=float, default=0.9, metavar="SHARE")
    p.add_argument("--weights-gb", type=float, metavar="GB", help="the checkpoint's size")
    p.add_argument(
        "--try-sampler",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="try FlashInfer's sampler for real where there is a CUDA GPU; the first time it may "
        "compile for minutes (default: yes)",
    )
    p.add_argument(
        "--sampler-within",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="when trying the sampler is given up (default: 600)",
    )
    p.add_argument("--json", action="store_true", help="print data instead of text")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look, and say."""
    from gates.commands import options
    from gates.doctor.advice import WEIGHTS_GB, advise, recommended
    from gates.doctor.facts import gather
    from gates.spec import load_profiles
    from stack.errors import StackError

    if not 0 < args.utilization <= 1:
        raise StackError(f"--utilization: must be above 0 and at most 1, not {args.utilization:g}")
    if args.context < 1:
        raise StackError(f"--context: must be 1 or more, not {args.context}")
    facts = gather(args.python, args.try_sampler, args.sampler_within)
    profile = (
        options.selected_profile(args)
        if args.profile
        else matching(list(load_profiles().values()), facts.gpus)
    )
    weights = WEIGHTS_GB if args.weights_gb is None else args.weights_gb
    findings = advise(facts, profile, args.context, args.utilization, weights)
    flags = recommended(profile, findings) if profile else []
    if args.json:
        told = {
            "facts": facts.record(),
            "profile": profile.name if profile else None,
            "findings": [vars(one) for one in findings],
            "recommended": [{"do": do, "why": why} for do, why in flags],
        }
        print(json.dumps(told, indent=2))
    else:
        show(facts, profile, findings, flags)
    return 1 if any(one.level == "stop" for one in findings) else 0


def matching(profiles: list[Any], gpus: list[dict[str, Any]]) -> Any:
    """The profile of the GPUs that were seen, or None."""
    fitting = [
        profile
        for profile in profiles
        if gpus and all(profile.hardware.gpu in gpu["name"] for gpu in gpus)
    ]
    exact = [profile for profile in fitting if profile.hardware.count == len(gpus)]
    return next(iter(exact or fitting), None)


def show(facts: Any, profile: Any, findings: list[Any], flags: list[tuple[str, str]]) -> None:
    """Print it for people."""
    packages = ", ".join(f"{name} {number}" for name, number in facts.packages.items())
    print(f"Python {facts.python or 'not found'}: {packages or 'none of the serving packages'}")
    if facts.probe_error:
        print(f"  {facts.probe_error}")
    print(
        f"memory of the system: {facts.memory_bytes / 1e9:.1f} GB, "
        f"{facts.free_memory_bytes / 1e9:.1f} GB available; nvcc: {facts.nvcc or 'none'}"
    )
    for one in findings:
        print(f"{one.level:5} {one.what}\n      {one.why}")
        if one.do:
            print(f"      -> {one.do}")
    if profile:
        print(f"\nrecommended for {profile.title} ({profile.shown}):")
        for do, why in flags:
            print(f"  {do}\n      {why}")
    else:
        print("\nno profile fits these GPUs; name one with --profile for its flags")
