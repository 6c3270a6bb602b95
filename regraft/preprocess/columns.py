"""Conversations to tokens and labels in columns, a batch at a time, by the template's skeleton where it has one.

The tokens are those of `Chat.encode`, byte for byte; so is the mask. A conversation takes the short way only if all of
this was seen: its words hold nothing that the template or the tokenizer would treat as more than text; its control tokens
are as many as the template writes; the tokens before each answer are those of its header; the tokens, turned back into
bytes, are the rendered text, with each answer at its place. Any other goes through `Chat.encode`, as does one in 256 of
those that took the short way, to be compared.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from regraft.chat import IGNORED, Chat, Message, Rendered, Supervise, last_answer
from regraft.errors import DataError
from regraft.messages import has_tools
from regraft.preprocess.audit import Audit
from regraft.preprocess.files import numbers, texts
from regraft.preprocess.skeleton import Skeleton, Skeletons, byte_table

if TYPE_CHECKING:
    import numpy as np

_COMPARED = 256  # one conversation of so many takes both ways
_RETOKENISED = 64  # one of so many is tokenised again, by the tokenizer as it is
_TOKENISED, _LONG = 128, 2**20  # texts and characters at once: what is said of more does not stay in a core's cache


@dataclass
class Talks:
    """Conversations of one side, as `rows.parquet` has them."""

    places: list[int]
    """Where each is in its shard."""
    messages: list[list[Message]]
    names: list[str]
    """What an error calls each."""


@dataclass
class Tokens:
    """Conversations as tokens: flat columns, and a length for each conversation."""

    places: list[int] = field(default_factory=list)
    ids: list["np.ndarray"] = field(default_factory=list)
    labels: list["np.ndarray"] = field(default_factory=list)
    lengths: list["np.ndarray"] = field(default_factory=list)
    trained: list["np.ndarray"] = field(default_factory=list)
    prompts: list["np.ndarray"] = field(default_factory=list)
    """Tokens before the last answer."""
    too_long: list[tuple[int, int]] = field(default_factory=list)
    """Place and tokens."""
    nothing: list[int] = field(default_factory=list)


class Encoder:
    """Encodes batches; keeps the skeletons."""

    def __init__(
        self, chat: Chat, tokenizer: Any, supervise: Supervise | Literal["all"], max_length: int, *, short: bool
    ) -> None:
        import numpy as np

        self._chat = chat
        self._all = supervise == "all"  # the answers are told apart as for `assistant`, and more is learned
        self._supervise: Supervise = "assistant" if supervise == "all" else supervise
        self._max_length = max_length
        self._skeletons = Skeletons(chat, tokenizer, self._supervise)
        if not short:
            self._skeletons.refuse()
        self._plain = tokenizer
        self._composed = chat.sealed.rust.normalizer is not None
        self._last: dict[tuple[str, ...], int | None] = {}
        if self._skeletons.table is not None:
            self._table = _arrow_table(chat.sealed.rust)
            self._is_control = np.zeros(len(self._skeletons.table), bool)
            self._is_control[list(self._skeletons.control)] = True

    def encode(self, talks: Talks, into: Tokens, audit: Audit | None) -> None:
        """Append the conversations that fit to `into` and measure them; of others only the places."""
        short: dict[tuple[str, ...], list[int]] = {}
        long: list[int] = []
        # One search through all that is said in a batch instead of one for each message.
        said = "\n".join([each["content"] or "" for messages in talks.messages for each in messages])
        typed = self._chat.sealed.holds_control(said)
        for i, messages in enumerate(talks.messages):
            roles = self._short_way(messages, typed=typed)
            if roles is None:
                long.append(i)
            else:
                short.setdefault(roles, []).append(i)
        for roles, members in short.items():
            found = self._skeletons.of(roles)
            if found is None:
                long += members
                continue
            skeleton, needles = found
            words = [[each["content"] for each in talks.messages[i][: len(roles)]] for i in members]
            held = [k for k, each in enumerate(words) if any(n in w for n in needles for w in each)] if needles else []
            if held:
                long += [members[k] for k in held]
                apart = set(held)
                members = [i for k, i in enumerate(members) if k not in apart]
                words = [each for k, each in enumerate(words) if k not in apart]
            if members:
                long += self._by_skeleton(skeleton, members, words, talks, into, audit)
        if long:
            self._by_template(sorted(long), talks, into, audit)

    def _short_way(self, messages: Sequence[Message], *, typed: bool) -> tuple[str, ...] | None:
        """Return the roles up to the last answer where the words are plain, else None.

        `typed`: somebody may have typed a control token.
        """
        roles = tuple([message["role"] for message in messages])
        if roles not in self._last:
            if len(self._last) > 10_000:
                self._last.clear()
            self._last[roles] = last_answer(messages)
        last = self._last[roles]
        if self._skeletons.table is None or last is None or (max(map(len, messages)) > 2 and has_tools(messages)):
            return None
        for message in messages[: last + 1]:
            words = message["content"]
            if not words or len(words.strip()) != len(words) or (typed and self._chat.sealed.holds_control(words)):
                return None
            if self._composed and not words.isascii() and not unicodedata.is_normalized("NFC", words):
                return None
        return roles[: last + 1]

    def _by_template(self, members: list[int], talks: Talks, into: Tokens, audit: Audit | None) -> None:
        import numpy as np

        conversations = [talks.messages[i] for i in members]
        rendered = self._chat.encode(conversations, self._supervise, [talks.names[i] for i in members])
        kept: list[tuple[int, Rendered]] = []
        for i, row in zip(members, rendered, strict=True):
            if len(row.input_ids) > self._max_length:
                into.too_long.append((talks.places[i], len(row.input_ids)))
            elif all(end - start <= bool(self._chat.ending) for start, end in row.answers):
                into.nothing.append(talks.places[i])
            else:
                kept.append((i, row.learning_all() if self._all else row))
        if not kept:
            return
        into.places += [talks.places[i] for i, _ in kept]
        into.ids.append(np.fromiter(chain.from_iterable(row.input_ids for _, row in kept), np.int32))
        into.labels.append(np.fromiter(chain.from_iterable(row.labels for _, row in kept), np.int32))
        into.lengths.append(np.array([len(row.input_ids) for _, row in kept], np.int32))
        into.trained.append(np.array([sum(x != IGNORED for x in row.labels) for _, row in kept], np.int32))
        into.prompts.append(np.array([row.answers[-1][0] for _, row in kept], np.int32))
        if audit is not None:
            audit.add([talks.messages[i] for i, _ in kept], [row for _, row in kept])

    def _by_skeleton(
        self,
        skeleton: Skeleton,
        members: list[int],
        words: list[list[str]],
        talks: Talks,
        into: Tokens,
        audit: Audit | None,
    ) -> list[int]:
        """Encode conversations of one sequence of roles; return those that are not as the skeleton says."""
        import numpy as np

        written = [skeleton.text(each) for each in words]
        lengths, ids = _tokenised(self._chat.sealed.rust, written)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        firsts, lasts, right = self._spans(skeleton, ids, starts, lengths, written, words)

        long = lengths > self._max_length
        into.too_long += [(talks.places[members[i]], int(lengths[i])) for i in np.flatnonzero(long & right)]
        nothing = (lasts - firsts <= 1).all(axis=1)
        into.nothing += [talks.places[members[i]] for i in np.flatnonzero(nothing & right & ~long)]
        keep = right & ~long & ~nothing
        self._compare(keep, ids, starts, ends, firsts, lasts, members, talks, audit, written)

        marks = np.zeros(len(ids) + 1, np.int8)
        # Answers of one conversation do not touch: a header stands between. A first token is never learned.
        begin, end = ((starts + 1)[:, None], lasts[:, -1:]) if self._all else (firsts, lasts)
        marks[begin[keep].ravel()] += 1
        marks[end[keep].ravel()] -= 1
        labels = np.where(np.cumsum(marks[:-1], dtype=np.int8) > 0, ids, np.int32(IGNORED))
        chosen = np.repeat(keep, lengths)
        trained = (end - begin).sum(axis=1)
        kept = np.flatnonzero(keep)
        into.places += [talks.places[members[i]] for i in kept.tolist()]
        into.ids.append(ids[chosen])
        into.labels.append(labels[chosen])
        into.lengths.append(lengths[keep].astype(np.int32))
        into.trained.append(trained[keep].astype(np.int32))
        into.prompts.append((firsts[:, -1] - starts)[keep].astype(np.int32))
        if audit is not None:
            stops = np.isin(ids[lasts[:, -1] - 1], self._chat.stop_ids)
            audit.add_right(
                lengths=lengths[keep],
                trained=trained[keep],
                answers=int(keep.sum()) * len(skeleton.answers),
                stopping=int((stops & keep).sum()),
            )
        return [members[i] for i in np.flatnonzero(~right)]

    def _spans(
        self,
        skeleton: Skeleton,
        ids: "np.ndarray",
        starts: "np.ndarray",
        lengths: "np.ndarray",
        written: list[str],
        words: list[list[str]],
    ) -> tuple["np.ndarray", "np.ndarray", "np.ndarray"]:
        """Return first token and end of each answer (conversations by answers), and which conversations are as expected."""
        import numpy as np

        count, size = len(written), len(ids)
        (controls,) = np.nonzero(self._is_control[ids])
        owner = np.searchsorted(starts, controls, "right") - 1
        found = np.bincount(owner, minlength=count)
        right = found == skeleton.controls
        if self._skeletons.unknown is not None:
            bad = np.flatnonzero(ids == self._skeletons.unknown)
            right[np.searchsorted(starts, bad, "right") - 1] = False
        at = np.cumsum(found) - found

        together = "".join(written)
        source = together.encode()
        plain = len(source) == len(together)  # ASCII: a character is a byte
        each = chain.from_iterable(words)
        sizes = map(len, each) if plain else (len(x) if x.isascii() else len(x.encode()) for x in each)
        held = np.fromiter(sizes, np.int64, count * len(words[0])).reshape(count, -1)
        # What the tokens are, as bytes: the text of the batch, if nothing was changed on the way.
        bytes_: Any = self._table.take(numbers(ids))
        offsets = np.frombuffer(bytes_.buffers()[1], np.int32, size + 1, bytes_.offset * 4)
        same = np.diff(offsets[np.append(starts, size)]) == held.sum(axis=1) + skeleton.size
        content = np.frombuffer(bytes_.buffers()[2], np.uint8)[: offsets[-1]]
        if not same.all() or not np.array_equal(content, np.frombuffer(source, np.uint8)):
            for i in range(count):
                low, high = offsets[starts[i]], offsets[starts[i] + lengths[i]]
                right[i] &= content[low:high].tobytes() == written[i].encode()

        before = np.cumsum(held, axis=1) - held
        firsts = np.zeros((count, len(skeleton.answers)), np.int64)
        lasts = np.zeros_like(firsts)
        safe = np.append(controls, np.zeros(skeleton.controls, np.int64))  # what is not right may point beyond
        for k, answer in enumerate(skeleton.answers):
            header = safe[at + answer.header_at]
            first = np.minimum(header + len(answer.header), size - 1)
            for step, id_ in enumerate(answer.header):
                right &= ids[np.minimum(header + step, size - 1)] == id_
            last = safe[at + answer.end_at] + 1
            base = offsets[starts]
            start = answer.before + before[:, answer.turn]
            right &= offsets[first] - base == start
            right &= offsets[np.minimum(last, size)] - base == start + answer.length + held[:, answer.turn]
            firsts[:, k], lasts[:, k] = first, last
        return firsts, lasts, right

    def _compare(
        self,
        keep: "np.ndarray",
        ids: "np.ndarray",
        starts: "np.ndarray",
        ends: "np.ndarray",
        firsts: "np.ndarray",
        lasts: "np.ndarray",
        members: list[int],
        talks: Talks,
        audit: Audit | None,
        written: list[str],
    ) -> None:
        """Take some conversations the other way, too, and tokenise some again with the tokenizer as it is."""
        import numpy as np

        kept = np.flatnonzero(keep)
        places = np.array([talks.places[members[i]] for i in kept.tolist()], np.int64)
        some = kept[places % _COMPARED == 0].tolist()
        if some:
            names = [talks.names[members[i]] for i in some]
            rendered = self._chat.encode([talks.messages[members[i]] for i in some], self._supervise, names)
            for i, row in zip(some, rendered, strict=True):
                spans = [(int(a - starts[i]), int(b - starts[i])) for a, b in zip(firsts[i], lasts[i], strict=True)]
                if row.input_ids != ids[starts[i] : ends[i]].tolist() or row.answers != spans:
                    raise ShortWayFailed(talks.names[members[i]])
        if audit is None:
            return
        again = kept[places % _RETOKENISED == 0].tolist()
        plain = audit.retokenised([self._chat.sealed.unseal(written[i]) for i in again])
        same = sum(one == ids[starts[i] : ends[i]].tolist() for i, one in zip(again, plain, strict=True))
        audit.add_agreement(len(again), same)


def _tokenised(rust: Any, written: Sequence[str]) -> tuple["np.ndarray", "np.ndarray"]:
    """Return the number of tokens of each text (int64), and all tokens one after the other (int32)."""
    import numpy as np

    lengths, ids = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for some_texts in _batches(written):
        encodings = rust.encode_batch_fast(some_texts, add_special_tokens=False)
        some = [each.ids for each in encodings]
        lengths.append(np.fromiter(map(len, some), np.int64, len(some)))
        ids.append(np.fromiter(chain.from_iterable(some), np.int32, int(lengths[-1].sum())))
    return np.concatenate(lengths), np.concatenate(ids)


def _batches(written: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield texts in batches of at most `_TOKENISED` and, unless one is longer, of at most `_LONG` characters."""
    first = 0
    while first < len(written):
        end, characters = first + 1, len(written[first])
        while end < min(len(written), first + _TOKENISED) and characters + len(written[end]) <= _LONG:
            characters += len(written[end])
            end += 1
        yield written[first:end]
        first = end


@lru_cache(maxsize=2)
def _arrow_table(rust: Any) -> Any:
    import pyarrow as pa

    return texts(byte_table(rust) or (), pa.binary())


class ShortWayFailed(DataError):
    """A template does something with the words that was not observed; the shard is made again without skeletons."""
