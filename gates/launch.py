"""Start the server of a run, wait until it answers, and stop it at the end."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from gates import server
from gates.programs import stop, tail
from stack.errors import StackError

POLL_S = 0.25
STOP_S = 30.0


@asynccontextmanager
async def launched(
    command: Sequence[str],
    http: httpx.AsyncClient,
    log: Path,
    within_s: float,
    say: Callable[[str], None],
) -> AsyncIterator[dict[str, Any] | None]:
    """The server of a command while the block runs: how long its start took, its log, its Python.

    Gives None where the command is empty. Whatever ends the block, the server and its children
    are ended.

    Raises:
        StackError: Something answers there already, the program is missing, it ended, or it was
            not ready in time; the last lines of its log are in the message.
    """
    if not command:
        yield None
        return
    if await server.healthy(http):
        raise StackError(
            f"a server answers at {http.base_url} already", "stop it, or leave the command out"
        )
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"starting {command[0]}; its log: {log}")
    with log.open("ab") as output:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise StackError(f"{command[0]} did not start: {error}", "check the command") from error
    try:
        while not await server.healthy(http):
            if process.returncode is not None:
                raise StackError(
                    f"the server ended with status {process.returncode}: {tail(log)}",
                    f"read {log}",
                )
            if loop.time() - began > within_s:
                raise StackError(f"no server after {within_s:g} s: {tail(log)}", f"read {log}")
            await asyncio.sleep(POLL_S)
        ready = loop.time() - began
        say(f"the server answers after {ready:.1f} s")
        yield {
            "ready_s": round(ready, 3),
            "log": str(log),
            "command": list(command),
            "python": python_of(process.pid),
        }
    finally:
        await stop(process, STOP_S)


def python_of(pid: int) -> str | None:
    """The Python that a process runs on, or else the first of its children that runs on one.

    The process is asked and not its program's file, which may be a shell's script or ``env``. It
    is the path that was started: what it links to may lack the packages of its environment. None
    where there is no Python, as with a container, or nobody may look.
    """
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            name = (one.cmdline() or [""])[0]
            if re.fullmatch(r"python[\d.]*", Path(name).name):
                searched = one.environ().get("PATH")
                return shutil.which(
                    str(Path(one.cwd(), name)) if "/" in name else name, path=searched
                )
    except (psutil.Error, OSError):
        pass
    return None
