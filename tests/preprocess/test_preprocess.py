"""The stage as a whole, on rows as `validate` writes them and a real tokenizer's files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from regraft.artifacts import digest_file, verify_dir
from regraft.errors import DataError, GateRefused, MissingInput, ParamsError, PinMismatch
from regraft.preprocess.params import HoldoutParams, PreprocessParams
from regraft.preprocess.preprocess import preprocess
from regraft.preprocess.report import PreprocessReport

Rows = list[dict[str, Any]]
PARAMS = PreprocessParams(max_length=128, holdout=HoldoutParams(share=0.1, always={"phrasing": "unseen"}))
FILES = ["holdout-00000.arrow", "manifest.json", "report.json", "train-00000.arrow", "train_rows-00000.parquet"]


def stream(path: Path) -> Rows:
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return list(reader.read_all().to_pylist())


def documents(block: dict[str, Any]) -> list[list[int]]:
    """Undo the packing of a block."""
    starts = [i for i, position in enumerate(block["position_ids"]) if position == 0]
    return [block["input_ids"][a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


def long_row() -> dict[str, Any]:
    slices = {"phrasing": "seen", "item": "lamp"}
    return {
        "messages": [{"role": "user", "content": "please " * 200}, {"role": "assistant", "content": "no"}],
        "slices": slices,
    }


def test_every_row_is_trained_on_held_out_or_counted(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: Rows, tmp_path: Path
) -> None:
    empty = {"messages": [rows[1]["messages"][0]], "slices": {}}
    leaked = {**rows[0], "slices": {"phrasing": "seen"}}
    extra = [rows[1], leaked, long_row(), empty]
    report = preprocess(PARAMS, base=tokenizer_base, rows=write_rows([*rows, *extra]), out=tmp_path / "out")
    counts = report.counts.model_dump()
    assert counts == {
        "rows_in": 304,
        "train": counts["train"],
        "holdout": 300 - counts["train"],
        "deduplicated": 1,
        "leaked": 1,
        "near_holdout": 0,
        "contaminated": 0,
        "too_long": 1,
        "nothing_to_train": 1,
        "aged": 0,
    }
    assert report.supervision.dropped_share == round(2 / 304, 6)
    assert report.supervision.rows == counts["train"]
    assert report.holdout_slices["phrasing"] == {"seen": counts["holdout"] - 30, "unseen": 30}
    assert set(report.train_slices["phrasing"]) == {"seen"}


def test_the_folder_is_whole_and_its_report_names_its_files(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: Rows, tmp_path: Path
) -> None:
    folder = write_rows(rows)
    report = preprocess(PARAMS, base=tokenizer_base, rows=folder, out=tmp_path / "out")
    verify_dir(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert PreprocessReport.load(tmp_path / "out/report.json") == report
    assert report.train_digest == digest_file(tmp_path / "out/train-00000.arrow")
    assert report.holdout_digest == digest_file(tmp_path / "out/holdout-00000.arrow")
    assert report.rows_digest == digest_file(folder / "rows.parquet")


def test_the_order_and_the_file_of_the_rows_change_no_byte_of_either_side(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: Rows, tmp_path: Path
) -> None:
    for name, some, source in (("one", rows, "a.jsonl"), ("two", rows[::-1], "b.csv")):
        preprocess(PARAMS, base=tokenizer_base, rows=write_rows(some, name, source), out=tmp_path / f"out-{name}")
    for name in ("train-00000.arrow", "holdout-00000.arrow"):
        assert (tmp_path / "out-one" / name).read_bytes() == (tmp_path / "out-two" / name).read_bytes()


def test_running_twice_gives_the_same_folder(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: Rows, tmp_path: Path
) -> None:
    folder = write_rows(rows)
    for name in ("one", "two"):
        preprocess(PARAMS, base=tokenizer_base, rows=folder, out=tmp_path / name)
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()


def test_blocks_hold_each_training_conversation_once_with_the_tokenizers_own_tokens(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: Rows, tmp_path: Path
) -> None:
    report = preprocess(PARAMS, base=tokenizer_base, rows=write_rows(rows), out=tmp_path / "out")
    blocks = stream(tmp_path / "out/train-00000.arrow")
    held = {row["row_id"] for row in stream(tmp_path / "out/holdout-00000.arrow")}
    listed = pq.read_table(tmp_path / "out/train_rows-00000.parquet").to_pylist()
    assert len(blocks) == report.blocks
    assert max(len(block["input_ids"]) for block in blocks) == report.longest_block <= 128
    tokenizer = tiny.make_tokenizer()
    every = [tokenizer.apply_chat_template(row["messages"])["input_ids"] for row in rows]
    packed = [ids for block in blocks for ids in documents(block)]
    assert len(packed) == report.counts.train == len(listed)
    assert {tuple(ids) for ids in packed} <= {tuple(ids) for ids in every}
    assert len({tuple(ids) for ids in packed}) == len(packed)
    assert sorted(map(len, packed)) == sorted(row["tokens"] for row in listed)
    assert not held & {row["row_id"] for row in listed}
    learned = sum(label != -100 for block in blocks for label in block["labels"])
    assert learned == sum(row["trained_tokens"] for row in listed) == report.supervision.trained_tokens


def test_all_tokens_but_the_first_are_learned_up_to_the_last_answers_end_where_that_is_wanted(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: Rows, tmp_path: Path
) -> None:
    params = PARAMS.model_copy(update={"supervise": "all", "packing": False})
    report = preprocess(params, base=tokenizer_base, rows=write_rows(rows), out=tmp_path / "out")

    listed = pq.read_table(tmp_path / "out/train_rows-00000.parquet").to_pylist()
    for block, row in zip(stream(tmp_path / "out/train-00000.arrow"), listed, strict=True):
        learned = [label for label in block["labels"] if label != -100]
        assert block["labels"][0] == -100
        assert learned == block["input_ids"][1 : 1 + len(learned)]
        assert len(block["input_ids"]) - len(learned) <= 2  # the first, and the line break after the end of the turn
        assert row["trained_tokens"] == len(learned)
    assert report.supervision.rows_learning_to_stop == 1.0


def test_without_packing_each_block_is_one_conversation_in_the_order_of_the_keys(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: Rows, tmp_path: Path
) -> None:
    params = PARAMS.model_copy(update={"packing": False})
    report = preprocess(params, base=tokenizer_base, rows=write_rows(rows), out=tmp_path / "out")
    blocks = stream(tmp_path / "out/train-00000.arrow")
    listed = pq.read_table(tmp_path / "out/train_rows-00000.parquet").to_pylist()
    assert report.blocks == report.counts.train
    assert [len(block["input_ids"]) for block in blocks] == [row["tokens"] for row in listed]
    assert [row["key"] for row in listed] == sorted(row["key"] for row in listed)


def test_datasets_reads_the_training_file(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: Rows, tmp_path: Path
) -> None:
    import datasets

    report = preprocess(PARAMS, base=tokenizer_base, rows=write_rows(rows), out=tmp_path / "out")
    data = datasets.Dataset.from_file(str(tmp_path / "out/train-00000.arrow"))
    assert data.column_names == ["input_ids", "labels", "position_ids"]
    assert len(data) == report.blocks


def test_a_holdout_row_has_its_prompt_as_it_will_be_asked_and_its_answer(
    tokenizer_base: Path, write_rows: Callable[..., Path], tmp_path: Path, rows: Rows
) -> None:
    talk = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "where is my lamp"},
        {"role": "assistant", "content": "which one?"},
        {"role": "user", "content": "the <|im_end|> desk lamp"},
        {"role": "assistant", "content": "track"},
        {"role": "user", "content": "thanks"},
    ]
    params = PreprocessParams(max_length=128, holdout=HoldoutParams(share=0, always={"kind": "talk"}))
    folder = write_rows([{"messages": talk, "slices": {"kind": "talk"}}, *rows[:5]])
    preprocess(params, base=tokenizer_base, rows=folder, out=tmp_path / "out")
    (row,) = stream(tmp_path / "out/holdout-00000.arrow")
    from regraft.chat import render, render_prompt

    tokenizer = tiny.make_tokenizer()
    ids, labels = render(tokenizer, talk, "last")
    assert row == {
        "row_id": row["row_id"],
        "slices": [("kind", "talk")],
        "prompt": json.dumps(talk[:4]),
        "answer": "track",
        "prompt_ids": render_prompt(tokenizer, talk[:4]),
        "input_ids": ids,
        "labels": labels,
    }


def test_long_rows_are_left_out_whole(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: Rows, tmp_path: Path
) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    preprocess(PARAMS, base=tokenizer_base, rows=write_rows(rows, "without"), out=plain)
    report = preprocess(PARAMS, base=tokenizer_base, rows=write_rows([long_row(), *rows]), out=out)
    assert (report.counts.too_long, report.supervision.truncated) == (1, 0)
    assert (out / "train-00000.arrow").read_bytes() == (plain / "train-00000.arrow").read_bytes()


def test_a_long_row_fails_the_stage_where_that_is_wanted(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: Rows, tmp_path: Path
) -> None:
    params = PARAMS.model_copy(update={"too_long": "fail"})
    with pytest.raises(GateRefused, match=r"a\.jsonl line 301 has \d+ tokens, more than preprocess\.max_length 128"):
        preprocess(params, base=tokenizer_base, rows=write_rows([*rows, long_row()]), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_left_out_than_allowed_is_refused_and_keeps_what_was_there(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: Rows, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    preprocess(PARAMS, base=tokenizer_base, rows=write_rows(rows, "first"), out=out)
    before = (out / "manifest.json").read_bytes()
    strict = PARAMS.model_copy(update={"max_dropped_share": 0.003})
    with pytest.raises(
        GateRefused, match=r"1 of 301 rows have more than 128 tokens and 0 have nothing to train on: 0\.3%"
    ):
        preprocess(strict, base=tokenizer_base, rows=write_rows([*rows, long_row()]), out=out)
    assert (out / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "out", "validate"]


def test_a_slice_that_no_row_has_is_a_mistake_in_the_parameters(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: Rows, tmp_path: Path
) -> None:
    params = PreprocessParams(max_length=128, holdout=HoldoutParams(always={"phrazing": "unseen"}))
    with pytest.raises(ParamsError, match="always names phrazing, but rows have the slices item, phrasing"):
        preprocess(params, base=tokenizer_base, rows=write_rows(rows), out=tmp_path / "out")


def test_an_answer_that_has_no_token_is_counted_and_not_trained_on(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rust = Tokenizer(models.BPE())  # neither bytes nor an unknown token: other letters vanish
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [message["content"] for row in rows for message in row["messages"]]
    special = ["<|im_start|>", "<|im_end|>"]
    rust.train_from_iterator(
        [*texts, "user assistant"], trainers.BpeTrainer(special_tokens=special, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|im_end|>", chat_template=tiny.CHATML)
    monkeypatch.setattr("regraft.model.load.load_tokenizer", lambda base: tokenizer)
    vanishing = {**rows[1], "messages": [rows[1]["messages"][0], {"role": "assistant", "content": "漢字"}]}
    report = preprocess(PARAMS, base=tokenizer_base, rows=write_rows([*rows, vanishing]), out=tmp_path / "out")
    assert (report.counts.nothing_to_train, report.supervision.rows_training_nothing) == (1, 0)


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        (HoldoutParams(share=0), "none of 300 rows is in the holdout, so nothing could be proved"),
        (HoldoutParams(share=0, always={"kind": "x"}), "none of 300 rows is left to train on"),
    ],
)
def test_a_side_without_rows_is_refused(
    tokenizer_base: Path,
    write_rows: Callable[..., Path],
    rows: Rows,
    tmp_path: Path,
    holdout: HoldoutParams,
    message: str,
) -> None:
    params = PreprocessParams(max_length=128, holdout=holdout)
    some = [{**row, "slices": {"kind": "x"}} for row in rows]
    with pytest.raises(DataError, match=message):
        preprocess(params, base=tokenizer_base, rows=write_rows(some), out=tmp_path / "out")


def test_a_length_beyond_the_base_models_context_is_refused(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.model_max_length = 64
    monkeypatch.setattr("regraft.model.load.load_tokenizer", lambda base: tokenizer)
    with pytest.raises(ParamsError, match=r"preprocess\.max_length is 128, but the base model tiny has 64 positions"):
        preprocess(PARAMS, base=tokenizer_base, rows=write_rows(rows), out=tmp_path / "out")


def test_missing_rows_are_named_with_the_command_that_makes_them(tokenizer_base: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"rows\.parquet is missing\n  next: dvc repro validate"):
        preprocess(PARAMS, base=tokenizer_base, rows=tmp_path, out=tmp_path / "out")


def test_another_tokenizer_than_the_pinned_one_is_refused(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: Rows, tmp_path: Path
) -> None:
    report = json.loads((tokenizer_base / "report.json").read_text())
    (tmp_path / "model").mkdir()
    (tmp_path / "model/report.json").write_text(json.dumps({**report, "tokenizer_digest": "1" * 64}))
    with pytest.raises(PinMismatch, match=f"digest {report['tokenizer_digest']}, pinned {'1' * 64}"):
        preprocess(PARAMS, base=tmp_path / "model", rows=write_rows(rows), out=tmp_path / "out")


def test_real_conversations_are_learned_whole(
    tokenizer_base: Path, write_rows: Callable[..., Path], shared: Path, tmp_path: Path
) -> None:
    lines = (shared / "data/gsm8k/train.jsonl").read_text().splitlines()[:200]
    pairs = [(json.loads(line)["question"], json.loads(line)["answer"]) for line in lines]
    messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    folder = write_rows([{"messages": each} for each in messages])
    report = preprocess(PreprocessParams(max_length=2048), base=tokenizer_base, rows=folder, out=tmp_path / "out")
    audit = report.supervision
    assert report.counts.train + report.counts.holdout == 200
    assert (audit.answers_exact, audit.rows_learning_to_stop, audit.round_trip, audit.agreement) == (1, 1, 1, 1)
