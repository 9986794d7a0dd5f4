"""Lay upstream's tests out beside no source of vLLM, and run them against an installed wheel."""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from stack.errors import StackError
from stack.git import git
from stack.pin import load_pin
from stack.source import base_commit
from tests.rings.outcomes import FAILED, PASSED, SKIPPED, Outcome, read

HERE = Path(__file__).parent
# A revision that no hub has: nothing can take these configurations for the real repositories.
REVISION = "0" * 40
# Seconds after which a test is given up. Some start vLLM anew in child processes, and on a busy
# machine a limit of 300 has been too low.
TEST_LIMIT = 900
# What upstream's tests/conftest.py imports, which takes longer than most test files.
IMPORTED = (
    "PIL.Image",
    "torch._inductor.utils",
    "transformers.models.auto.auto_factory",
    "vllm.assets.audio",
    "vllm.assets.image",
    "vllm.assets.video",
    "vllm.connections",
    "vllm.distributed",
    "vllm.entrypoints.llm",
    "vllm.multimodal.media",
    "vllm.multimodal.utils",
    "vllm.sampling_params",
)
# pytest's own exit statuses: all passed, some failed, interrupted by a collection error, none.
PYTEST_ENDS = (0, 1, 2, 5)


def lay_out(folder: Path) -> Path:
    """Write the pinned release's ``tests/`` and pytest settings into ``folder`` and return it.

    The package ``vllm`` is not among them, so that ``import vllm`` takes the installed wheel. What
    an earlier run laid out is kept where the release and ``hub/`` are the same, so that two runs
    can use it at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        repo = folder / "release.git"
        if not (repo / "HEAD").exists():
            repo.mkdir(exist_ok=True)
            git("init", "-q", "--bare", "--template=", cwd=repo)
        commit = base_commit(repo)
        configs = sorted((HERE / "hub").glob("*.json"))
        wanted = "\n".join([commit, *(f"{path.stem} {path.read_text()}" for path in configs)])
        stamp = folder / "laid-out"
        if stamp.exists() and stamp.read_text() == wanted:
            return folder
        stamp.unlink(missing_ok=True)
        shutil.rmtree(folder / "tests", ignore_errors=True)
        archive = git("archive", "--format=tar", commit, "tests", "pyproject.toml", cwd=repo)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None:
                    path = folder / member.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content.read())
        _lay_out_hub(folder / "hub", configs)
        stamp.write_text(wanted)
    return folder


def _lay_out_hub(folder: Path, configs: Sequence[Path]) -> None:
    """Write configurations as a model hub's cache: no weights, no tokenizers."""
    shutil.rmtree(folder, ignore_errors=True)
    for config in configs:
        repo = folder / "hub" / f"models--{config.stem}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(REVISION)
        snapshot = repo / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        shutil.copyfile(config, snapshot / "config.json")


def environment(folder: Path) -> dict[str, str]:
    """The variables under which upstream's tests give the same outcomes on every machine.

    No hub is asked and no cache of the user is read; the CPU platform is set; what would change
    vLLM's behaviour from outside is dropped.
    """
    dropped = ("VLLM_", "SM12X_", "HF_", "TRANSFORMERS_", "TRITON_", "PYTEST_", "TORCH")
    env = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return env | {
        "CUDA_VISIBLE_DEVICES": "",
        "DO_NOT_TRACK": "1",
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(HERE / "platform"),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_CONFIG_ROOT": str(folder / "config"),
        "VLLM_NO_USAGE_STATS": "1",
    }


def run(
    python: Path, folder: Path, groups: Sequence[Sequence[str]], workers: int = 1
) -> dict[str, Outcome]:
    """Run upstream's test files and return the outcome of every node.

    Args:
        python: The interpreter of an environment with a vLLM wheel and tests/requirements.txt.
        folder: What ``lay_out`` returned.
        groups: Paths such as ``tests/v1/core/test_prefix_caching.py``, or node ids in such a file;
            a group shares a process. Files that are compared run alone: a crash then loses one
            file's outcomes, and no file's outcomes hang on which others run.
        workers: How many groups run at once.

    Raises:
        StackError: A file is not in the release, pytest wrote no outcome of a group, or the
            process that starts the others ended early; the message says where its words are.
    """
    for entry in itertools.chain.from_iterable(groups):
        file = entry.partition("::")[0]
        if not (folder / file).is_file():
            raise StackError(f"{file} is not in vLLM {load_pin().version}", "mend map.toml")
    logs = [_log(folder, group) for group in groups]
    work = {
        "imports": IMPORTED,
        "workers": workers,
        "groups": [
            {"arguments": _arguments(group, log), "output": str(log.with_suffix(".txt"))}
            for group, log in zip(groups, logs, strict=True)
        ],
    }
    outcomes: dict[str, Outcome] = {}
    given, said = (folder / "logs" / f"prepared.{ending}" for ending in ("json", "txt"))
    given.parent.mkdir(exist_ok=True)
    given.write_text(json.dumps(work), encoding="utf-8")
    left = len(groups)
    with (
        given.open("rb") as asked,
        said.open("wb") as errors,
        subprocess.Popen(
            [str(python), str(HERE / "prepared.py")],
            cwd=folder,
            env=environment(folder),
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            end = json.loads(line)
            place = end["group"]
            outcomes |= _outcomes(groups[place], logs[place], end["status"], end["seconds"])
            left -= 1
    if left or process.returncode:
        raise StackError(
            f"{left} of {len(groups)} groups were not run (exit {process.returncode})",
            f"see {said}",
        )
    return outcomes


def _log(folder: Path, files: Sequence[str]) -> Path:
    """Where the outcomes of a group go; none of an earlier run are left there."""
    name = files[0].partition("::")[0].removesuffix(".py").replace("/", "-")
    log = folder / "logs" / f"{name}.jsonl"
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    return log


def _arguments(files: Sequence[str], log: Path) -> list[str]:
    return [
        *(*files, "-q", "-p", "no:cacheprovider", "--tb=short", f"--timeout={TEST_LIMIT}"),
        *("--continue-on-collection-errors", f"--report-log={log}"),
    ]


def _outcomes(files: Sequence[str], log: Path, status: int, seconds: float) -> dict[str, Outcome]:
    """What the tests of a group came to, which is also printed in a line."""
    title = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    text = log.with_suffix(".txt")
    found = read(log) if log.exists() else {}
    if not found:
        raise StackError(f"{title}: pytest left no outcome (exit {status})", f"see {text}")
    counts = [
        f"{number} {result}"
        for result in (PASSED, FAILED, SKIPPED)
        if (number := sum(outcome.result == result for outcome in found.values()))
    ]
    print(f"  {title}: {', '.join(counts)} [{seconds:.0f} s]", flush=True)
    if status not in PYTEST_ENDS:
        # What had not run yet is missing, and the comparison says so.
        print(f"  {title}: pytest was ended by {status}; see {text}", flush=True)
    return found
