"""The stage: accepted rows to packed training blocks and a holdout, shard by shard and on every core.

Rows are looked at twice, in shards of some ten thousand (`shards.py`): first for their keys, so that sides, duplicates and
leaks are known; then to be rendered, tokenised and packed. What a shard became is kept, so that new rows cost what they
are. In memory stay some 60 bytes for each row, and in each process one shard. Within a shard the order of training is that
of the keys: hashes, so a shuffle, the same whatever the order of the rows.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import MANIFEST, commit_dir, digest_bytes, digest_file, digest_json, read_json
from regraft.chat import open_chat, template_digest
from regraft.errors import DataError, GateRefused, MissingInput, ParamsError
from regraft.failpoints import failpoint
from regraft.preprocess.audit import supervision
from regraft.preprocess.benchmarks import WORDS, read_benchmarks
from regraft.preprocess.holdout import Fate, decide
from regraft.preprocess.keys import load_keys, load_near, looked_for
from regraft.preprocess.leaks import decontaminate, keep_apart
from regraft.preprocess.mix import weigh
from regraft.preprocess.params import PreprocessParams
from regraft.preprocess.preferences import HOLDOUT_PAIRS, PAIRS
from regraft.preprocess.replay import thin
from regraft.preprocess.report import Counts, PreferenceCounts, PreprocessReport
from regraft.preprocess.shard import HOLDOUT, PART, TRAIN, TRAIN_ROWS, Part
from regraft.preprocess.shards import Cache, Shard, code_digest, cut, put, versions
from regraft.preprocess.tokenizer import keep_tokenizer
from regraft.preprocess.twins import drop_twins
from regraft.preprocess.work import Workers

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("regraft.preprocess")

ROWS = "rows.parquet"


def preprocess(
    params: PreprocessParams, *, base: Path, rows: Path, out: Path, cache: Path | None = None, root: Path | None = None
) -> PreprocessReport:
    """Split, render, tokenise and pack the rows that `validate` accepted.

    Args:
        params: section `preprocess`.
        base: output of the stage `model`; only its tokenizer is read.
        rows: output of the stage `validate`; only `rows.parquet` is read.
        out: written whole or not at all: `train-*.arrow` (`input_ids`, `labels`, `position_ids`, a row for each block),
            `holdout-*.arrow`, `train_rows-*.parquet`, `report.json`, `manifest.json`; a file of each for each shard. Of
            preferences also `pairs-*.arrow` (`prompt_ids`, `chosen_ids`, `rejected_ids`) and `holdout_pairs-*.arrow`;
            the other files hold the answers that are wanted.
        cache: a folder where what shards became is kept, on the file system of `out`; with and without, the output has
            the same bytes. None keeps nothing.
        root: the folder that the paths of `leaks.benchmarks` are relative to; the present one where it is not given.

    Raises:
        MissingInput, DamagedArtifact, PinMismatch: an input is not there or not as it was pinned.
        DataError: the template cannot render a row, or one side would be without rows.
        GateRefused: more rows than allowed are too long or have nothing to train on.
        ParamsError: a parameter does not fit the base model or the rows.
    """
    from regraft.model.load import open_base

    opened = open_base(base, weights=False)
    path = rows / ROWS
    if not path.is_file():
        raise MissingInput(f"{path} is missing", fix="dvc repro validate")

    with ExitStack() as stack:
        if cache is None:
            out.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(prefix=f".shards-of-{out.name}-", dir=out.parent)
            cache = Path(stack.enter_context(scratch))
        store = Cache(cache.absolute())
        common = {
            "code": code_digest(),
            "params": params.model_dump(
                exclude={"holdout", "leaks", "max_dropped_share", "mix", "near_duplicates", "replay"}
            ),
            "tokenizer": opened.report.tokenizer_digest,
            "libraries": versions(),
        }
        purpose = digest_json(common)
        workers = stack.enter_context(Workers(params, opened, path, store, purpose))
        shards = list(cut(path))
        table = _look(workers, shards, store, params, root or Path())
        workers.load_tokenizer()
        _check_context(workers.tokenizer, params, opened.name)
        chat = open_chat(workers.tokenizer)
        common["template"] = template_digest(workers.tokenizer)
        entries = _prepare(workers, shards, store, table, common)
        parts = [Part.model_validate(read_json(entry / PART)) for entry in entries]
        counts = table.counts(parts)
        _check_dropped(counts, params)
        _check_wanted(parts)
        known: dict[str, str] = {}
        with commit_dir(out, known) as folder:
            digests = _put_all(entries, parts, folder, known)
            failpoint("preprocess.put")
            length = params.block_length or params.max_length
            blocks = sum(part.blocks for part in parts)
            sums = [part.sums for part in parts]
            tokens = sum(part.packed for part in parts)
            report = PreprocessReport(
                counts=counts,
                supervision=supervision(sums, _dropped_share(counts)),
                benchmarks=table.benchmarks,
                preferences=_preferences(parts, counts),
                holdout_slices=_added([part.holdout_slices for part in parts]),
                train_slices=_added([part.train_slices for part in parts]),
                max_length=params.max_length,
                supervise=params.supervise,
                blocks=blocks,
                block_length=length,
                block_fill=round(tokens / (blocks * length), 6),
                longest_block=max(part.longest_block for part in parts),
                stop_token_ids=chat.stop_ids,
                template_digest=template_digest(workers.tokenizer),
                tokenizer_digest=opened.report.tokenizer_digest,
                base=opened.name,
                rows_digest=digest_file(path),
                train_digest=_joined(digests[TRAIN] + digests[PAIRS]),
                holdout_digest=_joined(digests[HOLDOUT] + digests[HOLDOUT_PAIRS]),
            )
            report.save(folder / "report.json")
        keep_tokenizer(workers.tokenizer, store, workers.kept)
        used = [*table.entries, workers.kept, *(entry.name for entry in entries)]
        store.keep(used, spare=2 * len(shards) + 16, purpose=purpose)
    log.info(
        "preprocess: %d rows: %d to train on (%d tokens in %d blocks), %d held out, %d left out; %d of %d shards made anew",
        report.counts.rows_in,
        report.counts.train,
        report.supervision.tokens,
        report.blocks,
        report.counts.holdout,
        report.counts.rows_in - report.counts.train - report.counts.holdout,
        workers.made,
        len(shards),
    )
    return report


@dataclass
class _Table:
    """What is kept of every row, in the order of the file."""

    fates: "np.ndarray"
    entries: list[str]
    """The cache's names of what was found when each shard was looked at."""
    benchmarks: dict[str, int]
    """Rows that share a run with each benchmark."""
    copies: "np.ndarray | None"
    """How often each row is trained on; None: once."""

    def counts(self, parts: Sequence[Part]) -> Counts:
        of = Counter(self.fates.tolist())
        too_long, nothing = sum(len(part.too_long) for part in parts), sum(part.nothing_to_train for part in parts)
        return Counts(
            rows_in=len(self.fates),
            train=sum(part.train if part.other_sums is None else part.pairs for part in parts),
            holdout=sum(part.holdout if part.other_sums is None else part.held_pairs for part in parts),
            deduplicated=of[Fate.DEDUPLICATED],
            leaked=of[Fate.LEAKED],
            near_holdout=of[Fate.NEAR],
            contaminated=of[Fate.CONTAMINATED],
            too_long=too_long,
            nothing_to_train=nothing + of[Fate.NOTHING_TO_TRAIN],
            aged=of[Fate.AGED],
            decontaminated=of[Fate.DECONTAMINATED],
            near_duplicates=of[Fate.NEAR_DUPLICATE],
            sampled=of[Fate.SAMPLED],
            repeated=sum(part.repeated for part in parts),
        )


