"""Run groups of test files, each in a process of its own that begins with modules imported.

A program for the environment that is tested; it needs nothing of this repository. One process
imports the modules, and a process for each group is forked from that one. What a group does to its
process, no other sees.

    python prepared.py < work.json

reads ``{"imports": [MODULE, …], "workers": HOW MANY AT ONCE, "groups": [{"arguments": [those of
pytest], "output": FILE}, …]}``. It prints a line of JSON for each group as it ends: ``{"group": its
place, "status": as multiprocessing gives it, "seconds": …}``.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import wait
from typing import IO


def run_group(arguments: list[str], output: str, report: IO[str]) -> None:
    """Do as ``python -m pytest ARGUMENTS`` in this folder, with what it prints in a file."""
    report.close()
    said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, standard in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(source, standard)
    sys.path.insert(0, os.getcwd())
    sys.argv = ["pytest", *arguments]

    import pytest

    sys.exit(pytest.main(arguments))


def main() -> None:
    """Run the groups that standard input names."""
    work = json.load(sys.stdin)
    # What is imported may print, too.
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in work["imports"]:
        importlib.import_module(name)
    # Upstream's fixtures collect garbage after every test. What is imported is none, and to look
    # through it takes longer than most tests. vLLM's clean-up would thaw it again.
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None
    context = multiprocessing.get_context("fork")
    waiting = list(enumerate(work["groups"]))
    running = {}
    while waiting or running:
        while waiting and len(running) < work["workers"]:
            place, group = waiting.pop(0)
            process = context.Process(target=run_group, kwargs={**group, "report": report})
            process.start()
            running[process.sentinel] = (place, process, time.monotonic())
        for sentinel in wait(list(running)):
            place, process, began = running.pop(sentinel)
            process.join()
            seconds = time.monotonic() - began
            ended = {"group": place, "status": process.exitcode, "seconds": seconds}
            print(json.dumps(ended), file=report, flush=True)


if __name__ == "__main__":
    main()
