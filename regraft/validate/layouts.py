"""How other tools write a conversation, and how to tell: OpenAI's messages, ShareGPT, Alpaca, prompt and completion.

messages           {column}: [{role, content}, ...]
sharegpt           {column}: [{from, value}, ...]            human, gpt, system, user, assistant
alpaca             instruction, output; perhaps input, system
prompt_completion  prompt, completion: two texts, or two lists of {role, content}
preference         see `preferences.py`: chosen, rejected; or completion, label; each perhaps with prompt
text               {column}: a text; one message of the role `text`. Never told by its columns: a column of that name is
                   more often half of a question and its answer
auto               each row by its own columns, in this order: `chosen` with `rejected`, a list in `messages` or in
                   `conversations`, then `instruction` with `output`, then `prompt` with `completion` (and `label`, where
                   it holds true or false)
"""

from collections.abc import Collection
from typing import Any, Literal

from regraft.messages import TEXT
from regraft.validate.preferences import has_form, is_judged, is_pair, turns

Named = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "preference", "text"]
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_COLUMNS: dict[Named, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
_LISTS = ("messages", "conversations")
KNOWN = (
    "a list in `messages` or `conversations`, `instruction` and `output`, `prompt` and `completion`, or `chosen` and "
    "`rejected` (or `completion` and a `label` of true or false)"
)


def columns_of_layout(layout: Named, column: str) -> tuple[str, ...]:
    """Return the columns that every row of a layout has."""
    return _COLUMNS.get(layout, (column,))


def detect(columns: Collection[str], record: dict[str, Any] | None = None) -> tuple[Named, str] | None:
    """Return the layout of rows with these columns, and the column of the list of turns ("" where there is none).

    Args:
        columns: names of columns.
        record: a row, which tells the two kinds of lists apart; without, the name of the column does.
    """
    if is_pair(columns):
        return "preference", ""
    for column in _LISTS:
        if column in columns and (record is None or isinstance(record.get(column), list)):
            first = next(iter((record or {}).get(column) or ()), None)
            if isinstance(first, dict):
                return ("sharegpt" if "from" in first else "messages"), column
            return ("messages" if column == "messages" else "sharegpt"), column
    if record is not None and is_judged(record):
        return "preference", ""
    for layout, needed in _COLUMNS.items():
        if set(needed) <= set(columns):
            return layout, ""
    return ("preference", "") if record is None and has_form(columns) else None


def conversation(record: dict[str, Any], layout: Named, column: str) -> list[dict[str, str]] | None:
    """Return the turns of a row as {role, content}; None where it is not of the layout, or one of preferences.

    A speaker that is not known stays as he is, so that the row is quarantined for its roles.
    """
    match layout:
        case "messages":
            return turns(record.get(column))
        case "sharegpt":
            return _spoken(record.get(column))
        case "alpaca":
            return _alpaca(record)
        case "prompt_completion":
            return _prompt_completion(record)
        case "preference":
            return None
        case "text":
            text = record.get(column)
            return [{"role": TEXT, "content": text}] if isinstance(text, str) else None


def _spoken(value: Any) -> list[dict[str, str]] | None:
    if not isinstance(value, list) or not value:
        return None
    messages = []
    for each in value:
        speaker, text = (each.get("from"), each.get("value")) if isinstance(each, dict) else (None, None)
        if not isinstance(speaker, str) or not isinstance(text, str):
            return None
        messages.append({"role": _SPEAKERS.get(speaker, speaker), "content": text})
    return messages


def _alpaca(record: dict[str, Any]) -> list[dict[str, str]] | None:
    instruction, given, output, system = (record.get(name) for name in ("instruction", "input", "output", "system"))
    if not isinstance(instruction, str) or not isinstance(output, str):
        return None
    if not isinstance(given, str | None) or not isinstance(system, str | None):
        return None
    question = f"{instruction}\n\n{given}" if given and given.strip() else instruction
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": question}, {"role": "assistant", "content": output}]


def _prompt_completion(record: dict[str, Any]) -> list[dict[str, str]] | None:
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    before, after = turns(prompt), turns(completion)
    return None if before is None or after is None else [*before, *after]