def _look(workers: Workers, shards: Sequence[Shard], store: Cache, params: PreprocessParams, root: Path) -> _Table:
    """Look at every row; decide what becomes of each."""
    import numpy as np

    known = read_benchmarks(params.leaks.benchmarks, params.leaks.run or WORDS, root)
    common = {"code": code_digest(), "holdout": params.holdout.model_dump(), "looked for": looked_for(params)}
    entries = [digest_json({**common, "rows": shard.digest}) for shard in shards]
    workers.look(shards, entries)
    kinds: dict[str, Any] = {"prefixes": np.uint64, "answers": np.uint64, "ids": np.uint64, "fates": np.int8}
    parts: dict[str, list[np.ndarray]] = {name: [np.empty(0, kind)] for name, kind in kinds.items()}
    times: list[np.ndarray] = [np.empty(0, "S1")]
    names: set[str] = set()
    for entry in entries:
        found = load_keys(store.folder(entry))
        names |= found.names
        for name, values in parts.items():
            values.append(getattr(found, name))
        times.append(found.times if (found.times != b"~").any() else np.full(len(found.times), b"~", "S1"))
    if unknown := sorted(params.holdout.always.keys() - names):
        raise ParamsError(
            f"preprocess.holdout.always names {', '.join(unknown)}, but rows have the slices {', '.join(sorted(names))}",
            fix="name a column of `data.slices`, or leave it out",
        )
    keys, answers, ids, fates = (np.concatenate(parts.pop(name)) for name in kinds)
    at = np.concatenate(times)
    decide(keys, answers, at, ids, fates)
    folders = [store.folder(entry) for entry in entries]
    keep_apart(params.leaks, folders, fates)
    hits = decontaminate(known, folders, fates) if known else {}
    if params.near_duplicates is not None:
        drop_twins(params.near_duplicates, folders, fates, at, ids)
    if params.replay is not None:
        thin(fates, at, ids, params.replay)
    copies = None
    if params.mix:
        copies = weigh(fates, ids, [load_near(folder)["origins"] for folder in folders], params.mix)
    return _Table(fates, entries, hits, copies)


