"""Reading the holdout that `preprocess` made."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from regraft.artifacts import MANIFEST, digest_file, digest_json, read_json
from regraft.errors import DamagedArtifact, DataError, MissingInput

_COLUMNS = ("row_id", "slices", "answer", "prompt_ids", "input_ids", "labels")


@dataclass(frozen=True)
class HeldOutRow:
    """One conversation that no training row comes near, rendered and tokenised."""

    row_id: str
    slices: dict[str, str]
    answer: str
    prompt_ids: list[int]
    """Everything before the last answer, with the generation prompt."""
    input_ids: list[int]
    """The whole conversation."""
    labels: list[int]
    """As long as `input_ids`; -100 where not trained."""


@dataclass(frozen=True)
class Holdout:
    """Held-out rows in the order of `row_id`."""

    rows: list[HeldOutRow]
    held_out: int
    """Rows of the whole holdout; more than `rows` where a limit left some out."""
    digest: str


def holdout_digest(dataset: Path) -> str:
    """Return the digest of the holdout in `dataset`, preferences included, after comparing its bytes with the manifest.

    Raises:
        MissingInput: there is no whole preprocess output, or no holdout in it.
        DamagedArtifact: bytes differ from the manifest.
    """
    paths = [*_files(dataset), *sorted(dataset.glob("holdout_pairs-*.arrow"))]
    try:
        listed = {name: entry["sha256"] for name, entry in read_json(dataset / MANIFEST)["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedArtifact(f"{dataset / MANIFEST} is not a manifest") from error
    digests = [digest_file(path) for path in paths]
    for path, digest in zip(paths, digests, strict=True):
        if listed.get(path.name) != digest:
            raise DamagedArtifact(
                f"{path} is damaged: its sha256 is {digest}, the manifest says {listed.get(path.name)}",
                fix="regraft preprocess",
            )
    return digests[0] if len(digests) == 1 else digest_json(digests)


def read_holdout(dataset: Path, max_rows: int | None = None) -> Holdout:
    """Read the held-out rows, or those `max_rows` of them that have the lowest ids.

    Raises:
        MissingInput, DamagedArtifact: see `holdout_digest`.
        DataError: there is no row, an id occurs twice, or a row's columns do not fit together.
    """
    import pyarrow as pa

    digest = holdout_digest(dataset)
    rows: list[HeldOutRow] = []
    for path in _files(dataset):
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
                table = reader.read_all().select(_COLUMNS)
                rows += [HeldOutRow(**{**row, "slices": dict(row["slices"] or {})}) for row in table.to_pylist()]
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DamagedArtifact(f"{path} is not a holdout: {error}", fix="regraft preprocess") from error
    rows.sort(key=lambda row: row.row_id)
    if not rows:
        raise DataError(
            f"{dataset}: the holdout is empty, so nothing can be proved", fix="raise preprocess.holdout.share"
        )
    problems = [f"{b.row_id}: occurs twice" for a, b in pairwise(rows) if a.row_id == b.row_id]
    problems += [
        f"{row.row_id}: {len(row.input_ids)} tokens, {len(row.labels)} labels, {len(row.prompt_ids)} tokens of prompt"
        for row in rows
        if len(row.input_ids) != len(row.labels) or not row.prompt_ids or not row.input_ids
    ]
    if problems:
        raise DataError(f"{dataset}: the holdout has {len(problems)} wrong rows: " + "; ".join(problems[:5]))
    return Holdout(rows[:max_rows], len(rows), digest)


def _files(dataset: Path) -> list[Path]:
    if not (dataset / MANIFEST).is_file():
        raise MissingInput(f"{dataset} is missing or not whole: it has no {MANIFEST}", fix="regraft preprocess")
    if not (paths := sorted(dataset.glob("holdout-*.arrow"))):
        raise MissingInput(f"{dataset} has no holdout-*.arrow", fix="regraft preprocess")
    return paths
