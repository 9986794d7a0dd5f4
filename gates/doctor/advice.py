"""What follows from the facts: findings in the order of their weight, and flags with reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gates.doctor.facts import Facts
from gates.spec import Profile

Level = Literal["stop", "warn", "fine"]
GB = 1e9
# Of DeepSeek V4 Flash: the checkpoint on disk, and its layers by kind of attention.
WEIGHTS_GB = 149.0
LAYERS_4, LAYERS_128 = 21, 20
# A page of 64 compressed entries, its padding counted: 585 bytes each, the indexer's 135.
ENTRY_BYTES, INDEX_BYTES = 585, 135
# torch 2.11.0 is built with CUDA 13.0.
CUDA_DRIVER = 13000
NCCL_THAT_HANGS = "2.28.9"
NCCL_REPORTED = "2.30.4"


@dataclass(frozen=True)
class Finding:
    """One thing that will matter. ``do`` is a flag, a variable or an action, and may be empty."""

    level: Level
    what: str
    why: str
    do: str = ""


def cache_bytes_a_token() -> float:
    """Bytes of KV cache that a token of context takes on each GPU, windows and state apart.

    One entry every 4 tokens in the C4A layers, with the indexer's, and one every 128 in the C128A
    layers. There is one KV head: tensor parallelism does not divide it.
    """
    return LAYERS_4 * (ENTRY_BYTES + INDEX_BYTES) / 4 + LAYERS_128 * ENTRY_BYTES / 128


def advise(
    facts: Facts,
    profile: Profile | None,
    context: int,
    utilization: float,
    weights_gb: float = WEIGHTS_GB,
) -> list[Finding]:
    """The findings, what stops a run first.

    Args:
        facts: Of this machine.
        profile: The hardware profile, for the number of GPUs that are meant to serve.
        context: Tokens of one request.
        utilization: ``--gpu-memory-utilization``.
        weights_gb: The checkpoint's size.
    """
    findings = [
        *_gpus(facts, profile),
        *_driver(facts),
        *_memory(facts, profile, context, utilization, weights_gb),
        *_nccl(facts),
        *_peers(facts),
        *_sampler(facts),
    ]
    return sorted(findings, key=lambda one: ("stop", "warn", "fine").index(one.level))


def _gpus(facts: Facts, profile: Profile | None) -> list[Finding]:
    if not facts.gpus:
        return [Finding("stop", "no GPU", facts.gpu_error or "NVML sees none")]
    found = []
    capabilities = sorted({gpu["capability"] for gpu in facts.gpus})
    names = ", ".join(gpu["name"] for gpu in facts.gpus)
    if len(capabilities) > 1:
        said = "tensor parallelism runs at the pace of the slowest, and kernels differ"
        found.append(Finding("warn", f"unlike GPUs: {names}", said))
    if any(one.startswith("12.") for one in capabilities):
        said = "SM12x takes the portable path by itself"
        found.append(Finding("fine", f"{names}: {', '.join(capabilities)}", said))
    else:
        found.append(
            Finding(
                "warn",
                f"{names}: capability {', '.join(capabilities)} is not SM12x",
                "upstream's native kernels run here, and the figures say nothing of SM12x",
                "SM12X_PORTABLE=all to measure the portable path",
            )
        )
    if (
        profile
        and len(facts.gpus) != profile.hardware.count
        and not profile.hardware.unified_memory
    ):
        said = f"the profile {profile.name} means {profile.hardware.count}"
        found.append(
            Finding("warn", f"{len(facts.gpus)} GPUs", said, "CUDA_VISIBLE_DEVICES or --profile")
        )
    return found


def _driver(facts: Facts) -> list[Finding]:
    if facts.cuda_driver is None:
        return []
    said = (
        f"driver {facts.driver}, CUDA {facts.cuda_driver // 1000}.{facts.cuda_driver % 1000 // 10}"
    )
    if facts.cuda_driver < CUDA_DRIVER:
        return [
            Finding(
                "stop", said, "torch 2.11.0 is built with CUDA 13.0", "install a driver from 580 on"
            )
        ]
    return [Finding("fine", said, "new enough for CUDA 13.0")]


def _memory(
    facts: Facts, profile: Profile | None, context: int, utilization: float, weights_gb: float
) -> list[Finding]:
    known = [gpu for gpu in facts.gpus if gpu["memory_bytes"]]
    if not known:
        return []
    # Two GB10 are two hosts: this one sees its own.
    count = max(len(facts.gpus), profile.hardware.count if profile else 0)
    share = weights_gb / count
    smallest = min(gpu["memory_bytes"] for gpu in known) / GB
    used = max(gpu["memory_bytes"] - gpu["free_bytes"] for gpu in known) / GB
    left = smallest * utilization - share
    found = []
    if used > 0.05 * smallest:
        said = "vLLM does not start where less is free than it is to take"
        found.append(
            Finding("warn", f"{used:.1f} GB of a GPU are in use", said, "end what uses them")
        )
    sum_said = f"{share:.1f} GB of weights a GPU ({weights_gb:g} GB on {count})"
    if left <= 0:
        found.append(
            Finding(
                "stop",
                f"{sum_said} do not fit into {smallest * utilization:.1f} GB",
                f"{smallest:.1f} GB a GPU, of which {utilization:.0%} are used",
                "more GPUs, a smaller checkpoint, or --cpu-offload-gb",
            )
        )
        return found
    tokens = int(left * GB / cache_bytes_a_token())
    many = tokens // context
    found.append(
        Finding(
            "fine" if many else "stop",
            f"{left:.1f} GB a GPU are left: at most {tokens:,} tokens of KV cache",
            f"{sum_said}; {cache_bytes_a_token():,.0f} bytes a token. Activations, graphs, windows "
            "and what the allocator pads come off: the server's log says what is left",
            f"--max-model-len {context}: at most {many} of them at once"
            if many
            else f"--max-model-len {tokens} or less",
        )
    )
    return found


def _nccl(facts: Facts) -> list[Finding]:
    if facts.nccl is None:
        return []
    gb10 = any("GB10" in gpu["name"] for gpu in facts.gpus)
    if facts.nccl == NCCL_THAT_HANGS and (gb10 or len(facts.gpus) > 1):
        return [
            Finding(
                "warn",
                f"NCCL {facts.nccl}",
                f"users report hangs of long generations on several GB10, and none with "
                f"{NCCL_REPORTED}; not seen by us",
                "constraints/README.md says how to take another NCCL",
            )
        ]
    return [Finding("fine", f"NCCL {facts.nccl}", "nothing is known against it")]


def _peers(facts: Facts) -> list[Finding]:
    if len(facts.peers) < 2:
        return []
    apart = [
        (a, b)
        for a, row in enumerate(facts.peers)
        for b, reached in enumerate(row)
        if a < b and not (reached and facts.peers[b][a])
    ]
    if not apart:
        return [Finding("fine", "peer to peer: all GPUs reach each other", "NCCL goes direct")]
    pairs = ", ".join(f"{a} and {b}" for a, b in apart)
    return [
        Finding(
            "warn",
            f"no peer to peer between GPU {pairs}",
            "all-reduce goes through the host's memory; vLLM's own all-reduce needs peer access",
            "--disable-custom-all-reduce",
        )
    ]


def _sampler(facts: Facts) -> list[Finding]:
    off = "VLLM_USE_FLASHINFER_SAMPLER=0"
    if facts.sampler is not None and not facts.sampler["works"]:
        return [Finding("warn", "FlashInfer's sampler fails", facts.sampler["said"], off)]
    if facts.sampler is not None:
        took = f"tried: {facts.sampler['seconds']:.1f} s the first time"
        return [Finding("fine", "FlashInfer's sampler works", took)]
    untried = f"not tried: {facts.sampler_untried or 'left out'}"
    if facts.nvcc is None and facts.gpus:
        said = f"FlashInfer's sampler compiles at the start; it was {untried}"
        return [Finding("warn", "no nvcc on the path", said, off)]
    return [Finding("fine", "FlashInfer's sampler was not tried", untried)]


def recommended(profile: Profile, findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """The flags and variables of a profile, and those of the findings, with their reasons."""
    lines = [(f"{v.name}={v.value}", v.why) for v in profile.variables]
    lines += [(f"{f.flag} {f.value}".strip(), f.why) for f in profile.flags]
    lines += [
        (one.do, one.why)
        for one in findings
        if one.do.startswith(("--disable", "VLLM_")) and one.level == "warn"
    ]
    return lines
