"""The stage: accepted rows to packed training blocks and a holdout, both the same bytes whatever the rows' order.

Rows are read twice, in batches: first for their keys, so that sides, duplicates and leaks are known; then to be rendered
and tokenised, the tokens going to a file on disk. In memory stay a key and a few numbers for each row (about 250 bytes)
and the holdout. The order of training is that of the keys: hashes, so a shuffle that no new row disturbs.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import commit_dir, digest_file
from regraft.chat import Chat, Message, Rendered, last_answer, open_chat, template_digest
from regraft.errors import DataError, GateRefused, MissingInput, ParamsError
from regraft.failpoints import failpoint
from regraft.preprocess.audit import Audit
from regraft.preprocess.files import ROWS_IN_BATCH, block_schema, holdout_schema, write_holdout, write_stream
from regraft.preprocess.holdout import Fate, decide, row_entry
from regraft.preprocess.pack import Spool, pack_blocks, plan_blocks
from regraft.preprocess.params import PreprocessParams
from regraft.preprocess.report import Counts, PreprocessReport

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

log = logging.getLogger("regraft.preprocess")

ROWS, TRAIN, HOLDOUT, TRAIN_ROWS = "rows.parquet", "train-00000.arrow", "holdout-00000.arrow", "train_rows.parquet"
_COLUMNS = ("row_id", "source", "line", "messages", "slices", "at")


def preprocess(params: PreprocessParams, *, base: Path, rows: Path, out: Path) -> PreprocessReport:
    """Split, render, tokenise and pack the rows that `validate` accepted.

    Args:
        params: section `preprocess`.
        base: output of the stage `model`; only its tokenizer is read.
        rows: output of the stage `validate`; only `rows.parquet` is read.
        out: written whole or not at all: `train-00000.arrow` (`input_ids`, `labels`, `position_ids`, a row for each
            block), `holdout-00000.arrow`, `train_rows.parquet`, `report.json`, `manifest.json`.

    Raises:
        MissingInput, DamagedArtifact, PinMismatch: an input is not there or not as it was pinned.
        DataError: the template cannot render a row, or one side would be without rows.
        GateRefused: more rows than allowed are too long or have nothing to train on.
        ParamsError: a parameter does not fit the base model or the rows.
    """
    from regraft.model.load import load_tokenizer, open_base

    opened = open_base(base, weights=False)
    tokenizer = load_tokenizer(opened)
    chat = open_chat(tokenizer)
    context = getattr(tokenizer, "model_max_length", None) or params.max_length
    if params.max_length > context:
        raise ParamsError(
            f"preprocess.max_length is {params.max_length}, but the base model {opened.name} has {context} positions",
            fix=f"set preprocess.max_length to at most {context}",
        )
    path = rows / ROWS
    if not path.is_file():
        raise MissingInput(f"{path} is missing", fix="dvc repro validate")

    table = _read_keys(path, params)
    with commit_dir(out) as folder, Spool(folder) as spool:
        made = _tokenise(path, table, params, chat, tokenizer, spool)
        _check_dropped(table, params)
        order = made.train_order(table.keys, table.ids)
        plan = _plan([spool.lengths[i] for i in order], params)
        spool.seal()
        blocks = [[order[i] for i in members] for members in plan]
        write_stream(folder / TRAIN, block_schema(), pack_blocks(spool, blocks))
        failpoint("preprocess.train")
        write_holdout(folder / HOLDOUT, made.holdout)
        failpoint("preprocess.holdout")
        _write_train_rows(folder / TRAIN_ROWS, made, table, order, spool)
        length = params.block_length or params.max_length
        sizes = [sum(spool.lengths[i] for i in members) for members in blocks]
        report = PreprocessReport(
            counts=table.counts(),
            supervision=made.audit.result(table.dropped_share()),
            holdout_slices=_sorted(made.holdout_slices),
            train_slices=_sorted(made.train_slices),
            max_length=params.max_length,
            supervise=params.supervise,
            blocks=len(blocks),
            block_length=length,
            block_fill=round(sum(sizes) / (len(blocks) * length), 6),
            longest_block=max(sizes),
            stop_token_ids=chat.stop_ids,
            template_digest=template_digest(tokenizer),
            tokenizer_digest=opened.report.tokenizer_digest,
            base=opened.name,
            rows_digest=digest_file(path),
            train_digest=digest_file(folder / TRAIN),
            holdout_digest=digest_file(folder / HOLDOUT),
        )
        report.save(folder / "report.json")
    log.info(
        "preprocess: %d rows: %d to train on (%d tokens in %d blocks), %d held out, %d left out",
        report.counts.rows_in,
        report.counts.train,
        report.supervision.tokens,
        report.blocks,
        report.counts.holdout,
        report.counts.rows_in - report.counts.train - report.counts.holdout,
    )
    return report


@dataclass
class _Keys:
    """What is kept of every row, in the order of the file."""

    keys: "np.ndarray"
    ids: "np.ndarray"
    fates: "np.ndarray"

    def counts(self) -> Counts:
        of = Counter(self.fates.tolist())
        return Counts(rows_in=len(self.fates), **{fate.name.lower(): of[fate] for fate in Fate})

    def dropped_share(self) -> float:
        counts = self.counts()
        return round((counts.too_long + counts.nothing_to_train) / counts.rows_in, 6) if counts.rows_in else 0.0


@dataclass
class _Made:
    """What tokenising made, besides what lies in the spool."""

    audit: Audit
    train: list[int] = field(default_factory=list)
    """Place in the file of each row of the spool."""
    trained_tokens: list[int] = field(default_factory=list)
    sources: list["pa.RecordBatch"] = field(default_factory=list)
    """Source and line of the same rows."""
    holdout: list["pa.RecordBatch"] = field(default_factory=list)
    train_slices: dict[str, Counter[str]] = field(default_factory=dict)
    holdout_slices: dict[str, Counter[str]] = field(default_factory=dict)

    def train_order(self, keys: "np.ndarray", ids: "np.ndarray") -> list[int]:
        """Return the spool's rows by key, then id."""
        import numpy as np

        where = np.asarray(self.train, dtype=np.int64)
        return [int(i) for i in np.lexsort((ids[where], keys[where]))]


