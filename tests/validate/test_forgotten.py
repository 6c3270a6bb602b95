"""What is on the list of what is forgotten comes back in no file and under no other column."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from regraft.artifacts import digest_bytes
from regraft.errors import DamagedArtifact, MissingInput, PinMismatch
from regraft.validate.forgotten import FORGET, Forgotten, fresh, load, shape_of
from regraft.validate.params import DataParams

Chat = Callable[..., str]


def listed(stage: Any, **entries: Any) -> str:
    forgotten = Forgotten("salt")
    forgotten = forgotten.adding([("content", forgotten.of_content(each)) for each in entries.get("contents", ())])
    forgotten = forgotten.adding([("id", forgotten.of_id(each)) for each in entries.get("ids", ())])
    return forgotten.save(stage.root / FORGET)


def said(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def test_a_forgotten_row_is_in_neither_file_and_counted(stage: Any, chat: Chat) -> None:
    digest = listed(stage, contents=[said("my name is Ada", "hello Ada")], ids=["r-3"])
    lines = [
        chat("my  name is ADA", "hello ada", id="r-1", kind="other"),
        chat("stays", id="r-2"),
        chat("anything", id="r-3"),
        json.dumps({"id": "r-3", "messages": "no list"}) + "\n",
        chat("mail me@example.com", id="r-3"),
    ]
    stage.write("a.jsonl", "".join(lines))
    report = stage.run({"id": "id", "forget": digest, "slices": ["kind"]})
    assert [row["id"] for row in stage.rows()] == ["r-2"]
    assert stage.quarantine() == []
    assert (report.rows_in, report.rows_out, report.rows_forgotten, report.rows_duplicate) == (5, 1, 4, 0)
    assert report.passed
    assert (
        "5 rows read, 1 accepted, 0 quarantined, 0 duplicates, 4 forgotten."
        in (stage.root / "docs/index.html").read_text()
    )


def test_a_list_that_is_another_missing_or_damaged_stops_the_stage(stage: Any, chat: Chat) -> None:
    stage.write("a.jsonl", chat("one"))
    digest = listed(stage, ids=["r-1", "r-2"])
    lines = (stage.root / FORGET).read_text().splitlines(keepends=True)
    (stage.root / FORGET).write_text("".join(lines[:-1]))
    with pytest.raises(PinMismatch, match=r"data\.forget says"):
        stage.run({"forget": digest})
    (stage.root / FORGET).unlink()
    with pytest.raises(MissingInput, match=r"is missing, and data\.forget names it"):
        stage.run({"forget": digest})
    (stage.root / FORGET).write_text("[]\n")
    with pytest.raises(DamagedArtifact, match="is not a list"):
        load(stage.root / FORGET, digest_bytes(b"[]\n"))


def test_the_list_holds_no_word_of_what_is_forgotten_and_two_lists_of_the_same_differ(tmp_path: Any) -> None:
    texts = []
    for name in ("one", "two"):
        forgotten = fresh()
        forgotten.adding([("content", forgotten.of_content(said("Ada", "Lovelace")))]).save(tmp_path / name)
        texts.append((tmp_path / name).read_text())
    assert "lovelace" not in texts[0].lower()  # "ada" could be three digits of a hash
    assert texts[0].splitlines()[1] != texts[1].splitlines()[1]
    read = load(tmp_path / "two", digest_bytes(texts[1].encode()))
    assert read is not None
    assert read.holds(said(" ADA", "lovelace "), None)
    assert not read.holds(said("Ada", "Byron"), "Ada")


def test_how_rows_are_read_is_told_by_what_makes_conversations_and_by_nothing_else() -> None:
    plain = DataParams()
    same = [DataParams(id="id"), DataParams(time="at"), DataParams(messages="messages"), DataParams(raw=["data/raw/a"])]
    other = [DataParams(layout="auto"), DataParams(messages="turns"), DataParams(tools="tools")]
    other.append(DataParams.model_validate({"sources": {"a": {"path": "data/raw/a", "layout": "alpaca"}}}))
    assert {shape_of(each) for each in same} == {shape_of(plain)}
    assert len({shape_of(each) for each in (plain, *other)}) == len(other) + 1
