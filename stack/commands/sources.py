"""``sources``: where the pinned release comes from, and what its two sources share."""

from __future__ import annotations

import argparse

from stack.checkout import Checkout

# Tracked files that only the submodule has; a line each would bury the rest.
SHOWN = 10


def add_parser(subparsers: argparse._SubParsersAction, name: str) -> None:
    """Add the command's options."""
    p = subparsers.add_parser(
        name,
        help="show the source in use and the files that submodule and sdist share",
        description="Show which source of the pinned release is in use, how many files the "
        "submodule and the sdist share, and which are left out, and why. Sources that are at hand "
        "are compared with the list, file by file; a difference gives exit status 1.",
    )
    group = p.add_mutually_exclusive_group()
    group.add_argument(
        "--compare", action="store_true", help="demand both sources (the sdist is downloaded)"
    )
    group.add_argument("--write", action="store_true", help="make the list anew from the sdist")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show, compare or write."""
    from stack import comparing, sdist, shared, source

    checkout = Checkout()
    pin = checkout.pin
    if args.write:
        text = shared.render(sdist.contents(source.pinned_sdist(checkout)), pin.version)
        shared.write(checkout.shared_files, text)
        print(f"written: {checkout.shared_files.relative_to(checkout.root)}")
    if args.compare:
        comparing.demand_submodule(checkout)
    used = source.find(checkout)
    where = pin.commit if used.kind == "submodule" else f"sha256 {pin.sdist.sha256}"
    print(f"source in use: {used.kind} {used.where.name} ({where})")
    listed = shared.load(checkout.shared_files)
    print(f"shared files: {len(listed.files)}")
    print(f"files of the sdist that are left out: {len(listed.excluded)}")
    print("\n".join(comparing.by_reason(listed.excluded)))

    fetch = source.pinned_sdist if args.compare else comparing.cached_sdist
    found = comparing.compare(checkout, fetch(checkout), used.kind == "submodule")
    if "submodule" in found.compared:
        print(f"files that the submodule alone has: {len(found.submodule_only)}")
        for line in comparing.report(found.submodule_only, 0 if args.compare else SHOWN):
            print(f"    {line}")
    for missing in {"submodule": "not checked out", "sdist": "not in the cache"}.items():
        if missing[0] not in found.compared:
            print(f"{missing[0]}: {missing[1]}, not compared")
    for line in found.differences:
        print(f"DIFFERENT  {line}")
    if found.differences:
        print(f"{len(found.differences)} differences from {checkout.shared_files.name}")
        return 1
    if found.compared:
        print(f"no difference: every listed file is the same in: {', '.join(found.compared)}")
    return 0
