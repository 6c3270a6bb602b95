"""What `regraft data diff` counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from regraft.errors import MissingInput
from regraft.preprocess.difference import diff_rows, lines


def row(question: str, answer: str = "yes", **slices: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "slices": slices}


def named(folder: Path, names: list[str]) -> Path:
    """Give the rows of a file their own ids."""
    path = folder / "rows.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.schema.names.index("id"), "id", pa.array(names, pa.string())), path)
    return path


def test_rows_words_runs_and_slices_are_compared(write_rows: Callable[..., Path]) -> None:
    old = [row("where is my lamp today please", kind="a"), row("cancel it", kind="a"), row("send it back", kind="b")]
    new = [
        old[0],
        row("cancel it at once", kind="a"),
        row("Where  is my LAMP today please", kind="a"),
        row("mend my kettle in the shop", kind="c"),
        row("mend my kettle tomorrow", kind="c"),
    ]
    before = named(write_rows(old, "old"), ["r1", "r2", "r3"])
    after = named(write_rows(new, "new"), ["r1", "r2", "r4", "r5", "r6"])
    found = diff_rows(before, after)
    assert (found.rows_before, found.rows_after, found.same) == (3, 5, 1)
    assert (found.new, found.changed, found.removed, found.repeated) == (3, 1, 1, 1)
    assert found.most_frequent_new_words == {"kettle": 2, "mend": 2}
    assert found.new_words == len({"at", "once", "mend", "kettle", "in", "the", "shop", "tomorrow"})
    assert found.slices == {"kind": {"a": 1, "b": -1, "c": 2}}
    assert 0 < found.novel_runs < 1
    assert lines(found)[0] == "3 rows before, 5 after: 1 the same, 3 new, 1 changed, 1 removed"


def test_a_version_does_not_differ_from_itself(write_rows: Callable[..., Path]) -> None:
    path = write_rows([row(f"order {i}") for i in range(5)]) / "rows.parquet"
    found = diff_rows(path, path)
    assert (found.same, found.new, found.changed, found.removed, found.new_words) == (5, 0, 0, 0, 0)
    assert (found.novel_runs, found.slices) == (0, {})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"old\.parquet is missing"):
        diff_rows(tmp_path / "old.parquet", tmp_path / "new.parquet")


def test_sources_and_calls_of_tools_are_told_and_a_changed_call_is_a_changed_row(tmp_path: Path) -> None:
    from regraft.validate.params import DataParams, ValidateParams
    from regraft.validate.validate import validate

    def made(name: str, calls: list[str]) -> Path:
        root = tmp_path / name
        (root / "data/raw").mkdir(parents=True)
        rows = []
        for i, function in enumerate(calls):
            call = {"type": "function", "function": {"name": function, "arguments": "{}"}}
            turns = [
                {"role": "user", "content": f"question {i}"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ]
            rows.append(json.dumps({"id": str(i), "messages": turns, "tools": None}) + "\n")
        (root / "data/raw/a.jsonl").write_text("".join(rows))
        data = {"tools": "tools", "id": "id", "sources": {name: {"path": "data/raw/a.jsonl"}}}
        out = root / "out"
        validate(ValidateParams(), DataParams.model_validate(data), raw_root=root, out=out, docs=root / "docs")
        return out / "rows.parquet"

    found = diff_rows(made("one", ["stock", "stock"]), made("two", ["stock", "price", "price"]))
    assert found.calls == {"price": 2, "stock": -1}
    assert found.slices == {"source": {"one": -2, "two": 3}}
    assert "calls of tools: price +2, stock -1" in lines(found)
    same = diff_rows(made("three", ["stock"]), tmp_path / "three/out/rows.parquet")
    assert (same.calls, same.changed, same.same) == ({}, 0, 1)


def test_the_command_takes_files_folders_and_versions(
    write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from regraft import decision, settings
    from regraft.cli import app

    old = write_rows([row("where is my lamp")], "old")
    new = write_rows([row("where is my lamp"), row("cancel it")], "new")

    def told(*arguments: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["data", "diff", *arguments, "--json"])
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    between_files = told(str(old / "rows.parquet"), str(new))
    assert (between_files["same"], between_files["new"]) == (1, 1)

    (tmp_path / "clone").mkdir()
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / "clone" / name).write_text("{}")
    monkeypatch.setattr(settings, "load", lambda layout: None)
    monkeypatch.setattr(
        decision, "rows_of", lambda layout, parameters, which: {"champion": old, "3": new}[which] / "rows.parquet"
    )
    root = ["--root", str(tmp_path / "clone")]
    assert told("3", "champion", *root)["removed"] == 1
    present = tmp_path / "clone/data/work/validate"
    present.mkdir(parents=True)
    (present / "rows.parquet").write_bytes((new / "rows.parquet").read_bytes())
    assert told("champion", *root) == between_files
