"""Find the compile cases of every operation, and what they leave out.

``case`` describes what ``ops/NAME/compile_cases.py`` gives.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sm12x.proof.case import NOT_SM12X, CompileCase

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

OPERATIONS = "vllm_sm12x.ops"
MODULE = "compile_cases"

_IMPORTS_TRITON = re.compile(r"^\s*(?:from|import)\s+triton\b", re.MULTILINE)


def operations(package: str = OPERATIONS) -> list[str]:
    """Names of the operations: the subpackages of ``package``."""
    path = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if module.ispkg)


def cases(package: str = OPERATIONS) -> dict[str, list[CompileCase]]:
    """The cases by operation; those without ``compile_cases.py`` are left out.

    Raises:
        ValueError: A ``compile_cases.py`` gives no cases, something that is none, two of one label,
            or a case that differs from its configuration.
    """
    found = {}
    for name in operations(package):
        module_name = f"{package}.{name}.{MODULE}"
        if importlib.util.find_spec(module_name) is not None:
            given = list(importlib.import_module(module_name).cases())
            _check(module_name, given)
            found[name] = given
    return found


def _check(module_name: str, given: list[CompileCase]) -> None:
    if not given:
        raise ValueError(f"{module_name}: cases() gives none, allowed: one or more a row")
    labels = set()
    for case in given:
        if not isinstance(case, CompileCase):
            raise ValueError(
                f"{module_name}: cases() gives a {type(case).__name__}, allowed: CompileCase"
            )
        if case.label in labels:
            raise ValueError(f"{module_name}: two cases are labelled {case.label!r}, allowed: one")
        labels.add(case.label)
        for name, (compiled, chosen) in _differences(case).items():
            raise ValueError(
                f"{module_name}: {case.label!r} has {name} {compiled}, allowed: {chosen}, as in its"
                " configuration"
            )


def _differences(case: CompileCase) -> dict[str, tuple[object, object]]:
    """Where a case and its configuration give one thing, in either case of letters, two values."""
    values = {name.lower(): value for name, value in case.constexprs.items()}
    values |= {name: getattr(case, name) for name in ("num_warps", "num_stages", "maxnreg")}
    pairs = {
        name: (value, getattr(case.configuration, name, value)) for name, value in values.items()
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def gaps(package: str = OPERATIONS) -> list[str]:
    """What has no case, a sentence each: a kernel, or a row of a static table."""
    given = cases(package)
    found = _kernels_without_case(package, given)
    for name in given:
        found += _rows_without_case(package, name, given[name])
    return found


def _kernels_without_case(package: str, given: dict[str, list[CompileCase]]) -> list[str]:
    """Jitted functions that no case compiles and that no other jitted function names."""
    compiled = {id(case.kernel) for of_operation in given.values() for case in of_operation}
    jitted = [entry for name in operations(package) for entry in _jitted(package, name)]
    found = []
    for name, module, function in jitted:
        called = any(
            function.__name__ in _names_in(other.src)
            for _, _, other in jitted
            if other is not function
        )
        if id(function) not in compiled and not called:
            lack = "no case" if name in given else f"no case, for there is no {MODULE}.py"
            found.append(f"{name}: the kernel {function.__name__} of {module}.py has {lack}")
    return found


def _jitted(package: str, name: str) -> Iterator[tuple[str, str, JITFunction]]:
    """Operation, module and function of each jitted function that an operation defines."""
    from triton.runtime.jit import JITFunction

    (folder,) = importlib.import_module(f"{package}.{name}").__path__
    for path in sorted(Path(folder).glob("*.py")):
        # Other modules are not imported for this.
        if _IMPORTS_TRITON.search(path.read_text(encoding="utf-8")):
            full_name = f"{package}.{name}.{path.stem}".removesuffix(".__init__")
            for value in vars(importlib.import_module(full_name)).values():
                if isinstance(value, JITFunction) and value.__module__ == full_name:
                    yield name, path.stem, value


def _names_in(source: str) -> set[str]:
    """Every name and attribute in code, so that comments and docstrings do not count."""
    nodes = list(ast.walk(ast.parse(source)))
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }


def _rows_without_case(package: str, name: str, given: list[CompileCase]) -> Iterator[str]:
    """Rows of an operation's tables that are the configuration of no case."""
    module_name = f"{package}.{name}.{MODULE}"
    tables = getattr(importlib.import_module(module_name), "TABLES", None)
    if not tables:
        yield f"{name}: {MODULE}.py names no TABLES"
        return
    for number, table in enumerate(tables):
        rows = list(_rows(table))
        if not rows:
            yield f"{name}: TABLES[{number}] has no rows for SM12x"
        for keys, row in rows:
            if not any(case.configuration == row for case in given):
                place = "".join(f"[{key!r}]" for key in keys)
                yield f"{name}: the row TABLES[{number}]{place} ({row}) has no case"


def _rows(table: Mapping[object, object]) -> Iterator[tuple[tuple[object, ...], object]]:
    """Keys and value of each row of a table of tables, those for Hopper apart."""
    for key, value in table.items():
        if key == NOT_SM12X or (isinstance(key, tuple) and NOT_SM12X in key):
            continue
        if isinstance(value, Mapping):
            yield from (((key, *keys), row) for keys, row in _rows(value))
        else:
            yield (key,), value
