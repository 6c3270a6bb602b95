"""From a record of a file to a conversation, by the columns and templates of section `data`."""

import difflib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from json.encoder import encode_basestring
from typing import Any

from regraft.errors import DataError, ParamsError
from regraft.messages import leaves
from regraft.validate import tools
from regraft.validate.layouts import KNOWN, columns_of_layout, conversation, detect
from regraft.validate.params import DataParams, Reason, ValidateParams
from regraft.validate.patterns import mask
from regraft.validate.preferences import FORMS, Preferred, has_form, preferred
from regraft.validate.source import DataFile, columns_of
from regraft.validate.template import as_text, columns, fill, parse

_ROLES = ("user", "assistant")
_INVISIBLE = " \t\r\n\u00a0\u200b\u2060\ufeff"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_STRICT = json.JSONDecoder(parse_constant=_refuse)


@dataclass
class Row:
    """A conversation, and what is wrong with its structure."""

    messages: list[dict[str, str]]
    slices: dict[str, str]
    at: str | None
    id: str | None
    reasons: set[Reason] = field(default_factory=set)
    label: str | None = None
    """The label that is not allowed, where the row has such a one."""
    size: int = 0
    """UTF-8 bytes of all texts."""
    rejected: str | None = None
    """Of a pair, the answer that is not preferred to the last message."""
    wanted: bool | None = None
    """Of a single answer that is judged, whether it is wanted."""

    @cached_property
    def text(self) -> str:
        """Everything that a model or a report would get to see, in one text."""
        said = [each["content"] for each in self.messages]
        for each in self.messages:
            if len(each) > 2:
                said += [each[name] for name in ("tool_call_id", "name") if name in each]
                said += [
                    leaf for name in ("tool_calls", "tools") if name in each for leaf in leaves(json.loads(each[name]))
                ]
        if self.rejected is not None:
            said.append(self.rejected)
        return "\n".join((*said, *self.slices.values()))

    @property
    def is_preference(self) -> bool:
        """Whether it says what is preferred."""
        return self.rejected is not None or self.wanted is not None


