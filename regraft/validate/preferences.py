r"""Rows that say which of two answers is preferred, or whether one answer is wanted; the forms that TRL's data sets have.

    prompt, chosen, rejected     one prompt with two answers; each of them a text or a list of {role, content}
    chosen, rejected             two whole conversations, or two texts, that are the same up to their last answers;
                                 also transcripts with "\n\nHuman:" and "\n\nAssistant:"
    prompt, completion, label    one answer, and whether it is wanted; `completion` may be a whole conversation

Everything before the last answers must be the same in both, so a pair is one conversation and one more answer.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from regraft.validate.params import Reason

_Messages = list[dict[str, str]]
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
_LABELS = {"true": True, "false": False, "1": True, "0": False}
FORMS = "`chosen` and `rejected`, or `completion` and `label`; perhaps with `prompt`"


@dataclass(frozen=True)
class Preferred:
    """A conversation with the preferred answer, or the one that is judged, and what it is preferred to."""

    messages: _Messages
    rejected: str | None
    """The other answer; None where one answer is judged."""
    wanted: bool | None
    """Whether the one answer is wanted; None where there are two."""
    reasons: frozenset[Reason] = frozenset()


def is_pair(columns: Collection[str]) -> bool:
    """Say whether rows with these columns are pairs."""
    return "chosen" in columns and "rejected" in columns


def is_judged(record: dict[str, Any]) -> bool:
    """Say whether a row is an answer with a label that is true or false."""
    label = record.get("label")
    return "completion" in record and (isinstance(label, bool) or str(label).lower() in ("true", "false"))


def has_form(columns: Collection[str]) -> bool:
    """Say whether rows with these columns can be preferences."""
    return is_pair(columns) or {"completion", "label"} <= set(columns)


def turns(value: Any) -> _Messages | None:
    """Return a list of {role, content}; `None` for anything else, and where a message holds more than that."""
    if not isinstance(value, list) or not value:
        return None
    messages = []
    for each in value:
        if not isinstance(each, dict):
            return None
        role, content = each.get("role"), each.get("content")
        if len(each) != 2 and any(other is not None for key, other in each.items() if key not in ("role", "content")):
            return None
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append({"role": role, "content": content})
    return messages


def preferred(record: dict[str, Any]) -> Preferred | None:
    """Return what a row prefers; None where a column is missing or holds something else."""
    if is_pair(record) and record["chosen"] is not None:
        return _pair(record.get("prompt"), record["chosen"], record["rejected"])
    if "completion" not in record:
        return None
    wanted = _label(record.get("label"))
    found = _whole(record.get("prompt"), record["completion"])
    if found is None or wanted is None:
        return None
    messages, reasons = found
    return Preferred(messages, None, wanted, reasons)


def _label(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return _LABELS.get(str(value).strip().lower()) if isinstance(value, int | str) else None


def _pair(prompt: Any, chosen: Any, rejected: Any) -> Preferred | None:
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _cut(chosen, rejected)
    first, second = _whole(prompt, chosen), _whole(prompt, rejected)
    if first is None or second is None:
        return None
    (messages, reasons), (others, its) = first, second
    found = {*reasons, *its}
    if messages[:-1] != others[:-1]:
        found.add(Reason.DIFFERENT_PROMPTS)
    if others[-1]["role"] != "assistant":
        found.add(Reason.WRONG_ROLES)
    if messages[-1]["content"].strip() == others[-1]["content"].strip():
        found.add(Reason.SAME_ANSWERS)
    return Preferred(messages, others[-1]["content"], None, frozenset(found))


def _whole(prompt: Any, answer: Any) -> tuple[_Messages, frozenset[Reason]] | None:
    """Return prompt and answer as one conversation; an answer may be the whole of it, and must begin as the prompt then."""
    before = _as_turns(prompt, "user")
    after = _as_turns(answer, "assistant")
    if before is None or not after:
        return None
    if after[0]["role"] == "assistant":
        return [*before, *after], frozenset()
    begins = not before or after[: len(before)] == before or (isinstance(prompt, str) and before[0] in after)
    return after, frozenset() if begins else frozenset({Reason.DIFFERENT_PROMPTS})


def _as_turns(value: Any, role: str) -> _Messages | None:
    if value is None:
        return []
    return [{"role": role, "content": value}] if isinstance(value, str) else turns(value)


def _cut(chosen: str, rejected: str) -> tuple[Any, Any, Any]:
    """Return prompt and answers of two texts that begin alike; transcripts as conversations, others cut between words."""
    if _TRANSCRIPT.match(chosen) and _TRANSCRIPT.match(rejected):
        return None, _transcript(chosen), _transcript(rejected)
    differs = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    same = chosen[: min(len(chosen), len(rejected)) if differs is None else differs]
    if len(same) < max(len(chosen), len(rejected)):
        same = same[: max((i + 1 for i, c in enumerate(same) if c.isspace()), default=0)]
    return same.rstrip(), chosen[len(same) :], rejected[len(same) :]


def _transcript(text: str) -> _Messages:
    pieces = _TRANSCRIPT.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]
