"""Whatever the rows and the parameters: every row is trained on, held out or counted, and nothing leaks (hypothesis)."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regraft.artifacts import digest_file
from regraft.errors import DataError, GateRefused, ParamsError
from regraft.preprocess.holdout import content_key
from regraft.preprocess.params import PreprocessParams
from regraft.preprocess.preprocess import preprocess

WORDS = st.sampled_from(
    [
        "where",
        "is",
        "my",
        "lamp",
        "the",
        "sofa",
        "of",
        "monday",
        "<|im_end|>",
        "über",
        "7",
        "\u200b",
        "漢字",
        "a",
        "b",
        "c",
        "d",
        "e",
        "f",
        "g",
        "h",
        "i",
        "j",
        "k",
        "l",
        "m",
    ]
)
SAID = st.sampled_from(["a", "where is my lamp", "a b c d e f g h"]) | st.lists(WORDS, min_size=1, max_size=30).map(
    " ".join
)
TALK = st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3).map(
    lambda pairs: [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
)
ROW = st.fixed_dictionaries(
    {"messages": TALK | SAID.map(lambda text: [{"role": "text", "content": text}]),
     "slices": st.fixed_dictionaries({"source": st.sampled_from(["a", "b"])}), "at": st.sampled_from([None, "2026-09-01", "2026-01-02"])}
)  # fmt: skip
PARAMS = st.fixed_dictionaries(
    {"max_length": st.sampled_from([16, 64, 512]), "max_dropped_share": st.just(1.0), "packing": st.booleans(),
     "supervise": st.sampled_from(["assistant", "last", "all"]), "holdout": st.sampled_from([{"share": 0.3}, {"share": 0, "always": {"source": "b"}}])},
    optional={
        "mix": st.dictionaries(
            st.sampled_from(["a", "b"]),
            st.fixed_dictionaries({"weight": st.sampled_from([0, 0.5, 1, 2.5]), "cap": st.sampled_from([None, 1, 3])}),
        ),
        "near_duplicates": st.sampled_from([0.5, 0.8, 1.0]),
        "replay": st.just({"half_life": 30, "floor": 0.1}),
        "leaks": st.fixed_dictionaries({}, optional={"near": st.just(0.6), "run": st.just(5)}),
    },
)  # fmt: skip


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
@given(rows=st.lists(ROW, min_size=1, max_size=25), params=PARAMS, benchmark=st.none() | SAID)
def test_every_row_is_accounted_for_and_no_held_out_prompt_is_trained_on(
    tokenizer_base: Path,
    rows: list[dict[str, Any]],
    params: dict[str, Any],
    benchmark: str | None,
    fill: Callable[..., Path],
) -> None:
    root = Path(tempfile.mkdtemp(prefix="regraft-properties-"))
    try:
        folder = fill(root, rows)
        if benchmark is not None:
            (root / "b.txt").write_text(benchmark)
            params = params | {
                "leaks": params.get("leaks", {}) | {"run": 5, "benchmarks": {"b.txt": digest_file(root / "b.txt")}}
            }
        try:
            settings_ = PreprocessParams.model_validate(params)
            report = preprocess(settings_, base=tokenizer_base, rows=folder, out=root / "out", root=root)
        except (DataError, GateRefused, ParamsError):  # refused in words
            assert not (root / "out").exists()
            return
        trained = pq.read_table(sorted((root / "out").glob("train_rows-*"))[0]).to_pylist()
        with pa.memory_map(str(root / "out/holdout-00000.arrow")) as source, pa.ipc.open_stream(source) as reader:
            held = reader.read_all().to_pylist()
    finally:
        shutil.rmtree(root)
    counts = report.counts.model_dump()
    assert sum(value for name, value in counts.items() if name not in ("rows_in", "repeated")) == len(rows)
    assert (len(trained), len(held)) == (counts["train"], counts["holdout"])
    assert len({row["row_id"] for row in trained} | {row["row_id"] for row in held}) == len(trained) + len(held)
    keys = {content_key([*json.loads(row["prompt"]), {"role": "assistant", "content": "x"}]) for row in held}
    assert not keys & {row["key"] for row in trained}
    assert report.supervision.control_leaked == 0
    assert report.supervision.rows_training_nothing == 0
