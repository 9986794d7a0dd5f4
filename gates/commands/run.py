"""``run``: measure the gates on a server and write the report."""

from __future__ import annotations

import argparse
import asyncio
import os
import uuid
from pathlib import Path
from typing import Any

from gates.commands import options
from stack.errors import StackError

TEXT = """Measure the gates on an OpenAI-compatible server. Every row is on disk the moment it is
measured. A command after -- is started as the server, and stopped at the end. An API key is taken
from OPENAI_API_KEY and kept nowhere."""
URL = "http://127.0.0.1:8000"
NOT_PASSED = 3


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str) -> None:
    """Add the command's parser."""
    p = subparsers.add_parser(name, help="measure the gates on a server", description=TEXT)
    options.add_selection(p)
    p.add_argument("--url", default=URL, help=f"the server, with or without /v1 (default: {URL})")
    p.add_argument("--model", help="its model (default: the first it lists)")
    p.add_argument("--variant", default="", help="a label for the tables, such as MTP=2")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="where the run is kept")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_argument(
        "--made-weights",
        action="store_true",
        help="the model's weights are made up: what it says is measured and not judged",
    )
    p.add_argument("--dry-run", action="store_true", help="print the plan and send nothing")
    p.add_argument(
        "--ready-within",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="how long the started server may take (default: 3600)",
    )
    p.add_argument(
        "--python",
        metavar="PROGRAM",
        help="the Python that serves, for the receipt (default: that of the started program)",
    )
    options.add_data(p)
    p.add_argument("serve", nargs="*", metavar="-- COMMAND", help="start this as the server")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it; 3 where a gate failed or was not run."""
    from gates.plan import plan

    profile = options.selected_profile(args)
    gates = options.selected_gates(args)
    if args.dry_run:
        from gates.commands.plan import show

        show(plan(gates, args.size, profile, None, options.data(args)))
        return 0
    if args.out is None:
        raise StackError("--out: name a folder for the run", "for example --out runs/first")
    if args.resume and not (args.out / "run.json").exists():
        raise StackError(f"--resume: {args.out} holds no run", "leave --resume out to begin one")
    return asyncio.run(_measure(args, gates, profile))


async def _measure(args: argparse.Namespace, gates: list, profile: Any) -> int:
    from gates import client, redaction, server
    from gates.commands import resume
    from gates.doctor import examination
    from gates.launch import launched
    from gates.plan import plan
    from gates.progress import Display

    # Also what only the report needs: better now than after hours.
    from gates.report import html, markdown, plots, receipt  # noqa: F401
    from gates.results import results
    from gates.runner import Runner
    from gates.store import RunFolder, now

    url = client.bare(args.url)
    http = client.http(url, os.environ.get("OPENAI_API_KEY"))
    display = Display()
    for line in examination.findings(profile, args.serve, args.python, args.made_weights):
        display.say(line)
    args.out.mkdir(parents=True, exist_ok=True)
    async with (
        http,
        launched(
            args.serve, http, args.out / "logs" / "server.log", args.ready_within, display.say
        ) as start,
    ):
        target = await server.probe(http, url, args.model)
        given = options.data(args) | {"start": start}
        if start and not given["server_log"]:
            given["server_log"] = start["log"]
        phases = plan(gates, args.size, profile, target, given)
        about = {
            "seed": uuid.uuid4().hex,
            "started": now(),
            "size": args.size,
            "variant": args.variant,
            "made_weights": args.made_weights,
            "profile": profile.model_dump(),
            "server": target.record(),
            "serve": redaction.command(args.serve),
            "options": recorded(given, args.out),
            "machine": receipt.machine(args.python or (start or {}).get("python")),
            "gates": [phase.gate.model_dump() for phase in phases],
            "order": {phase.gate.name: [row[0].key for row in phase.rows] for phase in phases},
        }
        if args.resume:
            folder = resume.opened(args.out, about)
        else:
            folder = RunFolder.create(args.out, about)
        try:
            with display:
                await Runner(http, target, folder, phases, profile, given, display).run()
        finally:
            # An interrupted run has its report too.
            markdown.written(folder)
            receipt.written(folder)
            html.written(folder)
            folder.close()
    ended = results(folder)
    for result in ended:
        why = f": {result.why[0]}" if result.why else ""
        display.say(f"{result.status:8} {result.gate.title}{why}")
    display.say(f"report: {args.out / 'report.md'}, {args.out / 'report.html'}")
    return 0 if all(result.status == "passed" for result in ended) else NOT_PASSED


def recorded(given: dict[str, Any], out: Path) -> dict[str, Any]:
    """The options as the run keeps them; the log in its own folder as seen from there."""
    options = {key: value for key, value in given.items() if key != "start"}
    log = options["server_log"]
    if log and Path(log).is_relative_to(out):
        options["server_log"] = str(Path(log).relative_to(out))
    return options
