"""The receipt of a run: build, GPUs, driver, NCCL, settings, and what was not run."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from gates import redaction
from gates.results import results
from gates.store import RunFolder

ROOT = Path(__file__).resolve().parents[2]
# What of this checkout measures.
SUITE = ("gates", "stack")
UNKNOWN = "not known (--python names the Python that serves)"
LIBRARIES = ("vllm", "torch", "triton", "nvidia-nccl-cu13", "flashinfer-python", "httpx", "lm-eval")


def machine(serving: str | None = None) -> dict[str, Any]:
    """This machine, as far as it says: system, GPUs and driver, this checkout, versions.

    Args:
        serving: The Python that serves; its packages, NCCL and peer access are asked for.
    """
    from gates.doctor.facts import probe

    found: dict[str, Any] = {
        "system": platform.platform(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "gates_commit": _commit(),
        # A server that the suite starts takes them over.
        "settings": redaction.settings(os.environ),
        "packages": {name: found for name in LIBRARIES if (found := version(name))},
    }
    found.update(gpus())
    if serving:
        found["serving"] = probe(serving, try_sampler=False, within_s=120.0)
    return found


def version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def gpus() -> dict[str, Any]:
    """The driver and its GPUs by NVML; what it says where there are none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"gpus": [], "gpu_error": str(error)}
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpu = {
                "name": _text(pynvml.nvmlDeviceGetName(handle)),
                "capability": f"{major}.{minor}",
            }
            try:
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                gpu |= {"memory_bytes": memory.total, "free_bytes": memory.free}
            except pynvml.NVMLError:  # GB10 shares the system's memory and has none of its own
                gpu |= {"memory_bytes": None, "free_bytes": None}
            found.append(gpu)
        return {
            "gpus": found,
            "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
            "cuda_driver": pynvml.nvmlSystemGetCudaDriverVersion_v2(),
        }
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _commit() -> str:
    """The commit of this checkout, with ``+changes`` where the suite differs from it.

    What else differs changes no figure: a run's folder in the checkout, a text. Empty outside of
    git.
    """
    from stack.errors import StackError
    from stack.git import git

    try:
        commit = git("rev-parse", "HEAD", cwd=ROOT).text
        changed = git("status", "--porcelain", "--", *SUITE, cwd=ROOT).text
        return commit + ("+changes" if changed else "")
    except (StackError, OSError, subprocess.SubprocessError):
        return ""


def facts(folder: RunFolder) -> list[list[str]]:
    """The rows of the report's head: what was measured, on what, when."""
    about = folder.about
    here, server = about["machine"], about["server"]
    gpus = [f"{gpu['name']} ({gpu['capability']})" for gpu in here.get("gpus", [])]
    serving = here.get("serving", {})
    packages = serving.get("packages") or {}
    unseen = "none seen" if serving else UNKNOWN
    rows = [
        ["Server", f"{server['model']}, {_server(server)}"],
        ["Variant", about.get("variant") or "not named"],
        ["Profile", f"{about['profile']['title']}, size {about['size']}"],
        ["GPUs of the machine that measured", ", ".join(gpus) or "none seen"],
        ["Driver", str(here.get("driver", "none seen"))],
        ["NCCL", str(serving.get("nccl") or unseen)],
        [
            "Packages that served",
            ", ".join(f"{name} {number}" for name, number in packages.items())
            or str(serving.get("error") or unseen),
        ],
        ["Suite", here.get("gates_commit") or "not a git checkout"],
        [
            "Serve command",
            # Again, for a run that was kept before secrets were hidden.
            shlex.join(redaction.command(about.get("serve") or []))
            or "not known: the server ran already",
        ],
        ["Settings of the environment", _settings(here.get("settings"))],
        ["Begun", about["started"]],
    ]
    return rows


def notes(folder: RunFolder) -> list[str]:
    """What a reader must know before the figures."""
    told = []
    if folder.about["size"] == "short":
        told.append(
            "Size short: it shows that everything works, and its figures are for nothing else. "
            "Titles and texts of the gates speak of the full size."
        )
    if folder.about.get("made_weights"):
        told.append("The weights are made up: what the model says was measured and not judged.")
    for row in folder.of("resumed"):
        told.append(
            f"WARNING: begun with the suite at {row['before'] or 'no known commit'}, resumed at "
            f"{row['at']} with {row['commit'] or 'no known commit'}: the figures are of both."
        )
    return told


def _settings(settings: dict[str, str] | None) -> str:
    if settings is None:
        return "not recorded"
    return " ".join(f"{name}={value}" for name, value in settings.items()) or (
        f"none of {redaction.KEPT_NAMES}"
    )


def _server(server: dict[str, Any]) -> str:
    said = [f"vLLM {server['version']}" if server["version"] else "not vLLM, or it does not say"]
    if server["max_model_len"]:
        said.append(f"at most {server['max_model_len']:,} tokens")
    if server["prefix_cache"] is not None:
        said.append("prefix cache " + ("on" if server["prefix_cache"] else "off"))
    if server["speculation"] is not None:
        said.append("drafting " + ("on" if server["speculation"] else "off"))
    return ", ".join(said)


def receipt(folder: RunFolder) -> dict[str, Any]:
    """All of it as data: what the run was, and the verdict of each gate."""
    gates = [
        {
            "gate": result.gate.name,
            "status": result.status,
            "why": result.why,
            "warnings": result.warnings,
            "left_out": result.left_out,
        }
        for result in results(folder)
    ]
    about = {key: value for key, value in folder.about.items() if key not in ("gates", "order")}
    about["serve"] = redaction.command(about.get("serve") or [])
    return {
        **about,
        "notes": notes(folder),
        "gates": gates,
        "not_run": [g for g in gates if g["status"] == "not run"],
    }


def written(folder: RunFolder) -> None:
    """Save the receipt in the run's folder as ``receipt.json``."""
    folder.save("receipt.json", json.dumps(receipt(folder), indent=2, ensure_ascii=False) + "\n")
