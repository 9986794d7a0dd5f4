"""What the gate compiles: one kernel with one configuration, for given argument types.

An operation with Triton kernels has ``ops/NAME/compile_cases.py``, which gives

* ``cases() -> list[CompileCase]``: one or more for every row of its static tables;
* ``TABLES``: a tuple of those tables. A table is a mapping, of mappings where it has several keys
  (target, then shape); what is no mapping is a row. A case carries its row as ``configuration``, so
  that a row without a case is found. Where the row has a field named like a constexpr (``block_h``
  for ``BLOCK_H``) or ``num_warps``, ``num_stages`` or ``maxnreg``, the case must have its value.
  Rows under ``"sm_90"`` need no case: they are for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

# Rows under this target are for the comparison on Hopper.
NOT_SM12X = "sm_90"

_Key = TypeVar("_Key")
_Row = TypeVar("_Row")


def sm12x_rows(table: Mapping[str, Mapping[_Key, _Row]]) -> list[tuple[_Key, _Row]]:
    """Key and row of every entry under an SM12x target; what the targets share comes once."""
    under = (rows.items() for target, rows in table.items() if target != NOT_SM12X)
    return list(dict.fromkeys(entry for entries in under for entry in entries))


def case_of_row(
    label: str,
    kernel: JITFunction,
    types: Mapping[str, str],
    constexprs: Mapping[str, object],
    row: Any,
    *,
    instructions: tuple[str, ...] = (),
    divisible_by_16: Sequence[str] = (),
) -> CompileCase:
    """The case of a row that says itself how it is launched.

    Args:
        types: Of the arguments that are neither constexprs nor ``"i32"``.
        row: Its ``num_warps``, ``num_stages`` (1 where it has none) and ``maxnreg`` are taken.
        divisible_by_16: Those that are constexprs here do not count.

    The rest is as in :class:`CompileCase`.
    """
    signature = {
        name: types.get(name, "i32") for name in kernel.arg_names if name not in constexprs
    }
    return CompileCase(
        label=label,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=row.num_warps,
        num_stages=getattr(row, "num_stages", 1),
        instructions=instructions,
        divisible_by_16=tuple(name for name in divisible_by_16 if name in signature),
        maxnreg=getattr(row, "maxnreg", None),
        configuration=row,
    )


@dataclass(frozen=True, eq=False)
class CompileCase:
    """One kernel, its argument types and one configuration.

    Attributes:
        label: Names the case in the table and in failures, unique in its operation, such as
            ``"decode heads=64 split"``.
        kernel: The ``triton.jit`` (or Gluon) function.
        signature: Type of every argument that is no constexpr, by name, in Triton's words:
            ``"*bf16"``, ``"*u8"``, ``"*fp8e4nv"``, ``"i32"``, ``"i64"``, ``"fp32"``.
        constexprs: Value of every other argument, by name. That is each ``tl.constexpr``, and what
            the launcher specialises on: an integer that is 1, a pointer that is ``None``.
        num_warps: Warps a block.
        num_stages: Stages of the software pipeline.
        instructions: Matrix instructions that must each be found, by how their name in the machine
            code begins: ``"HMMA.16816.F32.BF16"``, ``"QMMA.16832.F32.E4M3"``. Empty where the
            kernel multiplies no matrices.
        divisible_by_16: Arguments that the launcher finds divisible by 16: pointers (in bytes; what
            torch allocates is, a view may not be) and integers.
        maxnreg: Bound on the registers a thread, where the launch gives one.
        configuration: The row of the static table that this case compiles.

    Raises:
        ValueError: An argument of the kernel has no type and no value, or has both, or a name is
            none of its arguments; the message says which.
    """

    label: str
    kernel: JITFunction
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int
    instructions: tuple[str, ...] = ()
    divisible_by_16: tuple[str, ...] = ()
    maxnreg: int | None = None
    configuration: object = None

    def __post_init__(self) -> None:
        for field in ("instructions", "divisible_by_16"):
            if isinstance(getattr(self, field), str):
                raise ValueError(f"{self.label}: {field} is a string, allowed: a tuple of strings")
        arguments = list(self.kernel.arg_names)
        known = f"the arguments of {self.kernel.__name__} are {', '.join(arguments)}"
        for name in (*self.signature, *self.constexprs):
            if name not in arguments:
                raise ValueError(f"{self.label}: {name!r} is no argument; {known}")
        for name in arguments:
            if (name in self.signature) == (name in self.constexprs):
                found = "both" if name in self.signature else "neither"
                raise ValueError(
                    f"{self.label}: {name!r} is in {found} of signature and constexprs,"
                    " allowed: in one of them"
                )
        for name in self.divisible_by_16:
            if name not in self.signature:
                raise ValueError(
                    f"{self.label}: divisible_by_16 names {name!r}, allowed:"
                    f" {', '.join(self.signature)}"
                )

    @property
    def kernel_name(self) -> str:
        """Name of the kernel's function."""
        return self.kernel.__name__

    @property
    def config_text(self) -> str:
        """The configuration in one line, for failures."""
        values = {**self.constexprs, "num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.maxnreg is not None:
            values["maxnreg"] = self.maxnreg
        return ", ".join(f"{name}={value}" for name, value in values.items())
