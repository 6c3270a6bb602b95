"""Conversations that call tools, in OpenAI's form: `tools`, `tool_calls`, and messages of the role `tool`.

Arguments may be an object or, as OpenAI writes them, JSON text of one; templates take objects. What is kept is JSON text in
the order in which it was written: the model learns to write it so.
"""

import json
from collections.abc import Sequence
from typing import Any

from regraft.messages import called


class WrongTools(ValueError):
    """Definitions or calls that no template could render."""


def conversation(value: Any, tools: Any) -> list[dict[str, str]] | None:
    """Return the messages of a row that may call tools; None where it is not a list of messages.

    Args:
        value: a list of messages.
        tools: the definitions: a list, the JSON text of one, or None.

    Raises:
        WrongTools: a definition or call is not of OpenAI's form.
    """
    if not isinstance(value, list) or not value:
        return None
    messages = []
    for each in value:
        if not isinstance(each, dict):
            return None
        message = _message({name: found for name, found in each.items() if found is not None})
        if message is None:
            return None
        messages.append(message)
    if definitions := _definitions(tools):
        messages[0]["tools"] = json.dumps(definitions, ensure_ascii=False)
    return messages


def turns_fit(messages: Sequence[dict[str, str]]) -> bool:
    """Say whether roles follow each other as they may: after a call its results, after results an answer or a call."""
    expected: tuple[str, ...] = ("user",)
    for message in messages[1:] if messages[0]["role"] == "system" else messages:
        if message["role"] not in expected:
            return False
        match message["role"]:
            case "user":
                expected = ("assistant",)
            case "tool":
                expected = ("tool", "assistant")
            case _:
                expected = ("tool",) if message.get("tool_calls") else ("user",)
    return True


def calls_fit(messages: Sequence[dict[str, str]]) -> bool:
    """Say whether every call is of a tool that is defined (where any is), and every result of a call that was made."""
    defined = {each["function"]["name"] for each in json.loads(messages[0].get("tools") or "[]")}
    open_: set[str | None] = set()
    for message in messages:
        if calls := message.get("tool_calls"):
            if defined and not defined.issuperset(called(message)):
                return False
            open_ = {each.get("id") for each in json.loads(calls)}
        elif message["role"] == "tool" and message.get("tool_call_id", next(iter(open_), None)) not in open_:
            return False
    return True


def _message(each: dict[str, Any]) -> dict[str, str] | None:
    role, content, calls = each.pop("role", None), each.pop("content", None), each.pop("tool_calls", None)
    if not isinstance(role, str) or not isinstance(content, str | None):
        return None
    made = {"role": role, "content": content or ""}
    if calls:
        if role != "assistant":
            raise WrongTools(f"a message of the role {role[:20]} calls a tool")
        made["tool_calls"] = json.dumps([_call(call) for call in _list(calls)], ensure_ascii=False)
    elif content is None:
        return None
    for name in ("tool_call_id", "name"):
        if name in each and role == "tool":
            if not isinstance(found := each.pop(name), str):
                return None
            made[name] = found
    return None if each else made


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise WrongTools("a call names no function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}", parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise WrongTools("the arguments of a call are not JSON") from error
    if not isinstance(arguments, dict):
        raise WrongTools("the arguments of a call are not an object")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _definitions(tools: Any) -> list[Any]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except (ValueError, RecursionError) as error:
            raise WrongTools("the definitions of the tools are not JSON") from error
    definitions = _list(tools or [])
    for each in definitions:
        function = each.get("function") if isinstance(each, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise WrongTools("a definition of a tool names no function")
    return definitions


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise WrongTools("tools and calls are lists")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
