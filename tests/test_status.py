"""What `regraft status` and `regraft lineage` say."""

from pathlib import Path
from typing import Any

import pytest

from regraft import status
from regraft.artifacts import commit_dir, write_json
from regraft.gates.verdict import Check, decide, save_verdict
from regraft.layout import STAGES, Layout
from regraft.register.version import Version


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    tags = {"regraft.identity": "i" * 64, "regraft.adapter_digest": "a" * 64, "regraft.verdict": "passed"}
    champion = Version("regraft", 3, "", "", "", 0, tags, ("champion",))
    monkeypatch.setattr(status.pipeline, "changed", lambda layout: {"train": ["params.yaml train: modified"]})
    monkeypatch.setattr(status, "versions", lambda params, layout: [champion])
    monkeypatch.setattr(status, "ledger", lambda params, layout: [])
    return Layout(tmp_path)


class Sections:
    register_: Any = None


def look(layout: Layout) -> dict[str, Any]:
    return status.status(layout, Sections())  # type: ignore[arg-type]


def test_a_stage_is_up_to_date_changed_failed_or_never_ran(layout: Layout) -> None:
    assert {name: look(layout)["stages"][name]["state"] for name in STAGES} == {
        **dict.fromkeys(STAGES, "up to date"),
        "train": "never ran",
    }
    with commit_dir(layout.stage("train")):
        pass
    assert look(layout)["stages"]["train"]["state"] == "changed"
    write_json(layout.outcome("train"), {"exit_code": 1, "error": {"message": "No memory."}})
    assert (look(layout)["stages"]["train"]["state"], look(layout)["stages"]["train"]["error"]) == (
        "failed",
        "No memory.",
    )


def test_the_champion_and_its_export_are_named_once_the_export_is_whole(layout: Layout) -> None:
    assert "Champion       regraft version 3, adapter aaaaaaaaaaaaaaaa, passed" in status.status_lines(look(layout))
    assert look(layout)["export"] is None
    with commit_dir(layout.exports / ("i" * 16)):
        pass
    assert look(layout)["export"] == str(layout.exports / ("i" * 16))


def test_a_champion_that_was_trained_on_what_is_to_be_forgotten_is_marked(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion = Version("regraft", 3, "", "", "", 0, {"regraft.forget": "{}"}, ("champion",))
    monkeypatch.setattr(status, "versions", lambda params, layout: [champion])
    assert any("to be forgotten" in line for line in status.status_lines(look(layout)))


@pytest.mark.parametrize(("against", "current"), [("a" * 64, True), ("b" * 64, False)])
def test_a_verdict_against_another_champion_is_marked(layout: Layout, against: str, current: bool) -> None:
    judged = {"adapter": "c" * 64, "champion": against}
    save_verdict(decide("run", [Check(name="c", passed=True, detail="Good.")], judged), layout.verdict)
    assert look(layout)["verdict"]["current"] is current
    told = "Last verdict (made against another champion than the present one)"
    assert (told in status.status_lines(look(layout))) is not current


def test_a_lineage_in_words_is_two_levels_deep_and_cut() -> None:
    found = {"schema_version": 1, "data": {"raw": {"a.jsonl": "x" * 200}, "rows": 3}}
    assert status.lineage_lines(found) == [
        "schema_version: 1",
        "data",
        "  raw",
        f"    a.jsonl: {'x' * 97}...",
        "  rows: 3",
    ]


def test_a_difference_names_rows_and_parameters_and_counts_the_digests_that_follow() -> None:
    found = {
        "versions": [1, 2],
        "differs": {
            "raw": {"b.jsonl": {"changed": "added", "rows": [None, 12]}},
            "params": {"train.rank": [8, 16]},
            "data": {"rows": [10, 22], "digest": ["a" * 64, "b" * 64]},
            "verdict": {"checks": [[], [{}]]},
        },
    }
    assert status.difference_lines(found) == [
        "What differs between version 1 and version 2:",
        "  b.jsonl: added (none -> 12 rows)",
        "  params.train.rank: 8 -> 16",
        "  data.rows: 10 -> 22",
        "  digests and lists that differ, too: data (1), verdict (1); `--json` has them",
    ]
    assert status.difference_lines({"versions": [1, 1], "differs": {}}) == ["Versions 1 and 1 were made from the same."]
