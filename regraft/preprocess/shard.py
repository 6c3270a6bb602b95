"""What becomes of one shard: its rows rendered, tokenised, masked, audited and packed, or set down in the holdout."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from regraft.artifacts import write_json
from regraft.chat import IGNORED, Chat, last_answer
from regraft.errors import GateRefused
from regraft.preprocess.audit import Audit
from regraft.preprocess.columns import Encoder, ShortWayFailed, Talks, Tokens
from regraft.preprocess.files import block_schema, holdout_schema, lists, numbers, texts, write_holdout, write_stream
from regraft.preprocess.holdout import Fate
from regraft.preprocess.pack import Documents, pack_blocks, plan_blocks
from regraft.preprocess.params import PreprocessParams
from regraft.preprocess.preferences import COLUMNS as PREFERENCE_COLUMNS
from regraft.preprocess.preferences import HOLDOUT_PAIRS, PAIRS, Preferences, holds_preferences, other_answers
from regraft.preprocess.shards import Shard, read_batches

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

log = logging.getLogger("regraft.preprocess")

TRAIN, HOLDOUT, TRAIN_ROWS, PART = "train.arrow", "holdout.arrow", "train_rows.parquet", "part.json"
_COLUMNS = ("row_id", "source", "line", "messages", "slices")
_Slices = dict[str, Counter[str]]


class Part(BaseModel):
    """What is counted and measured of one shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    too_long: list[tuple[str, int, int]]
    """Source, line and tokens of each row that is too long."""
    nothing_to_train: int
    train: int
    holdout: int
    sums: dict[str, int]
    """What `Audit` added up."""
    train_slices: dict[str, dict[str, int]]
    holdout_slices: dict[str, dict[str, int]]
    blocks: int
    longest_block: int
    packed: int
    """Tokens of all blocks."""
    repeated: int
    """Copies of rows beyond the first."""
    pairs: int = 0
    """Rows of preferences on the training side; those with a wanted answer are in `train`, too."""
    both: int = 0
    """Those of `pairs` that have two answers."""
    held_pairs: int = 0
    other_sums: dict[str, int] | None = None
    """What `Audit` added up of the answers that are not wanted; None without preferences."""


