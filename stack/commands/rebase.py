"""``rebase``: carry the series to another release."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stack.rebasing import State, Stop

RUN = "python -m stack rebase"


def add_parser(subparsers: argparse._SubParsersAction, name: str) -> None:
    """Add the command's options."""
    p = subparsers.add_parser(
        name,
        help="carry the series to another release",
        description="Carry the series to another release with git's own rebase, in a work "
        "repository of its own. It stops at a conflict and says what to type. Recorded resolutions "
        "(carried/RELEASE/resolutions) are used where they fit. patches/ and upstream.toml change "
        "with --write alone. Exit status: 0 done, 1 an error, 2 wrong usage, 3 a conflict.",
    )
    action = p.add_mutually_exclusive_group()
    action.add_argument("--onto", metavar="RELEASE", help="start: carry the series to this release")
    action.add_argument(
        "--continue", dest="proceed", action="store_true", help="go on after a conflict, or a kill"
    )
    action.add_argument("--skip", action="store_true", help="drop the patch that it stopped at")
    action.add_argument("--abort", action="store_true", help="throw the work repository away")
    action.add_argument("--status", action="store_true", help="say where it stands")
    p.add_argument(
        "--save",
        nargs="?",
        const="",
        metavar="DIR",
        help="when all is carried, keep series, resolutions and range-diff (default: "
        "carried/RELEASE)",
    )
    p.add_argument(
        "--write",
        action="store_true",
        help="when all is carried, move the pin: patches/, upstream.toml, the submodule's commit",
    )
    p.add_argument(
        "--commit",
        metavar="SHA",
        help="with --write: the release's full commit (default: asked of upstream's repository)",
    )
    p.add_argument(
        "--no-replay", action="store_true", help="with --onto: use no recorded resolution"
    )
    p.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="the work repository (default: .build/rebase)",
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do one step of a rebase; 3 where a conflict waits for a person."""
    from stack import rebasing
    from stack.checkout import Checkout
    from stack.errors import StackError
    from stack.trial import EXIT_CONFLICT

    checkout = Checkout()
    work = (args.work or checkout.root / ".build" / "rebase").absolute()
    if args.save is not None and args.write:
        raise StackError(
            "--save and --write exclude each other", "give one of them, then the other"
        )
    if args.commit and not args.write:
        raise StackError("--commit goes with --write", "leave it out")
    if args.no_replay and not args.onto:
        raise StackError("--no-replay goes with --onto", "leave it out")
    if args.abort or args.status:
        if args.save is not None or args.write:
            raise StackError("--save and --write need a finished rebase", "leave them out")
        return _abort(work) if args.abort else _status(work)
    step = _step(args, checkout, work)
    if step is None and args.save is None and not args.write:
        raise StackError(
            "nothing to do",
            "give one of --onto RELEASE, --continue, --skip, --abort, --status, --save, --write",
        )
    with rebasing.locked(work):
        stop = step() if step else None
        if stop is not None:
            _show_stop(work, stop)
            return EXIT_CONFLICT
        if args.write:
            _write(args, checkout, work)
        elif args.save is not None:
            _save(args, checkout, work)
        else:
            _show_done(work)
    return 0


def _step(args: argparse.Namespace, checkout, work: Path) -> Callable[[], Stop | None] | None:
    from stack import carried, download, rebasing, release_index

    if args.onto:
        known = {*download.releases(), checkout.pin.version}
        release_index.require(checkout.pin.project, args.onto, known=known)
        recorded = carried.folder_of(args.onto, checkout.root) / carried.RESOLUTIONS
        return lambda: rebasing.start(
            work, args.onto, checkout=checkout, recorded=None if args.no_replay else recorded
        )
    if args.proceed:
        return lambda: rebasing.proceed(work)
    if args.skip:
        return lambda: rebasing.skip(work)
    return None


def _work_option(work: Path) -> str:
    from stack.checkout import Checkout

    return "" if work == Checkout().root / ".build" / "rebase" else f" --work {work}"


def _show_stop(work: Path, stop: Stop) -> None:
    from stack.rebasing import shown_path

    place, option = shown_path(work), _work_option(work)
    print(f"[{stop.number}/{stop.total}] patches/{stop.patch}: conflict")
    if stop.reason:
        print(f"  {stop.reason}")
    for conflict in stop.conflicts:
        print(f"  {conflict}")
    print("Settle it, then:")
    for conflict in stop.conflicts:
        if conflict.reason == "deleted upstream":
            print(f"  git -C {place} rm {conflict.path}    # its change goes to another file")
        else:
            print(f"  edit {place}/{conflict.path}")
            print(f"  git -C {place} add {conflict.path}")
    if not stop.conflicts:
        print(f"  git -C {place} status")
    print("  # Where the change belongs to another file by now, edit and add that one too.")
    print(f"  {RUN} --continue{option}")
    print("or, where upstream has the change:")
    print(f"  {RUN} --skip{option}")
    print("or, to give up:")
    print(f"  {RUN} --abort{option}")


def _show_done(work: Path) -> None:
    from stack import rebase_report, rebase_save, rebasing

    state, carried = rebasing.result(work)
    learned = rebase_save.learn(work, carried)
    statuses = rebase_report.table(work, state, carried, learned)
    _show_table(state, statuses)
    place, option = rebasing.shown_path(work), _work_option(work)
    print(f"The carried series is branch {rebasing.BRANCH} in {place}. Next:")
    print(f"  git -C {place} log -p release-{state.onto}..{rebasing.BRANCH}    # look at it")
    print(f"  {RUN} --save{option}     # keep it in carried/{state.onto}")
    print(f"  {RUN} --write{option}    # or move the pin to {state.onto}")
    print(f"  {RUN} --abort{option}    # or throw it away")


def _show_table(state: State, statuses: dict[str, str]) -> None:
    from stack.rebase_report import counts

    print(f"vLLM {state.origin} -> {state.onto}, {len(statuses)} patches: {counts(statuses)}")
    width = max((len(patch) for patch in statuses), default=0)
    for patch, word in statuses.items():
        print(f"  {patch:<{width}}  {word}")


def _save(args: argparse.Namespace, checkout, work: Path) -> None:
    from stack import carried, rebase_save, rebasing

    state, _ = rebasing.result(work)
    folder = (
        Path(args.save).absolute() if args.save else carried.folder_of(state.onto, checkout.root)
    )
    saved = rebase_save.save(work, folder, checkout=checkout)
    _show_table(state, saved.statuses)
    rerere = len({name.partition("/")[0] for name in saved.learned.rerere})
    print(
        f"{rebasing.shown_path(saved.folder)}: series, report, {rerere} rerere records, "
        f"{len(saved.learned.amendments)} amendments"
    )


def _write(args: argparse.Namespace, checkout, work: Path) -> None:
    from stack import rebasing, repin

    state, _ = rebasing.result(work)
    moved = repin.move(work, checkout=checkout, commit=args.commit)
    _show_table(state, moved.statuses)
    print(f"upstream.toml and patches/ are on {state.onto}. Next:")
    for line in moved.todo:
        print(f"  {line}")


def _abort(work: Path) -> int:
    from stack import rebasing

    with rebasing.locked(work):
        state = rebasing.abort(work)
    onto = f" onto {state.onto}" if state.onto else ""
    print(f"The rebase{onto} is thrown away; patches/, upstream.toml and vllm/ are as they were.")
    return 0


def _status(work: Path) -> int:
    from stack import rebasing
    from stack.trial import EXIT_CONFLICT

    state, stop = rebasing.status(work)
    if stop is not None:
        _show_stop(work, stop)
        return EXIT_CONFLICT
    if rebasing.in_progress(work):
        print(f"A rebase onto {state.onto} was interrupted; type `{RUN} --continue`.")
        return EXIT_CONFLICT
    _show_done(work)
    return 0
