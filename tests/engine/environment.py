"""What the programs that start the engine share: options, environment, and what a report names."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PATHS = ("portable", "native")
LOWERINGS = ("auto", "native", "sm120")
# What every engine of the tests is started with.
ENGINE = {
    "HF_HUB_OFFLINE": "1",
    # The sampler of FlashInfer compiles with nvcc at run time; a serving machine may have none.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # vLLM says so itself where a model is spread over GPUs. On one GPU it leaves PyTorch a thread a
    # core, and a small operation on the CPU waits for all of them: 2 to 13 ms, eight times a step,
    # seen with 16 virtual cores.
    "OMP_NUM_THREADS": "1",
}
# Of an engine over several GPUs, on any of them. SM12x has no fused all-reduce and norm; on Hopper
# it would compile at run time, on memory that is shared by multicast.
TP_COMPILATION = {"pass_config": {"fuse_allreduce_rms": False}}
# Settings that a report names.
_NAMED = (
    "SM12X_PORTABLE",
    "SM12X_KERNELS",
    "SM12X_LOWERING",
    "SM12X_MTP_FULL_GRAPHS",
    "SM12X_DRAFT_GRAPHS",
    "SM12X_SERVER_WARM_UP",
    "SM12X_EXPERT_ACTIVATIONS",
)


def add_path_options(parser: argparse.ArgumentParser) -> None:
    """How operations run, what memory an engine takes, and ``--commit``."""
    parser.add_argument("--path", choices=PATHS, default="portable")
    parser.add_argument(
        "--operations", help="exact SM12X_PORTABLE value instead of all or none; no tripwires then"
    )
    parser.add_argument("--kernels", default="auto", help="SM12X_KERNELS (default: auto)")
    parser.add_argument(
        "--lowering", choices=LOWERINGS, default="auto", help="SM12X_LOWERING (default: auto)"
    )
    parser.add_argument("--memory", type=float, default=0.6, help="share of the GPU's memory")
    parser.add_argument(
        "--kv-memory",
        type=float,
        metavar="GIB",
        help="of the KV cache, in place of what --memory leaves: for engines side by side",
    )
    parser.add_argument("--commit", help="commit to name in the report where git cannot tell")


def path_settings(args: argparse.Namespace) -> dict[str, str]:
    """The variables that what :func:`add_path_options` parsed stands for."""
    return {
        "SM12X_PORTABLE": args.operations or ("all" if args.path == "portable" else "none"),
        "SM12X_KERNELS": args.kernels,
        "SM12X_LOWERING": args.lowering,
    }


def memory_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for the memory that :func:`add_path_options` parsed."""
    options: dict[str, Any] = {"gpu_memory_utilization": args.memory}
    if args.kv_memory is not None:
        options["kv_cache_memory_bytes"] = int(args.kv_memory * 2**30)
    return options


def prepare(args: argparse.Namespace) -> bool:
    """Set the environment for what :func:`add_path_options` parsed, before vLLM is imported.

    Returns:
        Whether the tripwires were installed: every operation is portable.
    """
    # One process: the tripwires must be where the model runs.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in ENGINE.items():
        os.environ.setdefault(name, value)
    os.environ.update(path_settings(args))
    guarded = args.path == "portable" and not args.operations and getattr(args, "tp", 1) == 1
    if guarded:
        import tripwire

        tripwire.install()
    return guarded


def settings() -> dict[str, str]:
    """The variables that :func:`prepare` and its callers set."""
    return {name: os.environ[name] for name in _NAMED if name in os.environ}


def machine() -> dict[str, str]:
    import torch
    import triton
    import vllm

    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def command(program: str, *paths: Path | None) -> str:
    """The command that was run, with the names of files and folders and not where they lie."""
    names = {str(path): path.name for path in paths if path}
    words = [names.get(word, word) for word in sys.argv[1:]]
    return shlex.join(["python", f"tests/engine/{program}", *words])


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--verify", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"