class Preparer:
    """Makes shards with one tokenizer; keeps what it learned of the template."""

    def __init__(self, chat: Chat, tokenizer: Any, params: PreprocessParams) -> None:
        self._chat = chat
        self._tokenizer = tokenizer
        self._params = params
        self._short = True
        self._encoders = self._fresh()

    def _fresh(self) -> dict[Fate, Encoder]:
        own = (self._chat, self._tokenizer)
        return {
            Fate.TRAIN: Encoder(*own, self._params.supervise, self._params.max_length, short=self._short),
            # The holdout is judged by the last answer, whatever is learned.
            Fate.HOLDOUT: Encoder(*own, "last", self._params.max_length, short=self._short),
        }

    def prepare(
        self,
        path: Path,
        shard: Shard,
        keys: "np.ndarray",
        fates: "np.ndarray",
        folder: Path,
        copies: "np.ndarray | None" = None,
    ) -> None:
        """Write a shard's training blocks, holdout rows, list of training rows and `part.json` into `folder`.

        Args:
            path: `rows.parquet`.
            shard: which of its rows.
            keys: (rows, 32) bytes, for the order of training.
            fates: of its rows, as `decide` left them.
            folder: an empty folder.
            copies: how often each of its rows is trained on; None: once.

        Raises:
            DataError: the template refuses a row.
            GateRefused: a row is too long, and that is to fail.
        """
        try:
            self._prepare(path, shard, keys, fates, folder, copies)
        except ShortWayFailed as error:
            log.warning("%s is not rendered as its template promised; all rows go through the template", error.message)
            self._short = False
            self._encoders = self._fresh()
            self._prepare(path, shard, keys, fates, folder, copies)

    def _prepare(
        self,
        path: Path,
        shard: Shard,
        keys: "np.ndarray",
        fates: "np.ndarray",
        folder: Path,
        copies: "np.ndarray | None",
    ) -> None:
        import numpy as np

        preferences = holds_preferences(path)
        audit, other_audit = (Audit(self._chat, self._tokenizer) for _ in range(2))
        pairs = {Fate.TRAIN: Preferences(), Fate.HOLDOUT: Preferences()}
        named = (*_COLUMNS, *PREFERENCE_COLUMNS) if preferences else _COLUMNS
        train, names, slices = Tokens(), _Names(), {Fate.TRAIN: _Slices(), Fate.HOLDOUT: _Slices()}
        held: list[pa.RecordBatch] = []
        too_long: list[tuple[str, int, int]] = []
        nothing = first = 0
        for batch in read_batches(path, named, shard.first, shard.end):
            columns = {name: batch[name].to_pylist() for name in named}
            for side in (Fate.TRAIN, Fate.HOLDOUT):
                inside = np.flatnonzero(fates[first : first + batch.num_rows] == int(side)).tolist()
                others = Tokens()
                if preferences:
                    talks = other_answers(columns, inside, first)
                    self._encoders[Fate.HOLDOUT].encode(talks, others, other_audit if side == Fate.TRAIN else None)
                    lost = {*talks.places} - {*others.places}
                    inside = [i for i in inside if columns["wanted"][i] is not False and first + i not in lost]
                talks = Talks(
                    places=[first + i for i in inside],
                    messages=[columns["messages"][i] for i in inside],
                    names=[f"{columns['source'][i]} line {columns['line'][i]}" for i in inside],
                )
                into = train if side == Fate.TRAIN else Tokens()
                before, since = len(into.places), len(into.ids)
                self._encoders[side].encode(talks, into, audit if side == Fate.TRAIN else None)
                if any(columns["slices"]):
                    for place in into.places[before:]:
                        _count(slices[side], columns["slices"][place - first])
                if side == Fate.HOLDOUT and into.places:
                    held.append(_held(into, columns, first, self._written))
                if preferences:
                    for place in pairs[side].add(columns, first, into, since, others):
                        _count(slices[side], columns["slices"][place - first])
                too_long += [
                    (columns["source"][place - first], columns["line"][place - first], tokens)
                    for place, tokens in (*others.too_long, *into.too_long)
                ]
                nothing += len(others.nothing) + len(into.nothing)
                into.too_long, into.nothing = [], []
            names.add(columns)
            first += batch.num_rows
        if too_long and self._params.too_long == "fail":
            source, line, tokens = min(too_long)
            raise GateRefused(
                f"{source} line {line} has {tokens} tokens, more than preprocess.max_length {self._params.max_length}",
                fix="raise preprocess.max_length, shorten the row, or set preprocess.too_long to `drop`",
            )
        packed, repeated = self._write_train(train, names, keys, folder, copies, pairs[Fate.TRAIN])
        write_holdout(folder / HOLDOUT, held)
        if preferences:
            pairs[Fate.TRAIN].write_train(folder / PAIRS, keys, copies)
            pairs[Fate.HOLDOUT].write_holdout(folder / HOLDOUT_PAIRS)
        part = Part(
            too_long=sorted(too_long),
            nothing_to_train=nothing,
            train=len(train.places),
            holdout=sum(len(each) for each in held),
            sums=audit.sums,
            train_slices=_sorted(slices[Fate.TRAIN]),
            holdout_slices=_sorted(slices[Fate.HOLDOUT]),
            blocks=len(packed),
            longest_block=max(packed, default=0),
            packed=sum(packed),
            repeated=repeated,
            pairs=len(pairs[Fate.TRAIN].rows),
            both=sum(row.chosen is not None and row.rejected is not None for row in pairs[Fate.TRAIN].rows),
            held_pairs=len(pairs[Fate.HOLDOUT].rows),
            other_sums=other_audit.sums if preferences else None,
        )
        write_json(folder / PART, part.model_dump())

    def _written(self, ids: "np.ndarray") -> str:
        """Return what a model writes in a turn that calls tools, as `evaluate` reads what a model wrote."""
        own = ids[:-1] if len(ids) and int(ids[-1]) in self._chat.stop_ids else ids
        text: str = self._tokenizer.decode(own.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _write_train(
        self,
        train: Tokens,
        names: "_Names",
        keys: "np.ndarray",
        folder: Path,
        copies: "np.ndarray | None",
        pairs: Preferences,
    ) -> tuple[list[int], int]:
        """Write the training side in the order of the keys; return the tokens of each block, and copies beyond the first.

        Rows that have an unwanted answer only are in no block, but in the list of rows.
        """
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        documents = Documents.of(train)
        places = np.array(train.places, np.int64)
        ids = np.array([names.row_ids[place] for place in places], "S32")
        own = keys[places].copy().view(">u8").reshape(len(places), 4)
        order = np.lexsort((ids, *(own[:, i] for i in (3, 2, 1, 0))))
        each = order if copies is None else np.repeat(order, copies[places[order]])
        lengths = documents.lengths[each]
        if self._params.packing:
            plan = plan_blocks(lengths.tolist(), self._params.block_length or self._params.max_length)
        else:
            plan = [[i] for i in range(len(lengths))]
        blocks: list[Any] = [each[members] for members in plan]
        write_stream(folder / TRAIN, block_schema(), pack_blocks(documents, blocks))

        trained = np.concatenate([*train.trained, np.empty(0, np.int32)])
        where = places[order].tolist()
        columns = {
            "row_id": texts([names.row_ids[place] for place in where]),
            "key": texts([keys[place].tobytes().hex() for place in where]),
            "tokens": numbers(documents.lengths[order]),
            "trained_tokens": numbers(trained[order]),
            "source": texts([names.sources[place] for place in where]),
            "line": numbers(np.array([names.lines[place] for place in where], np.int64)),
        }
        table = pa.table(columns)
        repeated = len(each) - len(order)
        if alone := [row for row in pairs.rows if row.chosen is None]:
            more = {
                "row_id": [row.row_id for row in alone],
                "key": [keys[row.place].tobytes().hex() for row in alone],
                "tokens": [row.tokens for row in alone],
                "trained_tokens": [row.trained for row in alone],
                "source": [names.sources[row.place] for row in alone],
                "line": [names.lines[row.place] for row in alone],
            }
            table = pa.concat_tables([table, pa.Table.from_pydict(more, table.schema)])
            table = table.sort_by([("key", "ascending"), ("row_id", "ascending")]).combine_chunks()
            repeated += 0 if copies is None else sum(int(copies[row.place]) - 1 for row in alone)
        pq.write_table(table, folder / TRAIN_ROWS)
        return [int(lengths[members].sum()) for members in plan], repeated


class _Names:
    """Row ids, sources and lines of a shard."""

    def __init__(self) -> None:
        self.row_ids: list[str] = []
        self.sources: list[str] = []
        self.lines: list[int] = []

    def add(self, columns: Mapping[str, list[Any]]) -> None:
        self.row_ids += columns["row_id"]
        self.sources += columns["source"]
        self.lines += columns["line"]


def _held(
    made: Tokens, columns: Mapping[str, list[Any]], first: int, written: Callable[["np.ndarray"], str]
) -> "pa.RecordBatch":
    """Return holdout rows; an answer that calls tools is what the template writes for it."""
    import numpy as np
    import pyarrow as pa

    places = [place - first for place in made.places]
    answered = {i: last_answer(columns["messages"][i]) or 0 for i in places}
    ids, labels = np.concatenate(made.ids), np.concatenate(made.labels)
    lengths, prompts = np.concatenate(made.lengths), np.concatenate(made.prompts)
    ends = np.cumsum(lengths)
    heads = np.concatenate(
        [ids[end - size : end - size + cut] for end, size, cut in zip(ends, lengths, prompts, strict=True)]
    )
    schema = holdout_schema()
    answers = []
    for i, end, size in zip(places, ends, lengths, strict=True):
        last = columns["messages"][i][answered[i]]
        own = slice(end - size, end)
        learned = ids[own][labels[own] != IGNORED]
        answers.append(written(learned) if last.get("tool_calls") else last["content"])
    slices = [sorted(columns["slices"][i] or ()) for i in places]
    counts = np.concatenate([[0], np.cumsum([len(each) for each in slices])]).astype(np.int32)
    pairs = [pair for each in slices for pair in each]
    return pa.record_batch(
        [
            texts([columns["row_id"][i] for i in places]),
            pa.MapArray.from_arrays(
                numbers(counts), texts([name for name, _ in pairs]), texts([value for _, value in pairs])
            ),
            texts([json.dumps(columns["messages"][i][: answered[i]], ensure_ascii=False) for i in places]),
            texts(answers),
            lists(heads, prompts),
            lists(ids, lengths),
            lists(labels, lengths),
        ],
        schema=schema,
    )


def _count(into: _Slices, slices: list[tuple[str, str]] | None) -> None:
    for name, value in slices or ():
        into.setdefault(name, Counter())[value] += 1


def _sorted(counted: _Slices) -> dict[str, dict[str, int]]:
    return {name: dict(sorted(counted[name].items())) for name in sorted(counted)}
