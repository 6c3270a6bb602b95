"""The texts of listed benchmarks, whose long runs of words no training row may share (Brown et al., arXiv:2005.14165, C).

A file is .jsonl, .ndjson, .json, .csv, .parquet or .txt (a text a line); of a row every text in it is taken, however deep.
Texts with fewer words than a run are not looked for: they would match by chance.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import digest_file
from regraft.errors import DataError, MissingInput, PinMismatch
from regraft.messages import leaves
from regraft.preprocess.holdout import plain
from regraft.preprocess.near import distinct, grams

if TYPE_CHECKING:
    import numpy as np

WORDS = 13
"""Words of a run where `preprocess.leaks.run` says nothing: GPT-3's."""
_BATCH = 1_024


def read_benchmarks(benchmarks: Mapping[str, str], length: int, root: Path) -> dict[str, "np.ndarray"]:
    """Return the hashes of all runs of `length` words in each benchmark, uint64, sorted.

    Args:
        benchmarks: path, relative to `root` or absolute, to sha256.
        length: words of a run.
        root: the clone.

    Raises:
        MissingInput: a file is not there.
        PinMismatch: it is another one than the one that was listed.
        DataError: it cannot be read, or none of its texts is long enough.
    """
    import numpy as np

    found: dict[str, np.ndarray] = {}
    for name, digest in sorted(benchmarks.items()):
        path = root / name
        if not path.is_file():
            raise MissingInput(
                f"the benchmark {name} is missing", fix="bring it back, or take it out of preprocess.leaks.benchmarks"
            )
        if (is_now := digest_file(path)) != digest:
            raise PinMismatch(
                f"the benchmark {name} has sha256 {is_now}, preprocess.leaks.benchmarks says {digest}",
                fix=f"if this is the file that was meant, write {is_now} there",
            )
        runs, waiting = [np.empty(0, np.uint64)], []
        try:
            for text in _texts(path):
                waiting.append(plain(text))
                if len(waiting) == _BATCH:
                    runs.append(distinct(grams(waiting, length)[0]))
                    waiting = []
        except (ValueError, KeyError, RecursionError, OSError, csv.Error) as error:
            raise DataError(
                f"the benchmark {name} cannot be read: {error}", fix="write it as .jsonl, a row a line, in UTF-8"
            ) from error
        found[name] = distinct(np.concatenate([*runs, grams(waiting, length)[0]]))
        if not len(found[name]):
            raise DataError(
                f"no text of the benchmark {name} has {length} words: nothing could be found by it",
                fix="set preprocess.leaks.run to fewer words, or take the benchmark out",
            )
    return found


def _texts(path: Path) -> Iterator[str]:
    for row in _rows(path):
        yield from leaves(row)


def _rows(path: Path) -> Iterator[Any]:
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            with path.open(encoding="utf-8-sig") as file:
                yield from (json.loads(line) for line in file if line.strip())
        case ".json":
            yield json.loads(path.read_text(encoding="utf-8-sig"))
        case ".csv":
            yield from csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        case ".txt":
            with path.open(encoding="utf-8-sig") as file:
                yield from file
        case ".parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as table:
                for batch in table.iter_batches(_BATCH, use_threads=False):
                    yield from batch.to_pylist()
        case other:
            raise ValueError(f"`{other}` is not a known format; known: .jsonl, .ndjson, .json, .csv, .txt, .parquet")
