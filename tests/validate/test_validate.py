import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from regraft.artifacts import digest_bytes, verify_dir
from regraft.errors import DataError, GateRefused, ParamsError
from regraft.params import read_yaml
from regraft.validate import docs as docs_module
from regraft.validate import validate as module
from regraft.validate.params import DataParams, ValidateParams
from regraft.validate.report import ValidateReport

ROOT = Path(__file__).parent.parent.parent
Chat = Callable[..., str]
REASONS = {
    "exact_duplicate": None,
    "empty_user": "empty_text",
    "broken_json": "answer_not_json",
    "unknown_action": "unknown_label",
    "missing_assistant": "missing_answer",
    "wrong_role": "wrong_roles",
    "email_address": "email",
    "card_number": "card_number",
    "control_characters": "control_characters",
    "mojibake": "mojibake",
    "over_long": "over_long",
}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_row_is_accepted_or_quarantined_with_its_reasons_and_never_both_or_neither(stage: Any, chat: Chat) -> None:
    lines = [chat("one", id="r-1"), "\n", "{\n", chat("mail me@example.com\x00", id="r-4"), chat("two", id="r-5")]
    stage.write("a.jsonl", "".join(lines))
    report = stage.run({"id": "id"})
    assert [(row["source"], row["line"], row["id"]) for row in stage.rows()] == [
        ("data/raw/a.jsonl", 1, "r-1"),
        ("data/raw/a.jsonl", 5, "r-5"),
    ]
    assert [(row["line"], row["id"], row["reasons"]) for row in stage.quarantine()] == [
        (2, None, ["empty_row"]),
        (3, None, ["not_json"]),
        (4, "r-4", ["control_characters", "email"]),
    ]
    assert (report.rows_in, report.rows_out, report.rows_quarantined) == (5, 2, 3)
    assert report.quarantined_by_reason == {"empty_row": 1, "not_json": 1, "control_characters": 1, "email": 1}


def test_rows_parquet_has_the_columns_that_preprocess_reads(stage: Any, chat: Chat) -> None:
    stage.write("a.jsonl", chat("one", "yes", kind="x", t="2026-09-01"))
    stage.run({"slices": ["kind"], "time": "t"})
    schema = pq.read_schema(stage.root / "out/rows.parquet")
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    assert [(field.name, field.type) for field in schema] == [
        ("row_id", pa.string()),
        ("source", pa.string()),
        ("line", pa.int64()),
        ("messages", pa.list_(message)),
        ("slices", pa.map_(pa.string(), pa.string())),
        ("at", pa.string()),
        ("id", pa.string()),
    ]
    assert set(schema.metadata or {}) == set()
    [row] = stage.rows()
    assert row["messages"] == [{"role": "user", "content": "one"}, {"role": "assistant", "content": "yes"}]
    assert (row["slices"], row["at"], row["id"]) == ([("kind", "x")], "2026-09-01", None)


def test_rows_are_sorted_by_file_and_line_whatever_order_the_entries_have(stage: Any, chat: Chat) -> None:
    stage.write("b.jsonl", chat("1") + chat("2"))
    stage.write("a.jsonl", chat("3"))
    stage.run({"raw": ["data/raw/b.jsonl", "data/raw/a.jsonl"]})
    assert [(row["source"][9:], row["line"]) for row in stage.rows()] == [
        ("a.jsonl", 1),
        ("b.jsonl", 1),
        ("b.jsonl", 2),
    ]


def test_the_same_rows_give_the_same_bytes_whatever_their_files_times(stage: Any, chat: Chat) -> None:
    path = stage.write("a.jsonl", chat("one", kind="x") + "{\n" + chat("two", kind="y") + chat("one", kind="x"))
    settings = {
        "data": {"slices": ["kind"]},
        "expectations": {"slices": {"kind": {"minimum": 1}}, "quarantined": {"share": 1}},
    }
    stage.run(**settings)
    first = snapshot(stage.root / "out"), snapshot(stage.root / "docs")
    os.utime(path, (1, 1))
    stage.run(**settings)
    assert (snapshot(stage.root / "out"), snapshot(stage.root / "docs")) == first
    assert sorted(first[0]) == ["manifest.json", "quarantine.parquet", "report.json", "rows.parquet"]


