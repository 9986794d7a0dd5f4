"""``--source``: compile everything from the patched tree with the CUDA toolkit of this machine.

Upstream's own build does the work, in an environment made of upstream's build requirements as of
the pin's date. Its CMake fetches CUTLASS and other sources from their own hosts. Tree and
environment stay under ``.build/source`` (CMake's cache names both), so that a build that stopped
goes on with the objects that it has.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from stack import index, locks, wheel
from stack.checkout import Checkout
from stack.errors import StackError
from stack.pin import ROOT, Pin, tomllib
from stack.scratch import scratch
from stack.wheel_assemble import Assembled

FOLDER = ROOT / ".build" / "source"
ARCH_LIST_ENV = "TORCH_CUDA_ARCH_LIST"
# What this wheel is for. Upstream's wheels are compiled for seven families and take many times
# as long; TORCH_CUDA_ARCH_LIST chooses others.
ARCH_LIST = "12.0;12.1"

# What a failed build's log says, and what that means; the first that is found is told.
CAUSES = (
    (
        r"Could not resolve host: (\S+)|unable to access '([^']+)'|Failed to connect to (\S+)",
        "upstream's build could not fetch sources from {0}",
        "a build from source needs upstream's hosts: allow them, or give local copies "
        "(upstream reads VLLM_CUTLASS_SRC_DIR and the like)",
    ),
    (
        r"No space left on device",
        "no space left on the disk",
        "a build takes tens of GB: free some, and run again; it goes on with what it has",
    ),
    (
        r"error: .*(?:Failed to fetch|error sending request|dns error).*",
        "the build's requirements (torch among them) could not be downloaded",
        "check the network and PIP_INDEX_URL, and run again",
    ),
    (
        r"CMake Error at (\S+) \(\w+\):\s+((?:.|\n)+?)(?=\n\n\n|\n--|\nCall Stack|\Z)",
        "CMake stopped at {0}: {1}",
        "see the log",
    ),
    (
        r"(?:Killed|cc1plus.*signal terminated|nvcc error.*died due to signal).*",
        "a compiler was killed, most likely for lack of memory",
        "run again with a smaller --jobs",
    ),
)


def find_toolkit(cuda: str) -> Path:
    """The folder of the CUDA toolkit: ``$CUDA_HOME``, else where nvcc on PATH is, else the usual.

    Args:
        cuda: The release that torch is built with (``13.0``).

    Raises:
        StackError: There is none with compiler and headers, or it is of another release.
    """
    told = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if told:
        places = [Path(told)]
    else:
        on_path = shutil.which("nvcc")
        places = [Path(on_path).resolve().parent.parent] if on_path else []
        places += [Path(f"/usr/local/cuda-{cuda}"), Path("/usr/local/cuda")]
    hint = (
        f"install the CUDA toolkit {cuda} and set CUDA_HOME to it, or leave --source out: "
        "the binaries then come from upstream's wheel"
    )
    needed = ("bin/nvcc", "include/cuda_runtime.h")
    whole = [place for place in places if all((place / name).is_file() for name in needed)]
    if not whole:
        looked = ", ".join(str(place) for place in places)
        raise StackError(f"no CUDA toolkit ({' and '.join(needed)}) in {looked}", hint)
    nvcc = whole[0] / "bin" / "nvcc"
    shown = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"release (\d+\.\d+)", shown.stdout)
    release = match[1] if match else "an unknown release"
    if release != cuda:
        raise StackError(f"{nvcc} is of CUDA {release}, this vLLM's torch is of {cuda}", hint)
    return whole[0]


def check_machine(archs: tuple[str, ...]) -> str:
    """The one architecture that can be compiled here.

    Raises:
        StackError: Another one is asked for, or the compiler or this Python does not fit.
    """
    here = wheel.architectures(platform.machine())[0]
    if archs != (here,):
        raise StackError(
            f"--source compiles for this machine ({here}) alone, not for {' and '.join(archs)}",
            "leave --arch out, or run it on the other machine",
        )
    if shutil.which("g++") is None and "CXX" not in os.environ:
        raise StackError("no C++ compiler", "install one (Debian, Ubuntu: apt-get install g++)")
    return here


def environment(pin: Pin, toolkit: Path, jobs: int | None) -> dict[str, str]:
    """The environment of upstream's build.

    Raises:
        StackError: ``jobs`` is not positive.
    """
    if jobs is not None and jobs < 1:
        raise StackError(f"--jobs is {jobs}, expected 1 or more", "leave it out for all cores")
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "VLLM_USE_PRECOMPILED")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    env.setdefault(ARCH_LIST_ENV, ARCH_LIST)
    return env | {
        "CUDA_HOME": str(toolkit),
        "PATH": f"{toolkit / 'bin'}:{env.get('PATH', os.defpath)}",
        "CUDACXX": str(toolkit / "bin" / "nvcc"),
        "MAX_JOBS": str(jobs or os.cpu_count() or 1),
        "VLLM_TARGET_DEVICE": "cuda",
        # Upstream's setup.py takes it as it is, without the toolkit's suffix.
        "VLLM_VERSION_OVERRIDE": pin.local_version,
        "SETUPTOOLS_SCM_PRETEND_VERSION": pin.local_version,
    }


def explain(log: str) -> tuple[str, str]:
    """What a failed build's log means: a message and what to do.

    Where no known cause is found, the message is the log's last line that speaks of an error.
    """
    for pattern, message, hint in CAUSES:
        match = re.search(pattern, log)
        if match:
            groups = [group for group in match.groups() if group]
            return " ".join(message.format(*groups or [""]).split())[:300], hint
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    # uv's own last lines say only that the build failed.
    telling = [
        line for line in lines if re.search(r"\berror\b", line, re.I) and "cause:" not in line
    ]
    return (telling or lines or ["upstream's build failed without a word"])[-1][:300], "see the log"


def run_logged(command: list[str], env: dict[str, str], log: Path) -> None:
    """Run a step of the build; its output goes to the log's end and, line by line, to stderr.

    Raises:
        StackError: The step failed; the message says why where its output tells.
    """
    output: list[str] = []
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                sys.stderr.write(line)
                output.append(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        message, hint = explain("".join(output))
        raise StackError(f"the build from source failed: {message}", f"{hint} (log: {log})")


def build_python(tree: Path, folder: Path, pin: Pin, env: dict[str, str], log: Path) -> Path:
    """The interpreter of an environment with what the tree's ``pyproject.toml`` builds with.

    Raises:
        StackError: The requirements could not be installed.
    """
    table = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))
    python = folder / "bin" / "python"
    uv = locks.find_uv()
    if not python.exists():
        run_logged(
            [uv, "venv", "-q", "--no-config", "--python", sys.executable, str(folder)], env, log
        )
    run_logged(
        [uv, "pip", "install", "--no-config", "--python", str(python)]
        + ["--default-index", index.index_url(), "--exclude-newer", pin.exclude_newer]
        + table["build-system"]["requires"],
        env,
        log,
    )
    return python


def compile_wheel(tree: Path, out: Path, python: Path, env: dict[str, str], log: Path) -> Path:
    """Run upstream's build on a tree, in the environment of ``python``; give the wheel in ``out``.

    Raises:
        StackError: The build failed, or made no wheel.
    """
    env = env | {"PATH": f"{python.parent}:{env['PATH']}", "VIRTUAL_ENV": str(python.parent.parent)}
    command = [locks.find_uv(), "build", "--wheel", "--no-config", "--no-build-isolation"]
    command += ["--python", str(python), "--out-dir", str(out), str(tree)]
    run_logged(command, env, log)
    made = sorted(out.glob("vllm-*.whl"))
    if len(made) != 1:
        raise StackError("upstream's build ended well, but made no wheel", f"see {log}")
    return made[0]


def build(
    archs: tuple[str, ...],
    out: Path,
    *,
    jobs: int | None = None,
    checkout: Checkout | None = None,
    echo: Callable[[str], None] = wheel.say,
) -> Assembled:
    """Compile the patched tree, add our package and write the receipt.

    Args:
        archs: The architecture of this machine, as a tuple of one.
        out: Where the wheel goes.
        jobs: Parallel compilers; all cores without it.
        checkout: Whose pin, patches and submodule; this checkout without it.
        echo: Called with a line for each step.

    Raises:
        StackError: No toolkit, no compiler, no network, or upstream's build failed.
    """
    checkout = checkout or Checkout()
    pin = checkout.pin
    arch = check_machine(archs)
    env = environment(pin, find_toolkit(pin.cuda), jobs)
    inputs = wheel.read_inputs(checkout, FOLDER / "vllm", echo, compiled=True)
    tree, log = inputs.imported.path, FOLDER / "build.log"
    log.unlink(missing_ok=True)
    python = build_python(tree, FOLDER / "env", pin, env, log)
    echo(f"compiling for {env[ARCH_LIST_ENV]} with CUDA {pin.cuda}, {env['MAX_JOBS']} jobs: hours")
    with scratch(FOLDER, "wheel-") as folder:
        built = compile_wheel(tree, folder, python, env, log)
        binaries = {
            "from": "the patched tree",
            "architecture": arch,
            "nvcc": pin.cuda,
            "cuda_archs": env[ARCH_LIST_ENV],
        }
        made = wheel.finish(inputs, built, pin.local_version, out, binaries)
    echo(f"made {made.path.name} ({made.size / 1e6:.0f} MB), checked against its RECORD")
    return made
