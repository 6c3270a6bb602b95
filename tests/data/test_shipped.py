"""The shipped data: reproducible, as described in data/README.md, and nothing of it in the stand-in's corpus."""

import collections
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parents[2] / "data"


def _load_make() -> Any:
    spec = importlib.util.spec_from_file_location("shipped_make", DATA / "shipped/make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _load_make()


@pytest.fixture(scope="module")
def spec() -> Any:
    return make.load("phrasings.yaml")


@pytest.fixture(scope="module")
def batches() -> dict[str, list[dict[str, Any]]]:
    return {
        path: [json.loads(line) for line in (DATA / path).read_text(encoding="utf-8").splitlines()]
        for path in make.BATCHES
    }


@pytest.fixture(scope="module")
def rows(batches: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for batch in batches.values() for row in batch}


@pytest.fixture(scope="module")
def flaws() -> dict[str, str]:
    found: dict[str, str] = json.loads((DATA / "shipped/flaws.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def corpus() -> str:
    """Every document, normalised, with a separator between them that no prompt holds."""
    documents = (DATA / "shipped/corpus.txt").read_text(encoding="utf-8").split("\n\n")
    return "\0".join(make.normalise(document) for document in documents)


def actions_of(spec: Any) -> dict[str, Any]:
    return {**spec["actions"], **spec["later_actions"]}


def templates(spec: Any, of_action: Any, unseen: bool) -> list[str]:
    side = of_action["unseen"] if unseen else of_action
    return [template for register in make.REGISTERS for template in side[register]]


def unseen_patterns(spec: Any) -> list[re.Pattern[str]]:
    """What each unseen template looks like once its slots are filled, in normalised text."""
    patterns = []
    for of_action in actions_of(spec).values():
        for template in templates(spec, of_action, unseen=True):
            parts = re.split(r"\{(\w+)\}", template)
            text = re.escape(make.normalise(parts[0]) + (" " if parts[0].endswith(" ") else ""))
            for name, rest in zip(parts[1::2], parts[2::2], strict=True):
                form = spec["forms"].get(name)
                surfaces = (form["surfaces"] if form else spec["slots"][name]).values()
                choices = "|".join(re.escape(surface.casefold()) for values in surfaces for surface in values)
                text += f"(?:{choices})" + re.escape(rest.casefold())
            patterns.append(re.compile(text))
    return patterns


def test_make_reproduces_the_committed_bytes() -> None:
    made = make.generate()
    assert {path: (DATA / path).read_bytes() == content for path, content in made.items()} == dict.fromkeys(made, True)


def test_the_files_are_small_enough_for_git() -> None:
    assert sum(path.stat().st_size for path in DATA.glob("shipped/*")) < 3_000_000
    assert sum((DATA / path).stat().st_size for path in make.BATCHES) < 3_500_000


def test_there_are_the_rows_that_the_readme_counts(batches: dict[str, list[dict[str, Any]]], rows: Any) -> None:
    assert {path: len(batch) for path, batch in batches.items()} == {
        "raw/2026-09.jsonl": 6000,
        "later/2026-10.jsonl": 1200,
    }
    assert len(rows) == 7200


def test_the_phrasings_are_what_the_readme_counts(spec: Any) -> None:
    counts = {
        name: [len(templates(spec, of_action, unseen)) for unseen in (False, True)]
        for name, of_action in actions_of(spec).items()
    }
    assert set(map(tuple, counts.values())) == {(24, 4)}
    assert len(counts) == 10


def test_the_new_action_is_in_the_second_batch_only(batches: dict[str, list[dict[str, Any]]]) -> None:
    first, second = (collections.Counter(row["action"] for row in batch) for batch in batches.values())
    assert first["book_repair"] == 0
    assert 0.4 < second["book_repair"] / second.total() < 0.6
    assert set(second) - set(make.UNKNOWN_ACTIONS) == set(first) - set(make.UNKNOWN_ACTIONS) | {"book_repair"}


def test_the_second_batch_is_later(batches: dict[str, list[dict[str, Any]]]) -> None:
    dates = [[row["at"] for row in batch] for batch in batches.values()]
    assert all(of_batch == sorted(of_batch) for of_batch in dates)
    assert dates[0][-1] < dates[1][0]


def test_every_slice_is_worth_a_figure(batches: dict[str, list[dict[str, Any]]]) -> None:
    for field in ("register", "length", "phrasing"):
        counts = collections.Counter(row[field] for row in batches["raw/2026-09.jsonl"])
        assert min(counts.values()) >= 200, (field, counts)


def test_clean_rows_are_whole(rows: dict[str, dict[str, Any]], flaws: dict[str, str], spec: Any) -> None:
    for id, row in rows.items():
        if flaws.get(id, "exact_duplicate") != "exact_duplicate":
            continue
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        answer = json.loads(assistant["content"])
        assert assistant["content"] == json.dumps(answer)
        assert list(answer) == ["action", *actions_of(spec)[row["action"]]["slots"]]
        assert all(answer[slot] in spec["slots"][slot] for slot in list(answer)[1:])
        assert 10 <= len(user["content"]) <= 300
        assert user["content"].isascii()
        assert not re.search(r"[@\x00-\x1f]|\d{4}", user["content"])


def test_only_duplicates_say_the_same_thing_twice(rows: dict[str, dict[str, Any]], flaws: dict[str, str]) -> None:
    counts = collections.Counter(
        make.normalise(row["messages"][0]["content"])
        for id, row in rows.items()
        if flaws.get(id) not in ("exact_duplicate", "empty_user")
    )
    assert max(counts.values()) == 1


def test_the_flaws_are_as_many_as_make_says(flaws: dict[str, str]) -> None:
    assert collections.Counter(flaws.values()) == {kind: sum(counts) for kind, counts in make.FLAWS.items()}


def test_every_flaw_listed_is_there(rows: dict[str, dict[str, Any]], flaws: dict[str, str], spec: Any) -> None:
    firsts: dict[str, str] = {}
    for id, row in rows.items():
        firsts.setdefault(json.dumps(row["messages"]), id)

    def is_json(text: str) -> bool:
        try:
            json.loads(text)
        except ValueError:
            return False
        return True

    present = {
        "exact_duplicate": lambda row, text: firsts[json.dumps(row["messages"])] < row["id"],
        "empty_user": lambda row, text: not text.strip(),
        "broken_json": lambda row, text: not is_json(row["messages"][1]["content"]),
        "unknown_action": lambda row, text: row["action"] not in actions_of(spec),
        "missing_assistant": lambda row, text: [m["role"] for m in row["messages"]] == ["user"],
        "wrong_role": lambda row, text: [m["role"] for m in row["messages"]] == ["customer", "bot"],
        "email_address": lambda row, text: re.search(r"\w+@example\.(com|org)", text),
        "card_number": lambda row, text: any(card in text for card in make.CARDS),
        "control_characters": lambda row, text: re.search(r"[\x00-\x08\x1b]", text),
        "mojibake": lambda row, text: text.encode("cp1252").decode("utf-8") != text,
        "over_long": lambda row, text: len(text) > 4000,
    }
    assert set(present) == set(flaws.values())
    absent = [
        (id, kind) for id, kind in flaws.items() if not present[kind](rows[id], rows[id]["messages"][0]["content"])
    ]
    assert absent == []


def test_rows_marked_seen_and_the_corpus_show_no_unseen_phrasing(rows: Any, corpus: str, spec: Any) -> None:
    seen = "\n".join(
        make.normalise(row["messages"][0]["content"]) for row in rows.values() if row["phrasing"] == "seen"
    )
    unseen = "\n".join(
        make.normalise(row["messages"][0]["content"]) for row in rows.values() if row["phrasing"] == "unseen"
    )
    for pattern in unseen_patterns(spec):
        assert not pattern.search(seen), pattern.pattern
        assert not pattern.search(corpus), pattern.pattern
        assert pattern.search(unseen), pattern.pattern


def test_no_prompt_of_the_data_is_in_the_corpus(rows: dict[str, dict[str, Any]], corpus: str) -> None:
    prompts = {make.normalise(row["messages"][0]["content"]) for row in rows.values()} - {""}
    assert [prompt for prompt in prompts if prompt in corpus] == []


def test_the_corpus_holds_no_action_in_an_answer_to_a_request() -> None:
    documents = (DATA / "shipped/corpus.txt").read_text(encoding="utf-8").strip().split("\n\n")
    with_action = [document for document in documents if '"action"' in document]
    assert with_action
    assert all(set(json.loads(document)) > {"action"} for document in with_action)
