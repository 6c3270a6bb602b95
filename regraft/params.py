"""Reading `params.yaml`: every mistake at once, each with its path, the value found and what was expected.

A stage reads only the sections that it depends on (`load_sections`); commands and flows read all of them
(`regraft.settings.load`). Sections are frozen pydantic models that live in their stage's package.
"""

import difflib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from regraft.errors import ParamsError

PARAMS_FILE = "params.yaml"
_Model = TypeVar("_Model", bound=BaseModel)
_LARGEST = 1_000_000  # bytes; a hand-written file is a thousandth of it


class Section(BaseModel):
    """Base of every section of `params.yaml`: frozen, and nothing that it does not know is let through."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML 1.2 mapping: no aliases (so no bombs), no duplicate keys, at most 1 MB.

    Raises:
        ParamsError: the file is missing, too large, not UTF-8, not YAML, or not a mapping.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError
    from ruamel.yaml.events import AliasEvent

    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ParamsError(
            f"{path} is missing", fix="run the command in a clone of Regraft, or `git checkout params.yaml`"
        ) from error
    if len(data) > _LARGEST:
        raise ParamsError(f"{path} has {len(data)} bytes, expected at most {_LARGEST}")
    try:
        text = data.decode("utf-8")
        for event in YAML(typ="safe", pure=True).parse(text):
            if isinstance(event, AliasEvent):
                line = event.start_mark.line + 1
                raise ParamsError(
                    f"{path} line {line}: YAML aliases (*{event.anchor}) are not read; write the value out"
                )
        content = YAML(typ="safe", pure=True).load(text)
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8 (byte {error.start})") from error
    except (YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ParamsError):
            raise
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise ParamsError(f"{path}{where}: not YAML: {problem}") from error
    if not isinstance(content, dict):
        raise ParamsError(f"{path}: expected sections like `train:`, found {type(content).__name__}")
    return content


def load_sections(path: Path, model: type[_Model], *, only: bool = True) -> _Model:
    """Read the sections that are fields of `model` from `path`.

    Args:
        path: a `params.yaml`.
        model: a pydantic model with one field for each section wanted.
        only: leave out other sections of the file (a stage reads its own); otherwise an unknown section is a mistake.

    Raises:
        ParamsError: with every mistake of the file in those sections.
    """
    content = read_yaml(path)
    if only:
        content = {name: value for name, value in content.items() if name in _names(model)}
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = explain(error, model)
        count = f"{len(problems)} mistake{'s' if len(problems) > 1 else ''}"
        raise ParamsError(
            f"{path} has {count}:\n" + "\n".join(f"  {p}" for p in problems), fix=f"edit {path}"
        ) from error


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Turn a validation error into one line for each mistake: path, value found, what was expected, likely meaning."""
    lines = []
    for each in error.errors(include_url=False):
        path = ".".join(str(part) for part in each["loc"] if not str(part).startswith(("function-", "literal[")))
        if each["type"] == "extra_forbidden":
            known = _fields_at(model, each["loc"][:-1])
            close = difflib.get_close_matches(str(each["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(sorted(known))}"
            lines.append(f"{path}: unknown parameter; {hint}")
        elif each["type"] == "missing":
            lines.append(f"{path}: missing")
        else:
            found = repr(each["input"])
            found = found if len(found) <= 60 else found[:57] + "..."
            message = each["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            lines.append(f"{path}: found {found}, expected {message}")
    return lines


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in location:
        if part in (fields := _names(current)):
            current = _model_in(fields[str(part)].annotation)
    return list(_names(current))


def _names(model: Any) -> dict[str, Any]:
    """The fields of a model by the name that `params.yaml` uses (`validate` is the alias of a field `validate_`)."""
    return {field.alias or name: field for name, field in getattr(model, "model_fields", {}).items()}


def _model_in(annotation: Any) -> Any:
    """Return the pydantic model inside an annotation such as `Inner | None` or `list[Inner]`, else the annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return annotation
