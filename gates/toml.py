"""TOML files read into checked models; an error names the file, the key and what is allowed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stack.errors import StackError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Strict(BaseModel):
    """A model that takes no key that it does not know, and no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Model = TypeVar("Model", bound=BaseModel)


def read(path: Path) -> dict[str, Any]:
    """The contents of a TOML file.

    Raises:
        StackError: The file is missing, is not UTF-8 or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StackError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StackError(f"{path}: {error}", "mend the file") from error


def check(model: type[Model], data: object, file: str, key: str = "") -> Model:
    """``data`` as a ``model``.

    Args:
        file: The file that it came from, for the message.
        key: The key in the file under which ``data`` lies; empty for the whole file.

    Raises:
        StackError: One line for each wrong key: the file, the key, what came and what is allowed.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [
            f"{file}: {_line(model, problem, key)}"
            for problem in error.errors(include_url=False, include_context=True)
        ]
        raise StackError("\n       ".join(lines), "mend the file and run again") from error


def _line(model: type[BaseModel], problem: Any, prefix: str) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join([prefix, *location] if prefix else location) or "the file"
    if problem["type"] == "extra_forbidden":
        allowed = ", ".join(sorted(_fields(model, problem["loc"][:-1])))
        return f"{key}: there is no such key; allowed: {allowed}"
    if problem["type"] == "missing":
        return f"{key}: this key is required"
    said = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{key}: {said[:1].lower()}{said[1:]}, not {problem['input']!r:.80}"


def _fields(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the model that lies at a location within another."""
    for part in location:
        field = model.model_fields.get(str(part))
        if field is not None:
            model = _inner(field.annotation) or model
    return list(model.model_fields)


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as ``tuple[Case, ...]`` or ``Case | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [_inner(part) for part in getattr(annotation, "__args__", ())]
    return next((model for model in found if model), None)