class Mapping:
    """The columns and templates of section `data`, parsed once."""

    def __init__(self, data: DataParams, params: ValidateParams, source: str | None = None) -> None:
        self.data = data
        self.params = params
        self.source = source
        """The source that the rows are of; None where there are none."""
        self.preferences = False
        """Whether all rows are preferences; `mappings` finds out."""
        self._prompt, self._answer, self._system = (
            parse(template) if template else None for template in (data.prompt, data.answer, data.system)
        )
        self._slices = sorted((name, parse(template)) for name, template in data.slices.items())
        self._allowed = None if params.labels is None else params.labels.allowed
        self._labels = frozenset(self._allowed or ())

    def row(self, record: dict[str, Any]) -> Row | None:
        """Return the row that a record makes, or `None` where a column is missing or holds something else."""
        own = self._preferred(record)
        if own is None and self.preferences:
            return None
        try:
            messages, wrong = self._messages(record) if own is None else own.messages, False
        except tools.WrongTools:
            messages, wrong = conversation(self._without_tools(record), "messages", self.data.turns), True
        if messages is None:
            return None
        slices = {name: text for name, pieces in self._slices if (text := fill(pieces, record))}
        if self.source is not None:
            slices["source"] = self.source
        identity = as_text(record.get(self.data.id)) if self.data.id else ""
        row = Row(messages, slices, None, identity or None, {Reason.WRONG_TOOLS} if wrong else set())
        if own is not None:
            row.rejected, row.wanted, row.reasons = own.rejected, own.wanted, set(own.reasons)
        self._judge_time(row, record)
        self._judge_turns(row)
        answered = self.data.layout != "text" and not row.messages[-1].get("tool_calls")
        answered = answered and row.wanted is not False
        if answered and not row.reasons & {Reason.WRONG_ROLES, Reason.MISSING_ANSWER}:
            self._judge_answer(row, messages[-1]["content"])
        try:
            row.size = len(row.text.encode()) + len(identity.encode())
        except UnicodeEncodeError:  # half of a surrogate pair, written as an escape in JSON
            row.reasons.add(Reason.NOT_UTF8)
        return row

    def _preferred(self, record: dict[str, Any]) -> Preferred | None:
        if not self.preferences:
            return None
        told = self.data.layout == "preference" or (detect(record, record) or ("",))[0] == "preference"
        return preferred(record) if told else None

    def _messages(self, record: dict[str, Any]) -> list[dict[str, str]] | None:
        if self.data.layout == "auto":
            found = detect(record, record)
            return None if found is None else conversation(record, *found)
        if self.data.tools is not None:
            return tools.conversation(record.get(self.data.turns), record.get(self.data.tools))
        if self.data.layout != "prompt_answer":
            return conversation(record, self.data.layout, self.data.turns)
        assert self._prompt is not None
        assert self._answer is not None
        texts = {"user": fill(self._prompt, record), "assistant": fill(self._answer, record)}
        if self._system is not None:
            texts = {"system": fill(self._system, record), **texts}
        messages = [{"role": role, "content": text} for role, text in texts.items() if text is not None]
        return messages if len(messages) == len(texts) else None

    def _without_tools(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the words of a row whose tools are wrong, so that it is seen what else is in it."""
        turns = record.get(self.data.turns)
        if not isinstance(turns, list) or not all(isinstance(each, dict) for each in turns):
            return {}
        said = [{"role": each.get("role"), "content": each.get("content") or ""} for each in turns]
        return {self.data.turns: said}

    def _judge_time(self, row: Row, record: dict[str, Any]) -> None:
        found = record.get(self.data.time) if self.data.time else None
        if found is None or found == "":
            return
        try:
            time = datetime.fromisoformat(found)
            if time.tzinfo is not None:
                time = time.astimezone(UTC)
        except (TypeError, ValueError, OverflowError):  # the last: the first day of the year 1, further east
            row.reasons.add(Reason.WRONG_TIME)
            return
        row.at = time.date().isoformat() if len(found) <= len("2026-09-01") else time.isoformat()

    def _judge_turns(self, row: Row) -> None:
        if self.data.layout == "text":
            if not row.messages[0]["content"].strip(_INVISIBLE):
                row.reasons.add(Reason.EMPTY_TEXT)
            return
        if self.data.tools is not None:
            self._judge_tools(row)
            return
        roles = [message["role"] for message in row.messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if any(role != _ROLES[place % 2] for place, role in enumerate(turns)):
            row.reasons.add(Reason.WRONG_ROLES)
        elif not turns or turns[-1] != "assistant":
            row.reasons.add(Reason.MISSING_ANSWER)
        texts = [*(message["content"] for message in row.messages), *([] if row.rejected is None else [row.rejected])]
        if any(not text.strip(_INVISIBLE) for text in texts):
            row.reasons.add(Reason.EMPTY_TEXT)

    def _judge_tools(self, row: Row) -> None:
        if Reason.WRONG_TOOLS in row.reasons:
            return  # without its calls nothing can be said of the roles
        if not tools.turns_fit(row.messages):
            row.reasons.add(Reason.WRONG_ROLES)
        elif row.messages[-1]["role"] != "assistant":
            row.reasons.add(Reason.MISSING_ANSWER)
        if not tools.calls_fit(row.messages):
            row.reasons.add(Reason.WRONG_TOOLS)
        for each in row.messages:  # a call needs no words, and a tool may find nothing
            if not (each["content"].strip(_INVISIBLE) or each.get("tool_calls") or each["role"] == "tool"):
                row.reasons.add(Reason.EMPTY_TEXT)

    def _judge_answer(self, row: Row, answer: str) -> None:
        value: Any = answer
        if self.params.answers_are_json:
            try:
                value = _STRICT.decode(answer)
            except (ValueError, RecursionError):
                row.reasons.add(Reason.ANSWER_NOT_JSON)
                return
        if self.params.labels is None:
            return
        if self.params.labels.json_field is not None:
            value = value.get(self.params.labels.json_field) if isinstance(value, dict) else None
        if not isinstance(value, str) or (self._allowed is not None and value not in self._labels):
            row.label = value if isinstance(value, str) else "(none)"
            row.reasons.add(Reason.UNKNOWN_LABEL)


def row_digests(row: Row) -> tuple[str, bytes]:
    """Return the `row_id` (messages and slices) and the key that tells duplicates (messages alone).

    The row_id is the first 32 hexadecimal digits of the sha256 of the canonical JSON of {messages, slices}; of a
    preference, `messages` is {messages, rejected, wanted}.
    """
    messages = "[" + ",".join(map(_canonical, row.messages)) + "]"
    if row.is_preference:
        rejected = "null" if row.rejected is None else encode_basestring(row.rejected)
        wanted = {None: "null", True: "true", False: "false"}[row.wanted]
        messages = f'{{"messages":{messages},"rejected":{rejected},"wanted":{wanted}}}'
    content = messages.encode()
    whole = b'{"messages":%b,"slices":%b}' % (content, _canonical(row.slices).encode())
    return hashlib.sha256(whole).hexdigest()[:32], hashlib.sha256(content).digest()[:16]


def _canonical(texts: dict[str, str]) -> str:
    """Return what `artifacts.canonical_json` does for texts by name, in a quarter of the time."""
    return "{" + ",".join(f"{encode_basestring(name)}:{encode_basestring(texts[name])}" for name in sorted(texts)) + "}"


def check_columns(data: DataParams, files: Iterable[DataFile], longest: int) -> None:
    """Check that every column that section `data` names is in every file that has rows.

    Raises:
        ParamsError: no file has a column of that name; with the columns found and the one probably meant.
        DataError: some files have it and others have not; with the names of the others.
    """
    wanted = _wanted(data)
    seen = {}
    for file in files:
        if file.format is not None and (found := columns_of(file, set(wanted), longest)):
            seen[file.name] = found
    known = sorted(set().union(*seen.values()))
    if data.layout == "auto" and (strange := [name for name, found in seen.items() if detect(found) is None]):
        raise ParamsError(
            f"data.layout is `auto`, but {', '.join(strange[:5])} has no known layout: expected {KNOWN}\n  "
            f"columns found: {_listed(known)}",
            fix="set data.layout to `prompt_answer` with templates over these columns, or name the column at data.messages",
        )
    if data.layout == "preference" and (strange := [name for name, found in seen.items() if not has_form(found)]):
        raise ParamsError(
            f"data.layout is `preference`, but {', '.join(strange[:5])} has no such columns: expected {FORMS}\n  "
            f"columns found: {_listed(known)}",
            fix="rename the columns, or set data.layout to what the rows are",
        )
    if data.tools is not None and seen and all(data.tools not in found for found in seen.values()):
        raise ParamsError(
            f"data.tools names the column `{data.tools}`, which is in no file\n  columns found: {_listed(known)}",
            fix="edit section `data` of params.yaml",
        )
    nowhere, elsewhere = [], []
    for column, where in wanted.items():
        lacking = [name for name, found in seen.items() if column not in found]
        if not lacking:
            continue
        if len(lacking) < len(seen):
            elsewhere.append(f"{', '.join(lacking)}: no column `{column}`, which `data.{where}` names")
            continue
        close = difflib.get_close_matches(column, known, n=1, cutoff=0.5)
        hint = f"; did you mean `{_listed(close)}`?" if close else ""
        nowhere.append(f"data.{where} names the column `{column}`, which is in no file{hint}")
    if nowhere:
        raise ParamsError(
            "\n  ".join((*nowhere, f"columns found: {_listed(known)}")), fix="edit section `data` of params.yaml"
        )
    if elsewhere:
        raise DataError("\n  ".join(elsewhere), fix="give these files the same columns, or take them out of data.raw")


def _listed(columns: list[str]) -> str:
    """List columns for a message; a file without a header has a row of data in their place, so each is masked and cut."""
    shown = [mask(column)[:40].encode(errors="replace").decode() for column in columns[:20]]
    return ", ".join(shown) + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")


def _wanted(data: DataParams) -> dict[str, str]:
    """Return every column named, with the parameter that names it."""
    wanted: dict[str, str] = {}
    if data.layout != "auto" and data.layout != "prompt_answer" and data.layout != "preference":
        wanted |= dict.fromkeys(columns_of_layout(data.layout, data.turns), "messages")
    for where in ("prompt", "answer", "system"):
        template: str | None = getattr(data, where)
        wanted |= {column: where for column in columns(template or "") if column not in wanted}
    for where, column in (("id", data.id), ("time", data.time)):
        if column is not None:
            wanted.setdefault(column, where)
    for name, template in data.slices.items():
        for column in columns(template):
            wanted.setdefault(column, f"slices.{name}")
    return wanted
