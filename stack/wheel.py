"""``python -m stack wheel``: the pin, the series and the kernels become a wheel and a receipt."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stack import download, source, wheel_changes, wheel_kernels, wheel_receipt
from stack.checkout import Checkout
from stack.errors import StackError
from stack.importing import ImportedSeries, import_series
from stack.pin import ARCHITECTURES, ROOT, Pin
from stack.scratch import scratch
from stack.wheel_assemble import Assembled, assemble, disk_error

ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}
LICENCE = "LICENSE"


def architectures(told: str | None) -> tuple[str, ...]:
    """The architectures that ``--arch`` means; this machine's without it.

    Raises:
        StackError: vLLM has no wheel for it.
    """
    if told == "all":
        return ARCHITECTURES
    asked = told or platform.machine()
    name = ALIASES.get(asked.lower(), asked)
    if name not in ARCHITECTURES:
        what = f"--arch {told}" if told else f"this machine ({asked or 'unknown'})"
        raise StackError(
            f"{what}: upstream has no wheel for that architecture",
            f"use --arch {', --arch '.join(ARCHITECTURES)} or --arch all",
        )
    return (name,)


def note(pin: Pin) -> str:
    """The paragraph that heads the description of the wheel."""
    return (
        f"> This is not a release of the vLLM project. It is vLLM {pin.version} with a series of "
        "patches and the package `vllm_sm12x`, for DeepSeek V4 Flash on SM12x GPUs "
        f"(version {pin.local_version}). The binaries and what follows are vLLM's own."
    )


@dataclass(frozen=True)
class Inputs:
    """What goes into the wheels of every architecture."""

    checkout: Checkout
    imported: ImportedSeries
    inside: list[wheel_changes.Change]
    outside: list[wheel_changes.Change]
    kernels: dict[str, bytes]
    trees: dict[str, str]


def read_inputs(
    checkout: Checkout, folder: Path, echo: Callable[[str], None], *, compiled: bool = False
) -> Inputs:
    """Import the series into ``folder`` and sort out what it changes.

    Args:
        checkout: Whose pin, patches and submodule.
        folder: A missing or empty folder for the work tree; with ``compiled``, the one of an
            earlier build does too.
        echo: Called with a line for each step.
        compiled: Everything will be compiled from the tree: no change has to be refused.
    """
    imported = import_series(folder, checkout=checkout, force=compiled, echo=echo)
    changes = wheel_changes.read_changes(imported)
    inside, outside = ([], []) if compiled else wheel_changes.sort_out(changes)
    trees = {
        "base": source.tree_of(imported.path, imported.base),
        "patched": source.tree_of(imported.path, imported.head),
    }
    for name, pinned in (("base", checkout.pin.base_tree), ("patched", checkout.pin.patched_tree)):
        if pinned and pinned != trees[name]:
            echo(
                f"warning: the {name} tree is {trees[name]}, upstream.toml says {pinned}; "
                "`python -m stack check` tells more"
            )
    return Inputs(
        checkout=checkout,
        imported=imported,
        inside=inside,
        outside=outside,
        kernels=wheel_kernels.read_kernels(checkout.root / "kernels"),
        trees=trees,
    )


def receipt_inputs(inputs: Inputs, binaries: dict[str, Any]) -> dict[str, Any]:
    """The sections of the receipt that say what went in."""
    pin = inputs.checkout.pin
    found = source.find(inputs.checkout)
    licence = inputs.checkout.root / LICENCE
    return {
        "version": pin.local_version,
        "upstream": {
            "project": pin.project,
            "version": pin.version,
            "commit": pin.commit,
            "repository": pin.repository,
            "torch": pin.torch,
            "triton": pin.triton,
            "cuda": pin.cuda,
        },
        "binaries": binaries,
        "source": {
            "kind": found.kind,
            "sdist": pin.sdist.filename if found.kind == "sdist" else None,
            "sha256": pin.sdist.sha256 if found.kind == "sdist" else None,
            "base_tree": inputs.trees["base"],
            "patched_tree": inputs.trees["patched"],
        },
        "series": wheel_receipt.patches_used(inputs.checkout.patches, inputs.imported.patches),
        "not_in_a_wheel": [change.path for change in inputs.outside],
        "kernels": {
            "files": len(inputs.kernels),
            "sha256": wheel_kernels.tree_digest(inputs.kernels),
        },
        "licence": {
            "filename": LICENCE,
            "sha256": hashlib.sha256(licence.read_bytes()).hexdigest(),
        },
        "tested": wheel_receipt.claims(inputs.checkout.root / "tests" / "claims.toml"),
        "repository": wheel_receipt.repository_state(inputs.checkout.root),
    }


def finish(
    inputs: Inputs, upstream: Path, old_version: str, out: Path, binaries: dict[str, Any]
) -> Assembled:
    """Assemble one wheel and write its receipt."""
    pin = inputs.checkout.pin
    made = assemble(
        upstream,
        out,
        old_version=old_version,
        version=pin.local_version,
        note=note(pin),
        changes=inputs.inside,
        kernels=inputs.kernels,
        licence=(inputs.checkout.root / LICENCE).read_bytes(),
    )
    try:
        wheel_receipt.write_receipt(made, receipt_inputs(inputs, binaries))
    except OSError as error:
        raise disk_error(error, out) from None
    return made


def say(line: str) -> None:
    """Progress goes to standard error; standard output has the names of the wheels alone."""
    print(line, file=sys.stderr, flush=True)


def build(
    archs: Sequence[str],
    out: Path,
    *,
    checkout: Checkout | None = None,
    echo: Callable[[str], None] = say,
) -> list[Assembled]:
    """Make the wheels of these architectures from upstream's binaries, each with its receipt.

    Args:
        archs: Names from :data:`stack.pin.ARCHITECTURES`.
        out: Where the wheels go; it is made where it is missing.
        checkout: Whose pin, patches and submodule; this checkout without it.
        echo: Called with a line for each step.

    Raises:
        StackError: As the parts say: no network, a wrong digest, a patch that does not apply or
            changes a compiled input, a full disk.
    """
    checkout = checkout or Checkout()
    pin = checkout.pin
    # The cheap part first: a patch that is to be refused is refused before a long download.
    with scratch(ROOT / ".build", "wheel-") as folder:
        inputs = read_inputs(checkout, folder / "vllm", echo)
    made = []
    for arch in archs:
        artifact = pin.wheels[arch]
        upstream = download.fetch(artifact, project=pin.project)
        binaries = {
            "from": "upstream's wheel",
            "architecture": arch,
            "filename": artifact.filename,
            "size": artifact.size,
            "sha256": artifact.sha256,
        }
        made.append(finish(inputs, upstream, pin.version, out, binaries))
        echo(
            f"made {made[-1].path.name} ({made[-1].size / 1e6:.0f} MB), checked against its RECORD"
        )
    return made
