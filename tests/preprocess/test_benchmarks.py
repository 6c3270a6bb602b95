"""Training rows that share a long run of words with a benchmark are left out and counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from regraft.artifacts import digest_file
from regraft.errors import DataError, MissingInput, ParamsError, PinMismatch
from regraft.params import load_sections
from regraft.preprocess.__main__ import Sections
from regraft.preprocess.benchmarks import read_benchmarks
from regraft.preprocess.params import PreprocessParams
from regraft.preprocess.preprocess import preprocess
from regraft.preprocess.report import PreprocessReport

LONG = "Natalia sold clips to forty eight of her friends in April, and then she sold half as many clips in May."


def row(question: str, answer: str = "yes", side: str = "train") -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "slices": {"side": side}}


ROWS = [
    row("Q: " + LONG.upper() + " How many?"),
    row("something about opening hours of the store", "well, " + LONG.lower()),
    row(" ".join(LONG.split()[:12])),
    row(LONG, side="held"),
    *(row(f"order {i} has not arrived from shop {i * i} for {i + 7} days") for i in range(20)),
]


def run(folder: Path, root: Path, base: Path, **leaks: Any) -> PreprocessReport:
    params = {"max_length": 512, "holdout": {"share": 0, "always": {"side": "held"}}, "leaks": leaks}
    return preprocess(PreprocessParams.model_validate(params), base=base, rows=folder, out=root / "out", root=root)


def test_training_rows_that_share_a_run_with_a_benchmark_are_left_out_and_the_holdout_stays(
    tokenizer_base: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.txt"
    one.write_text(json.dumps({"id": 1, "deep": [{"question": LONG + " How many in all?"}]}) + "\n")
    two.write_text("short\n" + " ".join(f"word{i}" for i in range(20)) + "\n")
    listed = {"one.jsonl": digest_file(one), str(two): digest_file(two)}
    report = run(write_rows(ROWS), tmp_path, tokenizer_base, benchmarks=listed)
    assert (report.counts.decontaminated, report.counts.train, report.counts.holdout) == (2, 21, 1)
    assert report.benchmarks == {"one.jsonl": 2, str(two): 0}
    assert PreprocessReport.load(tmp_path / "out/report.json") == report


def test_a_run_of_fewer_words_finds_more_and_the_holdouts_own_runs_come_first(
    tokenizer_base: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "b.txt").write_text(LONG)
    report = run(
        write_rows(ROWS), tmp_path, tokenizer_base, run=12, benchmarks={"b.txt": digest_file(tmp_path / "b.txt")}
    )
    assert (report.counts.contaminated, report.counts.decontaminated) == (3, 0)


def test_every_format_gives_the_same_runs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": LONG}) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps([{"q": LONG}]))
    (tmp_path / "a.csv").write_text(f'q,n\n"{LONG}",1\n')
    (tmp_path / "a.txt").write_text(LONG + "\n")
    pq.write_table(pa.table({"q": [LONG]}), tmp_path / "a.parquet")
    found = read_benchmarks({path.name: digest_file(path) for path in tmp_path.iterdir()}, 13, tmp_path)
    assert len(found) == 5
    assert len({each.tobytes() for each in found.values()}) == 1
    assert len(found["a.txt"]) == len(LONG.split()) - 12


@pytest.mark.parametrize(
    ("name", "content", "kind", "says"),
    [
        ("a.jsonl", None, MissingInput, "the benchmark a.jsonl is missing"),
        ("a.jsonl", b"{\n", DataError, "cannot be read"),
        ("a.jsonl", b"\xff\n", DataError, "cannot be read"),
        ("a.pdf", b"x", DataError, "`.pdf` is not a known format"),
        ("a.txt", b"too short\n", DataError, "has 13 words"),
        ("a.parquet", b"PAR1", DataError, "cannot be read"),
    ],
)
def test_a_benchmark_that_finds_nothing_is_never_passed_over(
    tmp_path: Path, name: str, content: bytes | None, kind: type[Exception], says: str
) -> None:
    digest = "0" * 64
    if content is not None:
        (tmp_path / name).write_bytes(content)
        digest = digest_file(tmp_path / name)
    with pytest.raises(kind) as caught:
        read_benchmarks({name: digest}, 13, tmp_path)
    assert says in str(caught.value)


def test_a_benchmark_that_changed_is_refused_with_its_digest(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LONG)
    with pytest.raises(PinMismatch, match=digest_file(tmp_path / "a.txt")):
        read_benchmarks({"a.txt": "0" * 64}, 13, tmp_path)


def test_a_benchmark_without_a_digest_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("preprocess: {leaks: {benchmarks: {a.txt: abc}}}\n")
    with pytest.raises(ParamsError, match=r"preprocess\.leaks\.benchmarks\.a\.txt: found 'abc'"):
        load_sections(tmp_path / "params.yaml", Sections)
