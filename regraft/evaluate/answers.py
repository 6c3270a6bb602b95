"""The table of answers: how an answer is graded, stored, read back and averaged.

One row each, in the order of `row_id`: row_id, slices map<string, string>, answer (expected), generated, loss (nats,
summed over the trained tokens), tokens (trained), exact, json_valid (null where answers are not JSON), stopped.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.artifacts import canonical_json
from regraft.errors import DamagedArtifact, MissingInput
from regraft.evaluate.holdout import HeldOutRow
from regraft.evaluate.report import AdapterScores, Score


@dataclass(frozen=True)
class Answer:
    """One held-out row, answered."""

    row_id: str
    slices: dict[str, str]
    answer: str
    generated: str
    loss: float
    tokens: int
    exact: bool
    json_valid: bool | None
    stopped: bool


def graded(row: HeldOutRow, text: str, *, loss: float, tokens: int, stopped: bool, json_answers: bool) -> Answer:
    """Return what was answered to a held-out row, with its grades.

    Args:
        row: the row.
        text: what the model said.
        loss: nats, summed over the tokens of the expected answer.
        tokens: how many those are.
        stopped: the model ended its answer itself.
        json_answers: answers are JSON: equal values are equal, and `json_valid` is said.
    """
    return Answer(
        row_id=row.row_id,
        slices=row.slices,
        answer=row.answer,
        generated=text,
        loss=loss,
        tokens=tokens,
        exact=same_answer(text, row.answer, json_answers=json_answers),
        json_valid=is_json(text) if json_answers else None,
        stopped=stopped,
    )


def is_json(text: str) -> bool:
    """Say whether `text` is interoperable JSON (RFC 7493: finite numbers, no name twice in an object)."""
    return _parse(text) is not None


def same_answer(generated: str, answer: str, *, json_answers: bool) -> bool:
    """Say whether two texts are the same answer: equal after strip or, with `json_answers`, equal JSON values.

    Values are compared by type: 1 and true differ, 1 and 1.0 differ; the order of an object's members does not matter.
    """
    if generated.strip() == answer.strip():
        return True
    if not json_answers:
        return False
    found, expected = _parse(generated), _parse(answer)
    return found is not None and found == expected


def _parse(text: str) -> bytes | None:
    """Return the canonical bytes of a JSON text, or None where it is none."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(names := dict(members)) < len(members):
            raise ValueError("a name occurs twice")
        return names

    try:
        return canonical_json(json.loads(text, parse_constant=no_constant, object_pairs_hook=unique))
    except (ValueError, RecursionError):
        return None


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write the table as Parquet, in the order of `row_id`; equal answers give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = sorted(answers, key=lambda each: each.row_id)
    columns = {name: [getattr(row, name) for row in rows] for name in Answer.__dataclass_fields__}
    columns["slices"] = [sorted(slices.items()) for slices in columns["slices"]]
    pq.write_table(pa.table(columns, schema=_schema()), path, compression="zstd", store_schema=False)


def read_answers(path: Path) -> list[Answer]:
    """Read a table of answers and check it: columns and types, nothing null, ids unique and in order.

    Raises:
        MissingInput: it is not there.
        DamagedArtifact: it is not such a table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise MissingInput(f"{path} is missing", fix="run the stage `evaluate` again")
    try:
        table = pq.read_table(path, partitioning=None)
        rows = table.select(_schema().names).cast(_schema()).to_pylist()
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DamagedArtifact(f"{path} is not a table of answers: {error}") from error
    problems = [
        f"row {number}: `{name}` is null"
        for number, row in enumerate(rows)
        for name, value in row.items()
        if value is None and name != "json_valid"
    ]
    ids = [row["row_id"] for row in rows]
    if not problems and ids != sorted(set(ids)):
        problems.append("row ids are not unique and in order")
    if problems:
        raise DamagedArtifact(f"{path} is not a table of answers: " + "; ".join(problems[:5]))
    return [Answer(**{**row, "slices": dict(row["slices"])}) for row in rows]


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("row_id", pa.string()),
            ("slices", pa.map_(pa.string(), pa.string())),
            ("answer", pa.string()),
            ("generated", pa.string()),
            ("loss", pa.float64()),
            ("tokens", pa.int32()),
            ("exact", pa.bool_()),
            ("json_valid", pa.bool_()),
            ("stopped", pa.bool_()),
        ]
    )


def summarise(answers: Sequence[Answer], slices: Sequence[str]) -> AdapterScores:
    """Average over all rows (at least one) and over the rows of each value of each of `slices`."""
    return AdapterScores(
        overall=_score(answers),
        slices={name: {value: _score(rows) for value, rows in _by_slice(answers, name)} for name in slices},
    )


def _by_slice(answers: Sequence[Answer], name: str) -> list[tuple[str, list[Answer]]]:
    groups: dict[str, list[Answer]] = defaultdict(list)
    for row in answers:
        if name in row.slices:
            groups[row.slices[name]].append(row)
    return sorted(groups.items())


def _score(rows: Sequence[Answer]) -> Score:
    count = len(rows)
    non_finite = sum(not math.isfinite(row.loss) for row in rows)
    tokens = sum(row.tokens for row in rows)
    loss = math.fsum(row.loss for row in rows) / tokens if tokens and not non_finite else None
    graded = [row.json_valid for row in rows if row.json_valid is not None]
    return Score(
        rows=count,
        exact_match=sum(row.exact for row in rows) / count,
        json_valid=sum(graded) / len(graded) if graded else None,
        stopped=sum(row.stopped for row in rows) / count,
        loss=loss,
        perplexity=math.exp(loss) if loss is not None and loss < 700 else None,  # beyond, exp overflows
        non_finite=non_finite,
    )