def _batches(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield (place of the first row, rows) in batches; `slices` as dicts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_IN_BATCH, columns=list(columns)):
                rows = batch.to_pylist()
                for row in rows:
                    row["slices"] = dict(row["slices"] or ())
                yield place, rows
                place += len(rows)
    except (pa.ArrowException, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}", fix="dvc repro validate") from error


def _read_keys(path: Path, params: PreprocessParams) -> _Keys:
    import numpy as np

    kinds: tuple[Any, ...] = ("S64", "S32", "S32", "S32", np.int8)
    parts: list[list[np.ndarray]] = [[np.empty(0, kind)] for kind in kinds]
    names: set[str] = set()
    for _, rows in _batches(path, ("row_id", "messages", "slices", "at")):
        entries = [row_entry(row, params.holdout) for row in rows]
        names.update(*(row["slices"] for row in rows))
        for part, values, kind in zip(parts, zip(*entries, strict=True), kinds, strict=True):
            part.append(np.asarray(values, dtype=kind))
    keys, answers, times, ids, fates = (np.concatenate(part) for part in parts)
    if unknown := sorted(params.holdout.always.keys() - names):
        raise ParamsError(
            f"preprocess.holdout.always names {', '.join(unknown)}, but rows have the slices {', '.join(sorted(names))}",
            fix="name a column of `data.slices`, or leave it out",
        )
    decide(keys, answers, times, ids, fates)
    return _Keys(keys, ids, fates)


def _tokenise(path: Path, table: _Keys, params: PreprocessParams, chat: Chat, tokenizer: Any, spool: Spool) -> _Made:
    """Render and tokenise both sides; rows found to be too long or without learned tokens change their fate."""
    made = _Made(Audit(chat, tokenizer))
    reported = time.monotonic()
    for first, rows in _batches(path, _COLUMNS):
        for side in (Fate.TRAIN, Fate.HOLDOUT):
            chosen = [(first + i, row) for i, row in enumerate(rows) if table.fates[first + i] == side]
            # The holdout is judged by the last answer, whatever is learned in training.
            supervise = params.supervise if side == Fate.TRAIN else "last"
            names = [f"{row['source']} line {row['line']}" for _, row in chosen]
            kept = []
            conversations = [row["messages"] for _, row in chosen]
            for (place, row), rendered in zip(chosen, chat.encode(conversations, supervise, names), strict=True):
                if len(rendered.input_ids) > params.max_length:
                    table.fates[place] = Fate.TOO_LONG
                    _check_allowed(params, row, len(rendered.input_ids))
                elif all(end - start <= bool(chat.ending) for start, end in rendered.answers):
                    table.fates[place] = Fate.NOTHING_TO_TRAIN
                else:
                    kept.append((place, row, rendered))
            (_add_train if side == Fate.TRAIN else _add_holdout)(made, kept, spool)
        if time.monotonic() - reported > 10:
            reported = time.monotonic()
            log.info("preprocess: %d of %d rows tokenised", first + len(rows), len(table.fates))
    return made


