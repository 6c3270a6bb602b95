"""Writing a plan into `params.yaml` so that nothing else in it changes: values are replaced where they stand."""

import json
from pathlib import Path
from typing import Any

from regraft.artifacts import write_file
from regraft.errors import ParamsError


def apply(file: Path, settings: dict[str, object]) -> None:
    """Write values into `params.yaml`; comments, order and every other byte stay.

    Args:
        file: the `params.yaml`.
        settings: dotted keys, such as `train.batch_size`, and their new values.

    Raises:
        ParamsError: a key does not stand in the file as a plain value; nothing was written.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    text = file.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    try:
        content: Any = YAML().load(text)
    except YAMLError as error:
        raise ParamsError(f"{file} is not YAML: {error}", fix=f"edit {file}") from error
    for key, value in settings.items():
        line, column = _place(file, content, key)
        lines[line] = _replaced(lines[line], column, _plain(value))
    write_file(file, "".join(lines).encode())


def _place(file: Path, content: Any, key: str) -> tuple[int, int]:
    """Return line and column of a key's value."""
    *sections, last = key.split(".")
    at = content
    for name in sections:
        at = at.get(name) if isinstance(at, dict) else None
    if not isinstance(at, dict) or last not in at or isinstance(at[last], dict | list) or at.fa.flow_style():  # type: ignore[attr-defined]
        raise ParamsError(f"{file} has no plain value at {key}", fix=f"write {key} into {file} in block style")
    line, column = at.lc.value(last)  # type: ignore[attr-defined]
    return int(line), int(column)


def _replaced(line: str, column: int, value: str) -> str:
    """Put a value in place of a line's old one; its comment stays in its column where there is room."""
    body, end = line.rstrip("\n"), "\n" if line.endswith("\n") else ""
    comment = body.find(" #", column)
    if comment < 0:
        return body[:column] + value + end
    stood = comment + 1
    return (body[:column] + value).ljust(stood - 1) + " " + body[stood:] + end


def _plain(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value)
