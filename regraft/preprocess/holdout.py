"""Which side a row is on, decided by its own content alone, and which rows are left out for another's sake.

A row's side never changes when rows are added. What others decide is only whether it is a duplicate, and whether a
*training* row has to go because its prompt is in the holdout; a holdout row never goes for a training row.
"""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from regraft.chat import Message, last_answer
from regraft.messages import is_text, words
from regraft.preprocess.params import HoldoutParams

if TYPE_CHECKING:
    import numpy as np


class Fate(IntEnum):
    """What becomes of a row."""

    TRAIN = 0
    HOLDOUT = 1
    DEDUPLICATED = 2
    LEAKED = 3
    TOO_LONG = 4
    NOTHING_TO_TRAIN = 5
    NEAR = 6
    CONTAMINATED = 7
    AGED = 8
    DECONTAMINATED = 9
    NEAR_DUPLICATE = 10
    SAMPLED = 11


def content_key(messages: Sequence[Message]) -> str:
    """Return the sha256 of all that precedes the last assistant message; letter case and spacing do not count.

    Messages are joined by line breaks after NFC, case folding and the collapse of white space. A conversation without
    an assistant message is taken whole.
    """
    return hashlib.sha256(prompt_text(messages).encode("utf-8", "surrogatepass")).hexdigest()


def prompt_text(messages: Sequence[Message]) -> str:
    """Return all that precedes the last assistant message, folded; see `content_key`."""
    last = len(messages)
    for i in range(len(messages) - 1, -1, -1):
        if messages[i]["role"] == "assistant":
            last = i
            break
    return "\n".join([plain(words(message)) for message in messages[:last]])


def held_out(key: str, slices: Mapping[str, str], params: HoldoutParams) -> bool:
    """Say whether a row is on the holdout's side: by one of its slices, or by its key, which is as good as random."""
    if params.always and any(slices.get(name) == value for name, value in params.always.items()):
        return True
    return int(key[:8], 16) / 2**32 < params.share


def row_entry(row: Mapping[str, Any], params: HoldoutParams) -> tuple[str, str, str, str, int]:
    """Return (key, answer digest, time, row id, fate as far as the row itself decides it).

    `row` has `messages`, `slices` (a mapping), `at` and `row_id`, as `rows.parquet` has them; a preference also
    `rejected` and `wanted`, which are part of its answer.
    """
    messages: Sequence[Message] = row["messages"]
    key = content_key(messages)
    last = last_answer(messages)
    answer = "" if last is None else words(messages[last])
    if is_text(messages):  # there is no answer to be judged by: never held out
        always = any(row["slices"].get(name) == value for name, value in params.always.items())
        fate = Fate.TRAIN if messages[0]["content"].strip() and not always else Fate.NOTHING_TO_TRAIN
    elif not answer.strip():
        fate = Fate.NOTHING_TO_TRAIN
    else:
        fate = Fate.HOLDOUT if held_out(key, row["slices"], params) else Fate.TRAIN
    if "rejected" in row:
        answer = json.dumps([answer, row["rejected"], row["wanted"]])
    digest = hashlib.sha256(answer.encode("utf-8", "surrogatepass")).hexdigest()
    at = row["at"] or "~"  # sorts after every date
    if not at.isascii():
        at = at.encode("ascii", "replace").decode()
    return key, digest[:32], at, row["row_id"], fate


def decide(
    keys: "np.ndarray", answers: "np.ndarray", times: "np.ndarray", ids: "np.ndarray", fates: "np.ndarray"
) -> None:
    """Set the fates of duplicates and of training rows whose prompt is held out, in place.

    Of equal rows (prompt and answer) of one side the earliest stays; without times, the one with the lowest id. All
    arrays are as long as there are rows; of any type that can be sorted, `fates` int8.
    """
    import numpy as np

    holdout = np.unique(keys[fates == Fate.HOLDOUT])
    fates[(fates == Fate.TRAIN) & np.isin(keys, holdout)] = Fate.LEAKED
    for side in (Fate.TRAIN, Fate.HOLDOUT):
        (where,) = np.nonzero(fates == side)
        own = np.sort(keys[where])  # four columns need not be sorted for a prompt that occurs once
        where = where[np.isin(keys[where], own[1:][own[1:] == own[:-1]])]
        order = where[np.lexsort((ids[where], times[where], answers[where], keys[where]))]
        again = (keys[order][1:] == keys[order][:-1]) & (answers[order][1:] == answers[order][:-1])
        fates[order[1:][again]] = Fate.DEDUPLICATED


def plain(text: str) -> str:
    """Return a text after NFC, case folding and the collapse of white space."""
    if text.isascii():
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