def test_the_number_of_rows_measured_at_once_changes_nothing(
    stage: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.write("a.jsonl", "".join(chat(f"q {n % 7}", kind=str(n % 3)) if n % 5 else "{\n" for n in range(40)))
    data = {"slices": ["kind"]}
    stage.run(data)
    first = snapshot(stage.root / "out")
    monkeypatch.setattr(module, "_BATCH", 3)
    stage.run(data)
    assert snapshot(stage.root / "out") == first


def test_duplicates_are_counted_and_kept_or_quarantined_as_the_parameters_say(stage: Any, chat: Chat) -> None:
    stage.write("a.jsonl", chat("one", id="1") + chat("two", id="2"))
    stage.write("b.jsonl", chat("one", id="3"))
    kept = stage.run({"id": "id"})
    assert (kept.rows_out, kept.rows_duplicate, kept.quarantined_by_reason) == (3, 1, {})
    warning = next(each for each in kept.expectations if each.name == "duplicates")
    assert (warning.passed, warning.level, warning.measured, warning.rows) == (False, "warn", 1 / 3, 1)
    assert kept.passed
    taken = stage.run({"id": "id"}, duplicates="quarantine")
    assert (taken.rows_out, taken.rows_duplicate, taken.quarantined_by_reason) == (2, 1, {"duplicate": 1})
    assert [row["id"] for row in stage.quarantine()] == ["3"]


def test_a_block_refuses_after_writing_report_rows_and_docs(stage: Any, chat: Chat) -> None:
    stage.write("a.jsonl", chat("one") + "{\n")
    with pytest.raises(GateRefused) as failure:
        stage.run(expectations={"quarantined": {"level": "block", "share": 0.4}})
    assert failure.value.message == "the data was refused:\n  quarantined: measured 0.5, threshold 0.4"
    verify_dir(stage.root / "out")
    verify_dir(stage.root / "docs")
    report = ValidateReport.load(stage.root / "docs/report.json")
    assert report == ValidateReport.load(stage.root / "out/report.json")
    assert not report.passed
    assert "data/raw/a.jsonl:2" in (stage.root / "docs/index.html").read_text()


def test_the_refused_rows_lie_beside_the_docs_until_data_passes_and_the_error_names_them(
    stage: Any, chat: Chat
) -> None:
    stage.write("a.jsonl", chat("one") + "{\n")
    with pytest.raises(GateRefused) as failure:
        stage.run(expectations={"quarantined": {"level": "block", "share": 0.4}})
    left = stage.root / "docs/quarantine.parquet"
    assert str(left) in (failure.value.fix or "")
    assert pq.read_table(left).to_pylist() == stage.quarantine()
    assert [row["line"] for row in stage.quarantine()] == [2]
    stage.run()
    assert not left.exists()


def test_a_reason_and_a_slice_can_block(stage: Any, chat: Chat) -> None:
    stage.write("a.jsonl", chat("one", kind="x") + "{\n")
    limits = {
        "quarantined": {"share": 1.0},
        "reasons": {"not_json": {"level": "block", "share": 0.4}, "email": {"level": "block", "share": 0.0}},
        "slices": {"kind": {"level": "block", "minimum": 1, "values": ["x", "y"]}},
    }
    with pytest.raises(GateRefused) as failure:
        stage.run({"slices": ["kind"]}, expectations=limits)
    assert failure.value.message == (
        "the data was refused:\n"
        "  reasons.not_json: measured 0.5, threshold 0.4\n"
        "  slices.kind.values: measured 1, threshold 0; y"
    )


def test_a_warning_lets_the_run_go_on_and_says_so(stage: Any, chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    stage.write("a.jsonl", chat("one") + "{\n")
    report = stage.run(expectations={"quarantined": {"level": "warn", "share": 0.4}})
    assert report.passed
    assert "warning: quarantined: measured 0.5, threshold 0.4" in caplog.messages


def test_an_expectation_that_great_expectations_denies_has_not_passed(
    stage: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft.validate import suite

    monkeypatch.setattr(suite, "run_suite", lambda wanted, frames, site: {each.name: False for each in wanted})
    stage.write("a.jsonl", chat("one"))
    with pytest.raises(GateRefused, match="rows: measured 1, threshold 1"):
        stage.run()


def test_one_unreadable_file_among_others_blocks_and_is_named(stage: Any, chat: Chat) -> None:
    stage.write("a.jsonl", chat("one"))
    stage.write("b.jsonl", "")
    stage.write("c.xlsx", "PK")
    with pytest.raises(GateRefused) as failure:
        stage.run()
    assert "files: measured 2, threshold 0; data/raw/b.jsonl: it is empty; data/raw/c.xlsx: `.xlsx` is not" in str(
        failure.value
    )


def test_no_row_at_all_is_an_error_and_leaves_the_former_output(stage: Any, chat: Chat) -> None:
    path = stage.write("a.jsonl", chat("one"))
    stage.run()
    before = snapshot(stage.root / "out"), snapshot(stage.root / "docs")
    path.write_text("")
    with pytest.raises(DataError) as failure:
        stage.run()
    assert failure.value.message == "there is not one row in data/raw\n  data/raw/a.jsonl: it is empty"
    assert (snapshot(stage.root / "out"), snapshot(stage.root / "docs")) == before
    assert sorted(each.name for each in stage.root.iterdir()) == ["data", "docs", "out"]


def test_a_slice_of_very_many_values_is_a_mistake_of_the_parameters(
    stage: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_VALUES", 3)
    stage.write("a.jsonl", "".join(chat("one", kind=str(n)) for n in range(4)))
    with pytest.raises(ParamsError, match=r"data\.slices\.kind has over 3 different values"):
        stage.run({"slices": ["kind"]})


def test_an_expectation_about_an_unknown_slice_is_a_mistake_of_the_parameters(stage: Any, chat: Chat) -> None:
    stage.write("a.jsonl", chat("one"))
    with pytest.raises(ParamsError, match=r"slices names acton; data\.slices has action"):
        stage.run({"slices": ["action"]}, expectations={"slices": {"acton": {"minimum": 1}}})


def test_the_report_counts_slices_times_files_and_unknown_labels(stage: Any, chat: Chat) -> None:
    lines = [
        chat("one", "a", kind="x", t="2026-09-03"),
        chat("two", "b", kind="y", t="2026-09-01"),
        chat("three", "me@example.com", kind="x", t="2026-08-01"),
    ]
    path = stage.write("a.jsonl", "".join(lines))
    stage.write("README.md", "about")
    report = stage.run({"slices": ["kind"], "time": "t"}, labels={"allowed": ["a", "b"]})
    assert report.slices == {"kind": {"x": 1, "y": 1}}
    assert (report.time.first, report.time.last) == ("2026-09-01", "2026-09-03")
    assert report.unknown_labels == {"[email]": 1}
    assert report.files["data/raw/a.jsonl"].model_dump() == {
        "sha256": digest_bytes(path.read_bytes()),
        "rows": 3,
        "quarantined": 1,
        "problem": None,
    }
    assert report.ignored == ["data/raw/README.md"]
    assert report.data_digest == digest_bytes("".join(row["row_id"] + "\n" for row in stage.rows()).encode())


def test_personal_data_is_in_no_file_and_in_no_log(stage: Any, chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    secret = "AKIA" + "ABCD" * 4
    texts = ["jane.roe@example.com", "4111 1111 1111 1111", secret]
    lines = [chat(f"it is {text}", id=text, kind=text) for text in texts]
    stage.write("a.jsonl", "".join(lines) + '{"messages": "jane.roe@example.com\n' + chat("fine", kind="k"))
    stage.run({"id": "id", "slices": ["kind"]})
    outputs = {**snapshot(stage.root / "out"), **snapshot(stage.root / "docs")}
    written = b"".join(outputs.values()) + json.dumps([stage.rows(), stage.quarantine()]).encode()
    for text in ("jane.roe", "1111 1111", secret):
        assert text.encode() not in written
        assert text not in caplog.text
    assert len(stage.quarantine()) == 4


def test_the_docs_ask_for_nothing_from_another_host_and_name_every_expectation(stage: Any, chat: Chat) -> None:
    stage.write("a.jsonl", chat("one"))
    report = stage.run()
    pages = {
        name: content.decode() for name, content in snapshot(stage.root / "docs").items() if name.endswith(".html")
    }
    assert sorted(pages) == [
        "expectations/files.html",
        "expectations/rows.html",
        "index.html",
        "validations/files/files/20000101T000000.000000Z/measured-files.html",
        "validations/rows/rows/20000101T000000.000000Z/measured-rows.html",
    ]
    for page in pages.values():
        assert "<script" not in page
        assert "src=" not in page
        assert "http" not in page
    assert all(f"<td>{each.name}</td>" in pages["index.html"] for each in report.expectations)
    assert "share of rows quarantined: 0, expected at most 1 (block)" in pages["expectations/rows.html"]


def test_text_from_the_data_cannot_become_markup_in_the_docs(stage: Any, chat: Chat) -> None:
    stage.write("a.jsonl", chat("one", kind="<script>alert(1)</script>"))
    stage.run({"slices": ["kind"]}, expectations={"slices": {"kind": {"minimum": 5}}})
    assert "&lt;script&gt;alert(1)" in (stage.root / "docs/index.html").read_text()
    assert all(b"<script" not in page for name, page in snapshot(stage.root / "docs").items() if name.endswith(".html"))


@pytest.mark.parametrize(
    ("raw", "data", "rows"),
    [
        (
            "data/banking77/train.csv",
            {"prompt": "{text}", "answer": "{category}", "slices": ["category"]},
            10_003,
        ),
        ("data/gsm8k/train.jsonl", {"prompt": "{question}", "answer": "{answer}"}, 7_473),
    ],
)
def test_real_data_is_read_through_templates_alone(
    shared: Path, tmp_path: Path, raw: str, data: dict[str, Any], rows: int
) -> None:
    mapping = DataParams.model_validate({"raw": [raw], "layout": "prompt_answer"} | data)
    report = module.validate(ValidateParams(), mapping, raw_root=shared, out=tmp_path / "out", docs=tmp_path / "docs")
    assert (report.rows_in, report.rows_out, report.passed) == (rows, rows, True)
    assert list(report.files) == [raw]
    if report.slices:
        assert len(report.slices["category"]) == 77


def test_every_flaw_of_the_shipped_data_is_caught_and_nothing_else(tmp_path: Path) -> None:
    flaws: dict[str, str] = json.loads((ROOT / "data/shipped/flaws.json").read_text())
    data = DataParams.model_validate({"raw": ["data/raw/2026-09.jsonl", "data/later/2026-10.jsonl"], "id": "id"})
    spec = read_yaml(ROOT / "data/shipped/phrasings.yaml")
    labels = {"json_field": "action", "allowed": [*spec["actions"], *spec["later_actions"]]}
    params = ValidateParams.model_validate({"max_bytes": 2048, "answers_are_json": True, "labels": labels})
    report = module.validate(params, data, raw_root=ROOT, out=tmp_path / "out", docs=tmp_path / "docs")
    found = {row["id"]: row["reasons"] for row in pq.read_table(tmp_path / "out/quarantine.parquet").to_pylist()}
    assert found == {name: [REASONS[kind]] for name, kind in flaws.items() if REASONS[kind]}
    assert report.rows_duplicate == Counter(flaws.values())["exact_duplicate"]
    assert set(REASONS) == set(flaws.values())


@pytest.mark.parametrize("change", ["appended", "replaced", "new", "gone"])
def test_a_file_that_changes_while_the_data_is_read_is_an_error_and_the_old_output_stays(
    stage: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = stage.write("a.jsonl", chat("one"))
    stage.write("b.jsonl", chat("two"))
    stage.run()
    before = {name: snapshot(stage.root / name) for name in ("out", "docs")}
    finish = docs_module.finish

    def meanwhile(*given: Any) -> None:
        finish(*given)
        match change:
            case "appended":
                path.write_text(path.read_text() + chat("three"))
            case "replaced":
                other = stage.root / "other"
                other.write_text(chat("six"))
                os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
                other.replace(path)
            case "new":
                stage.write("c.jsonl", chat("four"))
            case "gone":
                path.unlink()

    monkeypatch.setattr(docs_module, "finish", meanwhile)
    name = "data/raw/c.jsonl" if change == "new" else "data/raw/a.jsonl"
    with pytest.raises(DataError, match=f"^{name} changed while the data was read") as caught:
        stage.run()
    assert "move them into data/raw" in (caught.value.fix or "")
    assert {name: snapshot(stage.root / name) for name in ("out", "docs")} == before
