"""``python -m tests.checkpoint --size small FOLDER``: make a checkpoint."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.checkpoint.digest import digest
from tests.checkpoint.sizes import SIZES, config_of
from tests.checkpoint.writer import SHARD_BYTES, write_checkpoint


def main(argv: list[str] | None = None) -> int:
    """Write a checkpoint and print its digest."""
    parser = argparse.ArgumentParser(prog="python -m tests.checkpoint", description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--layers",
        metavar="R,R,…",
        help="compression ratio of each layer: 0 (window only), 4 or 128",
    )
    parser.add_argument(
        "--set",
        dest="fields",
        metavar="FIELD=N",
        action="append",
        default=[],
        help="an integer field of config.json, such as vocab_size=4096; may be repeated",
    )
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="most bytes in a file")
    parser.add_argument(
        "--device", default="cpu", help="where weights are drawn: cuda is faster and draws others"
    )
    args = parser.parse_args(argv)
    try:
        changes = _changes(args.fields)
        if args.layers is not None:
            changes["compress_ratios"] = tuple(int(r) for r in args.layers.split(","))
        config = config_of(args.size, changes)
        began = time.perf_counter()
        total = write_checkpoint(
            args.folder,
            config,
            seed=args.seed,
            shard_bytes=args.shard_bytes,
            device=args.device,
        )
    except (ValueError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - began
    print(f"{args.folder}: {total / 1e6:.1f} MB of tensors in {seconds:.1f} s")
    print(f"digest {digest(args.folder)}")
    return 0


def _changes(fields: list[str]) -> dict[str, object]:
    changes: dict[str, object] = {}
    for field in fields:
        name, equals, value = field.partition("=")
        if not equals or not value.isdecimal():
            raise ValueError(f"--set {field}: allowed: FIELD=N with a whole number")
        changes[name] = int(value)
    return changes


if __name__ == "__main__":
    sys.exit(main())
