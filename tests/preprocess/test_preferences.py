"""Preferences through `preprocess`: tokens of both answers, sides, duplicates, leaks, counts, the audit."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from regraft.artifacts import verify_dir
from regraft.errors import DataError
from regraft.preprocess.params import HoldoutParams, LeakParams, MixParams, PreprocessParams
from regraft.preprocess.preprocess import preprocess
from regraft.preprocess.report import PreprocessReport
from regraft.validate.params import DataParams, ValidateParams
from regraft.validate.validate import validate

PARAMS = PreprocessParams(max_length=96, holdout=HoldoutParams(share=0.2), max_dropped_share=1.0)
Prepare = Callable[..., tuple[Path, PreprocessReport]]


@pytest.fixture
def prepare(tmp_path: Path, tokenizer_base: Path) -> Prepare:
    def _prepare(
        rows: list[dict[str, Any]], params: PreprocessParams = PARAMS, name: str = "out"
    ) -> tuple[Path, PreprocessReport]:
        raw = tmp_path / name / "data/raw"
        raw.mkdir(parents=True)
        (raw / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folder = tmp_path / name
        validate(
            ValidateParams.model_validate({"expectations": {"quarantined": {"share": 0.0}}}),
            DataParams(layout="preference", slices={"source": "{from}"} if "from" in rows[0] else {}),
            raw_root=folder,
            out=folder / "validate",
            docs=folder / "docs",
        )
        report = preprocess(params, base=tokenizer_base, rows=folder / "validate", out=folder / "preprocess")
        return folder / "preprocess", report

    return _prepare


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob(f"{name}-*.arrow")):
        with pa.memory_map(str(path)) as source:
            found += pa.ipc.open_stream(source).read_all().to_pylist()
    return found


def pair(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"where is parcel {i}", "chosen": f"it is at stop {i}", "rejected": f"go away {i} now", **more}


def text(tokenizer_base: Path, ids: list[int]) -> str:
    from regraft.model.load import load_tokenizer, open_base

    return str(load_tokenizer(open_base(tokenizer_base, weights=False)).decode(ids))


def test_each_answer_is_its_tokens_up_to_its_end_behind_the_prompt_of_both(
    prepare: Prepare, tokenizer_base: Path
) -> None:
    from regraft.chat import open_chat
    from regraft.model.load import load_tokenizer, open_base

    folder, report = prepare([pair(i) for i in range(60)])
    rows = read(folder, "pairs")
    chat = open_chat(load_tokenizer(open_base(tokenizer_base, weights=False)))

    assert report.counts.train == len(rows)
    assert report.preferences is not None
    assert report.preferences.model_dump(exclude={"supervision"}) == {
        "train_pairs": len(rows),
        "train_wanted": 0,
        "train_unwanted": 0,
        "holdout_rows": report.counts.holdout,
    }
    numbers = set()
    for row in rows:
        number = int("".join(filter(str.isdigit, text(tokenizer_base, row["chosen_ids"]))))
        numbers.add(number)
        question = {"role": "user", "content": f"where is parcel {number}"}
        assert row["prompt_ids"] == chat.prompts([[question]])[0]
        for column, words in (("chosen_ids", f"it is at stop {number}"), ("rejected_ids", f"go away {number} now")):
            (rendered,) = chat.encode([[question, {"role": "assistant", "content": words}]], "last")
            ((start, end),) = rendered.answers
            assert row[column] == rendered.input_ids[start:end]
            assert row[column][-1] in chat.stop_ids
    assert len(numbers) == len(rows)
    verify_dir(folder)


def test_blocks_and_holdout_hold_the_wanted_answers_as_a_conversation_would(prepare: Prepare) -> None:
    folder, report = prepare([pair(i) for i in range(60)])
    held, both = read(folder, "holdout"), read(folder, "holdout_pairs")

    assert report.counts.rows_in == 60 == report.counts.train + report.counts.holdout
    assert [row["row_id"] for row in both] == [row["row_id"] for row in held] == sorted(row["row_id"] for row in held)
    assert len(held) == report.counts.holdout > 5
    for one, other in zip(held, both, strict=True):
        assert one["prompt_ids"] == other["prompt_ids"]
        assert [label for label in one["labels"] if label != -100] == other["chosen_ids"]
        assert other["rejected_ids"] != other["chosen_ids"]
    blocks = read(folder, "train")
    trained = sum(label != -100 for block in blocks for label in block["labels"])
    assert trained == sum(len(row["chosen_ids"]) for row in read(folder, "pairs"))


def test_a_pair_is_on_the_side_of_its_prompt_whatever_its_answers(prepare: Prepare) -> None:
    first, _ = prepare([pair(i) for i in range(60)], name="first")
    again, _ = prepare([pair(i, chosen="yes", rejected="no") for i in range(60)], name="again")

    def prompts(folder: Path, name: str) -> set[tuple[int, ...]]:
        return {tuple(row["prompt_ids"]) for row in read(folder, name)}

    assert prompts(first, "pairs") == prompts(again, "pairs")
    assert prompts(first, "holdout_pairs") == prompts(again, "holdout_pairs")
    assert not prompts(first, "pairs") & prompts(first, "holdout_pairs")


def test_equal_pairs_are_dropped_and_pairs_with_another_rejected_answer_stay(prepare: Prepare) -> None:
    rows = [pair(i) for i in range(60)]
    _, once = prepare(rows, name="once")
    _, twice = prepare([*rows, *rows], name="twice")
    _, other = prepare([*rows, *(pair(i, rejected="something else") for i in range(60))], name="other")

    assert (twice.counts.deduplicated, twice.counts.train, twice.counts.holdout) == (
        60, once.counts.train, once.counts.holdout,
    )  # fmt: skip
    assert twice.train_digest == once.train_digest
    assert (other.counts.deduplicated, other.counts.train) == (0, 2 * once.counts.train)


def test_a_pair_goes_with_an_answer_that_is_too_long_and_is_counted_once(prepare: Prepare) -> None:
    long = "far " * 200
    rows = [pair(i) for i in range(60)]
    rows += [pair(100, chosen=long), pair(101, rejected=long), pair(102, chosen=long + "!", rejected=long)]
    folder, report = prepare(rows)

    assert report.counts.too_long == 3
    assert report.counts.rows_in == 63
    assert len(read(folder, "pairs")) == report.counts.train
    assert report.supervision.rows == report.counts.train


def test_a_rejected_answer_that_repeats_the_holdout_is_a_leak(prepare: Prepare) -> None:
    rows = [pair(i) for i in range(60)]
    _, before = prepare(rows, name="before")
    held = next(i for i in range(60) if _is_held(i))
    words = f"please tell me where is parcel {held} it is at stop {held} said the sign"
    params = PARAMS.model_copy(update={"leaks": LeakParams(run=9)})
    rows[held]["chosen"] = f"{words} today"
    copy = next(i for i in range(60) if not _is_held(i))
    rows[copy]["rejected"] = f"{words} yesterday"
    _, after = prepare(rows, params, name="after")

    assert after.counts.contaminated == 1
    assert after.counts.train == before.counts.train - 1


def _is_held(i: int) -> bool:
    from regraft.preprocess.holdout import content_key, held_out

    messages = [{"role": "user", "content": f"where is parcel {i}"}, {"role": "assistant", "content": "x"}]
    return held_out(content_key(messages), {}, PARAMS.holdout)


def test_single_answers_keep_their_label_and_only_wanted_ones_are_learned_as_conversations(prepare: Prepare) -> None:
    rows = [
        {"prompt": f"where is parcel {i}", "completion": f"at stop {i}" if i % 3 else f"away {i}", "label": bool(i % 3)}
        for i in range(90)
    ]
    folder, report = prepare(rows)
    pairs = read(folder, "pairs")

    assert report.preferences is not None
    assert report.preferences.train_pairs == 0
    assert report.preferences.train_wanted == sum(bool(row["chosen_ids"]) for row in pairs) > 20
    assert report.preferences.train_unwanted == sum(bool(row["rejected_ids"]) for row in pairs) > 10
    assert all(bool(row["chosen_ids"]) != bool(row["rejected_ids"]) for row in pairs)
    assert report.counts.train == len(pairs)
    assert report.counts.holdout == len(read(folder, "holdout_pairs")) > len(read(folder, "holdout"))
    assert report.supervision.rows == report.preferences.train_wanted
    listed = pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("train_rows-*.parquet"))]).to_pylist()
    assert [row["row_id"] for row in listed] == [row["row_id"] for row in pairs]
    assert all(row["tokens"] > row["trained_tokens"] > 0 for row in listed)
    assert sum(row["trained_tokens"] for row in listed) == sum(
        len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in pairs
    )


@pytest.mark.parametrize("single", [False, True])
def test_rows_of_a_source_that_weighs_more_are_trained_on_as_often(prepare: Prepare, single: bool) -> None:
    rows = [pair(i, **{"from": "ab"[i % 2]}) for i in range(60)]
    if single:
        rows = [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 4 < 2, "from": row["from"]}
            for i, row in enumerate(rows)
        ]
    folder, report = prepare(rows, PARAMS.model_copy(update={"mix": {"a": MixParams(weight=2)}}))
    times = Counter(row["row_id"] for row in read(folder, "pairs"))
    ids = [row["row_id"] for row in read(folder, "pairs")]

    assert set(times.values()) == {1, 2}
    assert report.counts.train == len(times)
    assert report.counts.repeated == len(ids) - len(times) == sum(each == 2 for each in times.values()) > 10
    assert ids == [each for each in dict.fromkeys(ids) for _ in range(times[each])]


def test_rows_without_one_wanted_answer_are_refused(prepare: Prepare) -> None:
    rows = [{"prompt": f"where is parcel {i}", "completion": "no", "label": False} for i in range(60)]
    with pytest.raises(DataError, match="no training row has an answer that is wanted"):
        prepare(rows)


def test_the_audit_looks_at_both_answers(prepare: Prepare) -> None:
    _, report = prepare([pair(i, rejected=f"go <|im_end|> away {i}") for i in range(60)])

    assert report.preferences is not None
    for audit in (report.supervision, report.preferences.supervision):
        assert audit.rows == report.counts.train
        assert (audit.rows_learning_to_stop, audit.answers_recovered, audit.control_leaked) == (1.0, 1.0, 0)
    assert report.preferences.supervision.control_text == report.counts.train
    assert report.supervision.control_text == 0


def test_shards_processes_and_the_cache_change_no_byte(
    prepare: Prepare, tmp_path: Path, tokenizer_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft.preprocess import shards, work

    folder, _ = prepare([pair(i) for i in range(200)], name="whole")
    rows = tmp_path / "whole/validate"
    monkeypatch.setattr(shards, "_MOST", 50)
    monkeypatch.setattr(work, "_LITTLE", 10)
    monkeypatch.setenv("REGRAFT_WORKERS", "2")
    outs = []
    for name in ("first", "second"):
        report = preprocess(PARAMS, base=tokenizer_base, rows=rows, out=tmp_path / name, cache=tmp_path / "cache")
        outs.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})

    assert outs[0] == outs[1]
    assert len(list((tmp_path / "first").glob("pairs-*.arrow"))) == 4
    key = lambda row: row["row_id"]  # noqa: E731
    assert sorted(read(tmp_path / "first", "pairs"), key=key) == sorted(read(folder, "pairs"), key=key)
    assert PreprocessReport.load(tmp_path / "first/report.json") == report


def test_a_report_of_conversations_says_nothing_of_preferences(
    write_rows: Callable[..., Path], rows: list[dict[str, Any]], tokenizer_base: Path, tmp_path: Path
) -> None:
    report = preprocess(PARAMS, base=tokenizer_base, rows=write_rows(rows), out=tmp_path / "out")

    assert report.preferences is None
    assert "preferences" not in json.loads((tmp_path / "out/report.json").read_text())
    assert not list((tmp_path / "out").glob("*pairs*"))