def _prepare(
    workers: Workers, shards: Sequence[Shard], store: Cache, table: _Table, common: dict[str, Any]
) -> list[Path]:
    """Return the entry of every shard, made where it is not there or damaged."""
    entries = []
    for shard in shards:
        own = slice(shard.first, shard.end)
        fates = digest_bytes(table.fates[own].tobytes())
        more = {} if table.copies is None else {"copies": digest_bytes(table.copies[own].tobytes())}
        entries.append(digest_json({**common, "rows": shard.digest, "fates": fates, **more}))
    workers.prepare(shards, entries, table.entries, table.fates, table.copies)
    return [store.folder(entry) for entry in entries]


def _put_all(
    entries: Sequence[Path], parts: Sequence[Part], folder: Path, known: dict[str, str]
) -> dict[str, list[str]]:
    """Give the shards' files their names in the output; return the digests of each kind, and of each file in `known`."""
    digests: dict[str, list[str]] = {TRAIN: [], HOLDOUT: [], TRAIN_ROWS: [], PAIRS: [], HOLDOUT_PAIRS: []}
    for entry, part in zip(entries, parts, strict=True):
        listed = read_json(entry / MANIFEST)["files"]
        counted = {TRAIN: part.train, HOLDOUT: part.holdout, TRAIN_ROWS: part.train or part.pairs}
        for name, rows in {**counted, PAIRS: part.pairs, HOLDOUT_PAIRS: part.held_pairs}.items():
            if rows:
                stem, suffix = name.split(".")
                named = f"{stem}-{len(digests[name]):05}.{suffix}"
                put(entry / name, folder / named)
                known[named] = listed[name]["sha256"]
                digests[name].append(known[named])
    return digests


def _joined(digests: Sequence[str]) -> str:
    return digests[0] if len(digests) == 1 else digest_json(list(digests))


def _check_context(tokenizer: Any, params: PreprocessParams, name: str) -> None:
    context = getattr(tokenizer, "model_max_length", None) or params.max_length
    if params.max_length > context:
        raise ParamsError(
            f"preprocess.max_length is {params.max_length}, but the base model {name} has {context} positions",
            fix=f"set preprocess.max_length to at most {context}",
        )


def _dropped_share(counts: Counts) -> float:
    return round((counts.too_long + counts.nothing_to_train) / counts.rows_in, 6) if counts.rows_in else 0.0


def _check_dropped(counts: Counts, params: PreprocessParams) -> None:
    share = _dropped_share(counts)
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


def _check_wanted(parts: Sequence[Part]) -> None:
    """Refuse preferences without a wanted answer on one side: blocks and evaluation would be of nothing."""
    for side, rows in (("training", sum(p.train for p in parts)), ("held-out", sum(p.holdout for p in parts))):
        if not rows:
            raise DataError(f"no {side} row has an answer that is wanted", fix="add rows whose `label` is true")


def _preferences(parts: Sequence[Part], counts: Counts) -> PreferenceCounts | None:
    sums = [part.other_sums for part in parts if part.other_sums is not None]
    if not sums:
        return None
    unwanted = sum(part.pairs - part.train for part in parts)
    pairs = sum(part.both for part in parts)
    return PreferenceCounts(
        train_pairs=pairs,
        train_wanted=counts.train - unwanted - pairs,
        train_unwanted=unwanted,
        holdout_rows=counts.holdout,
        supervision=supervision(sums, _dropped_share(counts)),
    )


def _added(counted: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    sums: dict[str, Counter[str]] = {}
    for each in counted:
        for name, values in each.items():
            sums.setdefault(name, Counter()).update(values)
    return {name: dict(sorted(sums[name].items())) for name in sorted(sums)}
