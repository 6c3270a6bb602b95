"""Sources by weight and cap: the same rows whatever else is there, the holdout untouched, every row counted."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from regraft.errors import ParamsError
from regraft.preprocess.holdout import Fate
from regraft.preprocess.mix import weigh
from regraft.preprocess.params import HoldoutParams, MixParams, PreprocessParams
from regraft.preprocess.preprocess import preprocess
from regraft.preprocess.report import PreprocessReport


def table(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    dice = np.random.default_rng(seed)
    ids = dice.integers(0, 2**64, size, np.uint64, endpoint=False)
    return np.zeros(size, np.int8), ids, np.where(np.arange(size) % 2, b"a", b"b")


@pytest.mark.parametrize(
    ("weight", "left", "more"), [(0.25, 0.25, 0.0), (1.0, 1.0, 0.0), (2.5, 1.0, 1.5), (0.0, 0.0, 0.0)]
)
def test_a_weight_leaves_a_share_or_repeats_rows_that_often_on_average(weight: float, left: float, more: float) -> None:
    fates, ids, origins = table(20_000)
    copies = weigh(fates, ids, [origins], {"a": MixParams(weight=weight)})
    own = origins == b"a"
    assert abs((fates[own] == Fate.TRAIN).mean() - left) < 0.015
    assert abs((copies[own] - 1.0).mean() - more) < 0.015
    assert (fates[~own] == Fate.TRAIN).all()
    assert (copies[~own] == 1).all()


def test_other_rows_change_nothing_and_under_a_cap_a_new_row_takes_the_place_of_one() -> None:
    fates, ids, origins = table(2_000)
    params = {"a": MixParams(weight=0.5, cap=300), "b": MixParams(weight=1.5)}
    copies = weigh(fates, ids, [origins], params)
    some = np.arange(2_000) != 77
    fewer = np.zeros(1_999, np.int8)
    fewer_copies = weigh(fewer, ids[some], [origins[some][:900], origins[some][900:]], params)
    assert (fates[origins == b"a"] == Fate.TRAIN).sum() == 300
    assert (fates[some] != fewer).sum() <= 1
    assert (copies[some] == fewer_copies)[fates[some] == fewer].all()
    assert (fewer_copies == 1)[fewer == Fate.SAMPLED].all()


def test_rows_that_are_not_trained_on_are_left_as_they_are() -> None:
    fates, ids, origins = table(100)
    fates[:50] = Fate.HOLDOUT
    weigh(fates, ids, [origins], {"a": MixParams(weight=0), "b": MixParams(weight=0)})
    assert Counter(fates.tolist()) == {Fate.HOLDOUT: 50, Fate.SAMPLED: 50}


def run(folder: Path, out: Path, base: Path, mix: dict[str, Any]) -> PreprocessReport:
    params = PreprocessParams.model_validate({"max_length": 128, "holdout": {"share": 0.1}, "mix": mix})
    return preprocess(params, base=base, rows=folder, out=out)


def blocks(out: Path) -> Counter[tuple[int, ...]]:
    with pa.memory_map(str(out / "train-00000.arrow")) as source, pa.ipc.open_stream(source) as reader:
        found: Counter[tuple[int, ...]] = Counter()
        for block in reader.read_all().to_pylist():
            starts = [i for i, position in enumerate(block["position_ids"]) if position == 0]
            found.update(tuple(block["input_ids"][a:b]) for a, b in zip(starts, [*starts[1:], None], strict=True))
        return found


def test_the_stage_repeats_and_leaves_out_what_the_mixture_says_and_counts_it(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    some = [{**row, "slices": {"source": "a" if i % 2 else "b"}} for i, row in enumerate(rows)]
    folder = write_rows(some)
    plain = run(folder, tmp_path / "plain", tokenizer_base, {})
    mixed = run(folder, tmp_path / "mixed", tokenizer_base, {"a": {"weight": 2}, "b": {"weight": 1, "cap": 10}})
    assert mixed.holdout_digest == plain.holdout_digest
    assert mixed.train_slices == {"source": {"a": plain.train_slices["source"]["a"], "b": 10}}
    assert mixed.counts.repeated == plain.train_slices["source"]["a"]
    assert mixed.counts.sampled == plain.train_slices["source"]["b"] - 10
    assert Counter(blocks(tmp_path / "mixed").values()) == {2: plain.train_slices["source"]["a"], 1: 10}
    assert 0.5 < mixed.block_fill <= 1


def test_a_source_that_no_row_is_from_is_a_mistake(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(ParamsError, match=r"preprocess\.mix names a, but rows are from no source"):
        run(write_rows(rows), tmp_path / "out", tokenizer_base, {"a": {"weight": 2}})


def test_what_did_not_happen_is_not_in_the_report(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    preprocess(
        PreprocessParams(max_length=128, holdout=HoldoutParams(share=0.1)),
        base=tokenizer_base,
        rows=write_rows(rows),
        out=tmp_path / "out",
    )
    text = (tmp_path / "out/report.json").read_text()
    assert not [
        name for name in ("sampled", "repeated", "decontaminated", "near_duplicates", "benchmarks") if name in text
    ]
    assert PreprocessReport.load(tmp_path / "out/report.json").counts.sampled == 0


def test_several_processes_make_the_same_bytes_as_one(
    tokenizer_base: Path, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft.preprocess import shards, work

    monkeypatch.setattr(shards, "_MOST", 100)
    rows = [
        {"messages": [{"role": "user", "content": f"where is {i}"}, {"role": "assistant", "content": "here"}],
         "slices": {"source": "a" if i % 3 else "b"}}
        for i in range(400)
    ]  # fmt: skip
    folder = write_rows(rows)
    mix = {"a": {"weight": 1.5}, "b": {"weight": 0.5, "cap": 40}}
    run(folder, tmp_path / "one", tokenizer_base, mix)
    monkeypatch.setattr(work, "_LITTLE", 10)
    monkeypatch.setenv("REGRAFT_WORKERS", "2")
    run(folder, tmp_path / "two", tokenizer_base, mix)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len([name for name in names if name.startswith("train-")]) == 4
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
