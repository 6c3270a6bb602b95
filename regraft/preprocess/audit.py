"""The supervision audit: measured on finished tokens and labels by decoding them, not by how they were made."""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from regraft.chat import IGNORED, Chat, Message, Rendered
from regraft.messages import has_tools, is_text, leaves, words
from regraft.preprocess.report import Supervision
from regraft.preprocess.tokenizer import KeptTokenizer
from regraft.sealed import unknown_id

if TYPE_CHECKING:
    import numpy as np

_COMPARED = 256  # rows that the plain tokenizer tokenises again; of the rest a sixteenth


class Audit:
    """Adds up what the training rows teach; `add` takes them in batches."""

    def __init__(self, chat: Chat, tokenizer: Any) -> None:
        self._chat = chat
        self._tokenizer = tokenizer
        self._unknown = unknown_of(tokenizer)
        # What the model does not know becomes a special token too, but nobody gains control by it.
        self._special = frozenset(chat.sealed.special.values()) - {self._unknown}
        self._expected: dict[tuple[str, ...], int] = {}
        self._sums = dict.fromkeys(Supervision.model_fields.keys() - {"truncated", "dropped_share"}, 0)

    def add(self, conversations: Sequence[Sequence[Message]], rendered: Sequence[Rendered]) -> None:
        """Measure training rows; `conversations` are the messages that each was rendered from."""
        sums, sealed = self._sums, self._chat.sealed
        learned = [[row.input_ids[first:end] for first, end in row.answers] for row in rendered]
        texts = iter(sealed.decode([ids for row in learned for ids in row]))
        wholes = sealed.decode([row.input_ids for row in rendered])
        comparable: list[Rendered] = []
        for messages, row, answers, whole in zip(conversations, rendered, learned, wholes, strict=True):
            kept = [label for label in row.labels if label != IGNORED]
            sums["rows"] += 1
            sums["tokens"] += len(row.input_ids)
            sums["longest"] = max(sums["longest"], len(row.input_ids))
            sums["trained_tokens"] += len(kept)
            sums["answers"] += len(answers)
            sums["rows_training_nothing"] += not kept
            sums["rows_learning_to_stop"] += bool(kept) and kept[-1] in self._chat.stop_ids
            sums["round_trip"] += _same(whole, row.text)
            sums["kept_apart"] += row.kept_apart
            typed = any(sealed.hide(words(each), keep_added=False) != words(each) for each in messages)
            sums["control_text"] += typed
            control = sum(id_ in self._special for id_ in row.input_ids)
            sums["control_leaked"] += max(0, control - self._control_of_template(messages, row))
            if self._unknown is not None:
                sums["unknown_tokens"] += row.input_ids.count(self._unknown) - sealed.count(row.text, self._unknown)
            for turn in row.turns:
                written = _composed(next(texts))
                if is_text(messages) or messages[turn].get("tool_calls"):
                    whole_turn = self._whole_turn(messages, turn, row, written)
                    sums["answers_recovered"] += whole_turn
                    sums["answers_exact"] += whole_turn
                    continue
                answer = _composed(sealed.seal(sealed.hide(messages[turn]["content"], keep_added=True)))
                sums["answers_recovered"] += answer.strip() in written
                # Templates trim, or set a blank before an answer; a line break of a header is neither.
                whole_answers = {text + self._chat.ending for text in (answer, answer.strip())}
                sums["answers_exact"] += written in whole_answers or written.removeprefix(" ") in whole_answers
            if not typed and not row.kept_apart and (sums["rows"] <= _COMPARED or not sums["rows"] % 16):
                comparable.append(row)
        plain = self.retokenised([sealed.unseal(row.text) for row in comparable])
        sums["agreement_rows"] += len(comparable)
        sums["agreement"] += sum(row.input_ids == ids for row, ids in zip(comparable, plain, strict=True))

    def add_right(self, *, lengths: "np.ndarray", trained: "np.ndarray", answers: int, stopping: int) -> None:
        """Add rows of which `columns.py` has already seen that tokens and answers come back as they were written."""
        sums = self._sums
        if not len(lengths):
            return
        sums["rows"] += len(lengths)
        sums["round_trip"] += len(lengths)
        sums["tokens"] += int(lengths.sum())
        sums["longest"] = max(sums["longest"], int(lengths.max()))
        sums["trained_tokens"] += int(trained.sum())
        sums["rows_training_nothing"] += int((trained == 0).sum())
        sums["rows_learning_to_stop"] += stopping
        for name in ("answers", "answers_recovered", "answers_exact"):
            sums[name] += answers

    def add_agreement(self, rows: int, same: int) -> None:
        """Add rows that were tokenised again, and how many gave the same tokens."""
        self._sums["agreement_rows"] += rows
        self._sums["agreement"] += same

    @property
    def sums(self) -> dict[str, int]:
        """What was added up, for `supervision`."""
        return dict(self._sums)

    def result(self, dropped_share: float) -> Supervision:
        """Return the audit of all rows added; see `supervision`."""
        return supervision([self._sums], dropped_share)

    def _control_of_template(self, messages: Sequence[Message], row: Rendered) -> int:
        """Return how many special tokens the template writes for such a sequence of roles."""
        upto = row.turns[-1] + 1
        if has_tools(messages):
            neutral = [{**message, "content": "x" if message["content"] else ""} for message in messages[:upto]]
            ids = self._chat.encode([neutral], "last")[0].input_ids
            return sum(id_ in self._special for id_ in ids)
        roles = tuple(message["role"] for message in messages[:upto])
        if roles not in self._expected:
            if len(self._expected) > 10_000:
                self._expected.clear()
            neutral = [{"role": role, "content": "x"} for role in roles]
            ids = self._chat.encode([neutral], "last")[0].input_ids
            self._expected[roles] = sum(id_ in self._special for id_ in ids)
        return self._expected[roles]

    def _whole_turn(self, messages: Sequence[Message], turn: int, row: Rendered, written: str) -> bool:
        """Say whether a plain text, or what a turn says and all that it calls with every argument, comes back."""
        if is_text(messages):
            return written == _composed(row.text)
        plain = self._chat.unsealed(written)
        calls = json.loads(messages[turn]["tool_calls"])
        parts = [text for each in calls for text in leaves(each["function"])]
        parts = [part for part in parts if part not in ("name", "arguments")]
        return all(
            _composed(part) in plain or json.dumps(part)[1:-1] in plain for part in (*parts, messages[turn]["content"])
        )

    def retokenised(self, texts: list[str]) -> list[list[int]]:
        """Tokenise rendered texts with the tokenizer as it is."""
        if not texts:
            return []
        return list(self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


@lru_cache(maxsize=4)
def unknown_of(tokenizer: Any) -> int | None:
    """Return `unknown_id` of a tokenizer, once: it reads the whole vocabulary as JSON, and every shard has audits."""
    return tokenizer.unknown if isinstance(tokenizer, KeptTokenizer) else unknown_id(tokenizer)


def supervision(added: Sequence[Mapping[str, int]], dropped_share: float) -> Supervision:
    """Return the audit of what several added up; `dropped_share` of all rows were too long or had nothing to train on."""
    names = Supervision.model_fields.keys() - {"truncated", "dropped_share"}
    sums = {name: (max if name == "longest" else sum)([each[name] for each in added]) for name in names}
    counts = {n: v for n, v in sums.items() if Supervision.model_fields[n].annotation is int}
    return Supervision(
        **counts,
        rows_learning_to_stop=_share(sums["rows_learning_to_stop"], sums["rows"]),
        answers_recovered=_share(sums["answers_recovered"], sums["answers"]),
        answers_exact=_share(sums["answers_exact"], sums["answers"]),
        round_trip=_share(sums["round_trip"], sums["rows"]),
        agreement=_share(sums["agreement"], sums["agreement_rows"]),
        truncated=0,
        dropped_share=dropped_share,
    )


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _same(one: str, other: str) -> bool:
    return one == other or _composed(one).strip() == _composed(other).strip()
