"""What a message of a conversation holds besides `role` and `content`, and all that is said in it as one text.

    tool_calls     JSON: what an assistant asks tools for, [{"type": "function", "function": {"name", "arguments"}}]
    tool_call_id   which call a message of the role `tool` answers
    name           the tool that it comes from
    tools          JSON, on the first message: what may be called, as the chat template gets it

A row of plain text is one message of the role `text`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

TEXT = "text"
"""Role of a plain text's only message."""
EXTRAS = ("tool_calls", "tool_call_id", "name", "tools")
"""What a message may hold besides role and content, each a string."""


def words(message: Mapping[str, str]) -> str:
    """Return the content of a message, with the calls and tools in it as JSON, a line each."""
    calls, tools = message.get("tool_calls"), message.get("tools")
    if not calls and not tools:
        return message["content"]
    return "\n".join(filter(None, (tools, message["content"], calls)))


def is_text(messages: Sequence[Mapping[str, str]]) -> bool:
    """Say whether a row is plain text, and no conversation."""
    return len(messages) == 1 and messages[0]["role"] == TEXT


def has_tools(messages: Sequence[Mapping[str, str]]) -> bool:
    """Say whether a conversation names tools, or calls them."""
    return any(each.get("tool_calls") or each.get("tools") for each in messages)


def called(message: Mapping[str, str]) -> list[str]:
    """Return the names of the functions that a message calls."""
    return [each["function"]["name"] for each in json.loads(message.get("tool_calls") or "[]")]


def leaves(value: Any) -> Iterator[str]:
    """Yield every string within a JSON value, names of members included: what an escape would hide is plain in them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield str(name)
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)
