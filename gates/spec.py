"""What a gate file and a hardware profile may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from gates import checks, toml
from gates.toml import Strict
from stack.errors import StackError

FOLDER = Path(__file__).resolve().parent
Scalar = str | int | float | bool
Unit = Literal["text", "int", "s", "ms", "tok/s", "ratio", "percent", "number", "yes/no"]


class Column(Strict):
    """One column of a gate's table: its heading, the figure or key it shows, and the unit.

    Times are kept in seconds; ``ms`` shows them as milliseconds. ``percent`` shows a share of 1.
    """

    head: str
    figure: str
    unit: Unit = "text"


class Threshold(Strict):
    """A bound that decides: a row whose figure lies outside has failed.

    ``where`` names the rows by their key, all of them if empty. ``level = "warn"`` is said in the
    report and does not fail the gate. ``content`` marks a bound on what the model says: it is not
    judged where the weights are made up (``--made-weights``). ``optional`` marks a figure that not
    every server or command line gives: a row without it is not judged. Without the mark such a row
    has failed.
    """

    figure: str
    min: float | None = None
    max: float | None = None
    where: dict[str, Scalar] = {}
    profile: str | None = None
    level: Literal["fail", "warn"] = "fail"
    content: bool = False
    optional: bool = False
    why: str

    @model_validator(mode="after")
    def _bounded(self) -> Threshold:
        if self.min is None and self.max is None:
            raise ValueError("a threshold needs min, max or both")
        return self


class Expected(Strict):
    """What somebody measured on this hardware: figures of one row, to compare with."""

    profile: str
    variant: str = ""
    where: dict[str, Scalar] = {}
    figures: dict[str, float] = Field(min_length=1)
    source: str = Field(min_length=1)


class Timeouts(Strict):
    """When a request is given up, in seconds: no first token, no further one, not at its end."""

    first_token_s: float = Field(default=600.0, gt=0)
    stall_s: float = Field(default=120.0, gt=0)
    total_s: float = Field(default=1800.0, gt=0)


class Needs(Strict):
    """What a gate cannot be measured without; where it is missing the gate is not run, and says so.

    ``prefix_cache`` is compared with what the server's ``/metrics`` say.
    """

    prefix_cache: Literal["on", "off", "any"] = "any"
    metrics: bool = False
    speculation: bool = False


class Gate(Strict):
    """One gate: what it loads the server with, how often, and what its figures must be.

    ``params`` are the workload's own (``gates/workloads/``). ``short`` replaces keys of ``params``
    and ``repeats`` in the short size. ``total`` adds a row of everything measured.
    """

    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    title: str
    why: str
    workload: str
    order: int = Field(ge=0, le=999)
    repeats: int = Field(default=5, ge=1, le=100)
    needs: Needs = Needs()
    timeouts: Timeouts = Timeouts()
    params: dict[str, Any] = {}
    short: dict[str, Any] = {}
    total: bool = False
    columns: list[Column] = Field(min_length=1)
    thresholds: list[Threshold] = Field(min_length=1)
    expected: list[Expected] = []

    def sized(self, size: Literal["full", "short"]) -> Gate:
        """The gate as it runs in a size."""
        if size == "full" or not self.short:
            return self
        changes = dict(self.short)
        repeats = changes.pop("repeats", self.repeats)
        return self.model_copy(update={"repeats": repeats, "params": {**self.params, **changes}})


class Hardware(Strict):
    """The GPUs of a profile; ``memory_gb`` and ``bandwidth_gb_s`` are of one GPU."""

    gpu: str
    count: int = Field(ge=1)
    capability: str = Field(pattern=r"^\d+\.\d$")
    memory_gb: float = Field(gt=0)
    bandwidth_gb_s: float = Field(gt=0)
    unified_memory: bool = False
    source: str


class Flag(Strict):
    """One flag of ``vllm serve`` that is recommended, and why. An empty value is a bare flag."""

    flag: str = Field(pattern=r"^--[a-z][a-z0-9-]*$")
    value: str = ""
    why: str


class Variable(Strict):
    """One environment variable of the server that is recommended, and why."""

    name: str = Field(pattern=r"^[A-Z][A-Z0-9_]*$")
    value: str
    why: str


class Profile(Strict):
    """What is known of a kind of machine: hardware, the limits that gates keep to, flags.

    ``max_model_len`` bounds prompts where the server does not say its own; ``max_concurrency``
    leaves out rows above it. ``shown`` says where the flags were seen to work, or that nobody did.
    """

    name: str
    title: str
    hardware: Hardware
    max_model_len: int = Field(ge=1024)
    max_concurrency: int = Field(ge=1)
    shown: str
    flags: list[Flag]
    variables: list[Variable] = []


def total_key(key: dict[str, Any]) -> dict[str, Any]:
    """The key of the row of everything measured, from any other row's of the gate."""
    return {next(iter(key)): "all"}


def load_gate(path: Path) -> Gate:
    """The gate in a file, with its workload's parameters checked in both sizes.

    Raises:
        StackError: The file, the key, what came and what is allowed.
    """
    from gates.workloads import WORKLOADS

    gate = toml.check(Gate, toml.read(path), path.name)
    if gate.name != path.stem:
        raise StackError(f"{path.name}: name: must be {path.stem!r} as the file, not {gate.name!r}")
    if gate.workload not in WORKLOADS:
        raise StackError(
            f"{path.name}: workload: must be one of {', '.join(WORKLOADS)}, not {gate.workload!r}"
        )
    workload = WORKLOADS[gate.workload]
    sizes = {"params": gate}
    if gate.short:
        repeats = gate.short.get("repeats", 1)
        if not isinstance(repeats, int) or repeats < 1:
            raise StackError(f"{path.name}: short.repeats: must be at least 1, not {repeats!r}")
        sizes["short"] = gate.sized("short")
    params = {
        where: toml.check(workload.Params, sized.params, path.name, where)
        for where, sized in sizes.items()
    }
    checks.names(gate, workload.KEYS, workload.FIGURES, path.name)
    keys: list[dict[str, Any]] = []
    for where, sized in sizes.items():
        rows = [row[0].key for row in workload.cells(sized, params[where])]
        checks.rows(rows, path.name, where)
        keys += rows
    if gate.total:
        keys.append(total_key(keys[0]))
    checks.where(gate, keys, path.name)
    known = sorted(profile.stem for profile in (FOLDER / "profiles").glob("*.toml"))
    checks.profiles(gate, known, path.name)
    return gate


def load_gates(folder: Path = FOLDER / "files") -> dict[str, Gate]:
    """Every gate of a folder by name, in the order in which they run.

    Raises:
        StackError: A file is wrong, or the folder has none.
    """
    gates = [load_gate(path) for path in sorted(folder.glob("*.toml"))]
    if not gates:
        raise StackError(f"{folder}: there is no gate file (*.toml)")
    return {gate.name: gate for gate in sorted(gates, key=lambda gate: (gate.order, gate.name))}


def load_profiles(folder: Path = FOLDER / "profiles") -> dict[str, Profile]:
    """Every hardware profile of a folder by name.

    Raises:
        StackError: A file is wrong.
    """
    profiles = {}
    for path in sorted(folder.glob("*.toml")):
        profile = toml.check(Profile, toml.read(path), path.name)
        if profile.name != path.stem:
            raise StackError(
                f"{path.name}: name: must be {path.stem!r} as the file, not {profile.name!r}"
            )
        profiles[profile.name] = profile
    return profiles
