"""What the doctor has against this machine, in short, for a run that is about to begin."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from gates.doctor.advice import advise
from gates.doctor.facts import Facts, gather
from gates.spec import Profile

UTILIZATION = 0.9


def findings(
    profile: Profile, serve: Sequence[str], python: str | None, made_weights: bool
) -> list[str]:
    """A line for each finding that stops or warns; the run goes on all the same.

    Args:
        profile: The hardware that the run names.
        serve: The command that starts the server; empty where one runs already.
        python: The Python that serves, as ``--python`` names it.
        made_weights: The checkpoint's size is not the published one's.
    """
    facts = gather(python or _beside(serve), try_sampler=False)
    if not serve and not facts.gpus:
        return []  # the server is elsewhere
    if not serve or made_weights:
        _forget_memory(facts)
    flags = {one.flag: one.value for one in profile.flags}
    said = advise(
        facts,
        profile,
        max(1, int(float(_value(serve, "--max-model-len") or profile.max_model_len))),
        float(
            _value(serve, "--gpu-memory-utilization")
            or flags.get("--gpu-memory-utilization")
            or UTILIZATION
        ),
    )
    return [
        f"doctor: {one.level}: {one.what}: {one.why}" + (f" -> {one.do}" if one.do else "")
        for one in said
        if one.level != "fine"
    ]


def _forget_memory(facts: Facts) -> None:
    """A server that runs has taken its memory, and made weights are of another size."""
    for gpu in facts.gpus:
        gpu["memory_bytes"] = gpu["free_bytes"] = None


def _beside(serve: Sequence[str]) -> str | None:
    """The Python of the environment whose program the command starts, or None."""
    program = shutil.which(serve[0]) if serve else None
    if program is None:
        return None
    if Path(program).name.startswith("python"):
        return program
    python = Path(program).with_name("python")
    # Beside `docker` or `bash` stands the system's, which serves nothing.
    return str(python) if (python.parent.parent / "pyvenv.cfg").exists() else None


def _value(serve: Sequence[str], flag: str) -> str | None:
    """A flag's number in a command, if it is a plain one (``131072``; vLLM also takes ``128k``)."""
    for place, argument in enumerate(serve):
        name, _, inline = argument.partition("=")
        if name == flag:
            value = inline or (serve[place + 1] if place + 1 < len(serve) else "")
            return value if value.replace(".", "", 1).isdigit() else None
    return None