def _check_allowed(params: PreprocessParams, row: Mapping[str, Any], tokens: int) -> None:
    if params.too_long == "fail":
        raise GateRefused(
            f"{row['source']} line {row['line']} has {tokens} tokens, more than preprocess.max_length {params.max_length}",
            fix="raise preprocess.max_length, shorten the row, or set preprocess.too_long to `drop`",
        )


def _add_train(made: _Made, kept: list[tuple[int, dict[str, Any], Rendered]], spool: Spool) -> None:
    import pyarrow as pa

    if not kept:
        return
    made.audit.add([row["messages"] for _, row, _ in kept], [rendered for _, _, rendered in kept])
    for place, row, rendered in kept:
        spool.append(rendered.input_ids, rendered.labels)
        made.train.append(place)
        made.trained_tokens.append(sum(last - first for first, last in rendered.answers))
        _count(made.train_slices, row["slices"])
    columns = [
        pa.array([row[name] for _, row, _ in kept], kind)
        for name, kind in (("source", pa.string()), ("line", pa.int64()))
    ]
    made.sources.append(pa.record_batch(columns, names=["source", "line"]))


def _add_holdout(made: _Made, kept: list[tuple[int, dict[str, Any], Rendered]], _: Spool) -> None:
    import pyarrow as pa

    entries = []
    for _place, row, rendered in kept:
        messages: list[Message] = row["messages"]
        answered = last_answer(messages)
        assert answered is not None, "rows without an answer have another fate"
        entries.append(
            {
                "row_id": row["row_id"],
                "slices": sorted(row["slices"].items()),
                "prompt": json.dumps(messages[:answered], ensure_ascii=False),
                "answer": messages[answered]["content"],
                "prompt_ids": rendered.prompt_ids,
                "input_ids": rendered.input_ids,
                "labels": rendered.labels,
            }
        )
        _count(made.holdout_slices, row["slices"])
    made.holdout.append(pa.RecordBatch.from_pylist(entries, schema=holdout_schema()))


def _check_dropped(table: _Keys, params: PreprocessParams) -> None:
    counts, share = table.counts(), table.dropped_share()
    if share > params.max_dropped_share:
        raise GateRefused(
            f"{counts.too_long} of {counts.rows_in} rows have more than {params.max_length} tokens and "
            f"{counts.nothing_to_train} have nothing to train on: {share:.1%}, "
            f"more than preprocess.max_dropped_share {params.max_dropped_share:.1%}",
            fix="raise preprocess.max_length (it costs memory), mend the rows, or raise preprocess.max_dropped_share",
        )
    if not counts.train:
        raise DataError(f"none of {counts.rows_in} rows is left to train on: {counts}", fix="add rows to data/raw/")
    if not counts.holdout:
        raise DataError(
            f"none of {counts.rows_in} rows is in the holdout, so nothing could be proved",
            fix="add rows, or raise preprocess.holdout.share",
        )


def _plan(lengths: list[int], params: PreprocessParams) -> list[list[int]]:
    if not params.packing:
        return [[i] for i in range(len(lengths))]
    return plan_blocks(lengths, params.block_length or params.max_length)


def _write_train_rows(path: Path, made: _Made, table: _Keys, order: list[int], spool: Spool) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = np.asarray(made.train, dtype=np.int64)[order]
    sources = pa.Table.from_batches(made.sources).take(order)
    columns = {
        "row_id": pa.array(table.ids[where].astype("U32")),
        "key": pa.array(table.keys[where].astype("U64")),
        "tokens": pa.array([spool.lengths[i] for i in order], pa.int32()),
        "trained_tokens": pa.array([made.trained_tokens[i] for i in order], pa.int32()),
        "source": sources["source"],
        "line": sources["line"],
    }
    pq.write_table(pa.table(columns), path)


def _count(into: dict[str, Counter[str]], slices: Mapping[str, str]) -> None:
    for name, value in slices.items():
        into.setdefault(name, Counter())[value] += 1


def _sorted(counted: dict[str, Counter[str]]) -> dict[str, dict[str, int]]:
    return {name: dict(sorted(counted[name].items())) for name in sorted(counted)}
