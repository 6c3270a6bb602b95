"""Templates such as `"{question}"` that build a text from a row's columns."""

import json
from string import Formatter
from typing import Any


def parse(template: str) -> list[tuple[str, str | None]]:
    """Split a template into pairs of literal text and the column that follows it (`None` at the end).

    Only plain column names stand between braces: no attribute, index, conversion or format. `{{` and `}}` are braces.

    Raises:
        ValueError: the braces do not match, or hold something else than a column's name.
    """
    pieces: list[tuple[str, str | None]] = []
    for literal, column, spec, conversion in Formatter().parse(template):
        if column is not None and (not column.strip() or spec or conversion):
            raise ValueError(f"a column's name between braces, as in '{{text}}', found {template!r}")
        pieces.append((literal, column))
    return pieces


def columns(template: str) -> list[str]:
    """Return the columns that a template names, in order."""
    return [column for _, column in parse(template) if column is not None]


def as_text(value: Any) -> str:
    """Return a column's value as text: strings as they are, nothing for null, JSON for the rest."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def fill(pieces: list[tuple[str, str | None]], record: dict[str, Any]) -> str | None:
    """Return the text of a parsed template for a row, or `None` where the row lacks one of the columns."""
    parts = []
    for literal, column in pieces:
        parts.append(literal)
        if column is not None:
            if column not in record:
                return None
            parts.append(as_text(record[column]))
    return "".join(parts)
