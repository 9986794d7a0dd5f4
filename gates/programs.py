"""Run another program of the field (`vllm bench serve`, `lm_eval`) as a phase's measurement."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from stack.errors import StackError

TAIL_LINES = 4
STOP_S = 10.0
# Where nobody reaps orphans, the dead ones of a group stay for ever.
OTHERS_S = 5.0
POLL_S = 0.05


def found(program: str) -> bool:
    """Whether a program is on the path, or is a path of one."""
    return shutil.which(program) is not None


async def run(
    command: Sequence[str],
    log: Path,
    within_s: float,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a program with its output in a log; what ends the wait ends it and its children.

    Args:
        command: The program and its arguments; no shell reads them.
        log: Its output goes here.
        within_s: When to give up, in seconds.
        env: Variables to add.

    Raises:
        StackError: It is missing, failed or took too long; the last lines of its output are said.
    """
    with log.open("wb") as output:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                env=dict(os.environ) | dict(env or {}),
                start_new_session=True,
            )
        except OSError as error:
            raise StackError(f"{command[0]} did not start: {error}") from error
        try:
            await asyncio.wait_for(process.wait(), within_s)
        except asyncio.TimeoutError as error:
            raise StackError(
                f"{command[0]} took longer than {within_s:g} s: {tail(log)}", f"read {log}"
            ) from error
        finally:
            await stop(process, STOP_S)
    if process.returncode:
        raise StackError(
            f"{command[0]} ended with status {process.returncode}: {tail(log)}", f"read {log}"
        )


async def stop(process: asyncio.subprocess.Process, within_s: float) -> None:
    """End a process that leads its group, and all of the group: asked first, then made to."""
    if process.returncode is not None:
        return
    for how in (signal.SIGTERM, signal.SIGKILL):
        _signal(process.pid, how)
        if await _gone(process, within_s):
            return


async def _gone(process: asyncio.subprocess.Process, within_s: float) -> bool:
    """Wait until the process has ended, and then a little for the others of its group."""
    loop = asyncio.get_running_loop()
    end, ended = loop.time() + within_s, 0.0
    while loop.time() < end:
        if process.returncode is not None:
            ended = ended or loop.time()
            end = min(end, ended + OTHERS_S)
            if not _signal(process.pid, 0):
                return True
        await asyncio.sleep(POLL_S)
    return False


def _signal(group: int, how: int) -> bool:
    """Send a signal to a process group (0: none); whether the group is there."""
    try:
        os.killpg(group, how)
    except ProcessLookupError:
        return False
    return True


def tail(log: Path) -> str:
    """The last lines of a log, in one."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    telling = [line.strip() for line in lines if line.strip()]
    return " / ".join(telling[-TAIL_LINES:]) or "no output"
