"""Sides of rows, duplicates and leaks."""

import hashlib
import random
from typing import Any

import numpy as np

from regraft.preprocess.holdout import Fate, content_key, decide, held_out, row_entry
from regraft.preprocess.params import HoldoutParams

ALWAYS = HoldoutParams(share=0.3, always={"phrasing": "unseen"})


def row(question: str, answer: str = "no", at: str | None = None, **slices: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row_id = hashlib.sha256(repr((messages, slices)).encode()).hexdigest()[:32]
    return {"row_id": row_id, "messages": messages, "slices": slices, "at": at}


def fates_of(rows: list[dict[str, Any]], params: HoldoutParams = ALWAYS) -> list[Fate]:
    entries = zip(*(row_entry(each, params) for each in rows), strict=True)
    kinds: tuple[Any, ...] = ("S64", "S32", "S32", "S32", np.int8)
    keys, answers, times, ids, fates = (np.array(e, dtype=k) for e, k in zip(entries, kinds, strict=True))
    decide(keys, answers, times, ids, fates)
    return [Fate(fate) for fate in fates]


def prompts(rows: list[dict[str, Any]], places: list[int], fates: list[Fate], wanted: Fate) -> set[tuple[str, str]]:
    """Prompt and answer of the rows that have a fate."""
    chosen = [rows[i]["messages"] for i, fate in zip(places, fates, strict=True) if fate == wanted]
    return {(content_key(messages), messages[-1]["content"]) for messages in chosen}


def test_adding_rows_never_moves_a_row_to_the_other_side() -> None:
    dice = random.Random(3)
    rows = [
        row(
            f"question {dice.randrange(150)}",
            f"answer {dice.randrange(3)}",
            f"2026-09-{i % 28 + 1:02}",
            phrasing=dice.choice(["seen"] * 9 + ["unseen"]),
        )
        for i in range(400)
    ]
    whole = fates_of(rows)
    everywhere = list(range(len(rows)))
    for _ in range(30):
        some = sorted(dice.sample(everywhere, dice.randrange(1, len(rows))))
        few = fates_of([rows[i] for i in some])
        moves = {(before, whole[i]) for i, before in zip(some, few, strict=True) if before != whole[i]}
        # A row that others join may turn out to be a later duplicate, and a training row to be a leak; nothing else.
        assert moves <= {
            (Fate.TRAIN, Fate.DEDUPLICATED),
            (Fate.TRAIN, Fate.LEAKED),
            (Fate.DEDUPLICATED, Fate.LEAKED),
            (Fate.HOLDOUT, Fate.DEDUPLICATED),
        }
        assert prompts(rows, some, few, Fate.HOLDOUT) <= prompts(rows, everywhere, whole, Fate.HOLDOUT)


def test_no_prompt_is_on_both_sides() -> None:
    rows = [row(f"Question {i % 60}", f"answer {i}", phrasing="unseen" if i % 7 == 0 else "seen") for i in range(300)]
    sides: dict[Fate, set[str]] = {Fate.TRAIN: set(), Fate.HOLDOUT: set()}
    for each, fate in zip(rows, fates_of(rows), strict=True):
        if fate in sides:
            sides[fate].add(content_key(each["messages"]))
    assert sides[Fate.TRAIN]
    assert sides[Fate.HOLDOUT]
    assert not sides[Fate.TRAIN] & sides[Fate.HOLDOUT]


def test_the_share_of_prompts_held_out_is_the_share_asked_for() -> None:
    keys = [content_key(row(f"question {i}")["messages"]) for i in range(4000)]
    params = HoldoutParams(share=0.1)
    assert 340 < sum(held_out(key, {}, params) for key in keys) < 460
    assert not any(held_out(key, {}, HoldoutParams(share=0)) for key in keys)


def test_a_training_row_goes_when_its_prompt_is_held_out_and_not_the_reverse() -> None:
    share = HoldoutParams(share=0, always={"phrasing": "unseen"})
    rows = [
        row("where is it", phrasing="seen"),
        row("WHERE  is it", "yes", phrasing="unseen"),
        row("other", phrasing="seen"),
    ]
    assert fates_of(rows, share) == [Fate.LEAKED, Fate.HOLDOUT, Fate.TRAIN]


def test_of_equal_rows_the_earliest_stays_and_another_answer_is_no_duplicate() -> None:
    none = HoldoutParams(share=0)
    rows = [row("a", at="2026-10-01"), row("A ", at="2026-09-01"), row("a", "other"), row("a", at=None)]
    assert fates_of(rows, none) == [Fate.DEDUPLICATED, Fate.TRAIN, Fate.TRAIN, Fate.DEDUPLICATED]


def test_equal_rows_are_held_out_once() -> None:
    share = HoldoutParams(share=0, always={"phrasing": "unseen"})
    rows = [row("a", at="2026-10-01", phrasing="unseen"), row("a", at="2026-09-01", phrasing="unseen", item="lamp")]
    assert fates_of(rows, share) == [Fate.DEDUPLICATED, Fate.HOLDOUT]


def test_a_duplicate_in_training_does_not_push_a_row_out_of_the_holdout() -> None:
    share = HoldoutParams(share=0, always={"phrasing": "unseen"})
    rows = [row("a", at="2026-09-01", phrasing="seen"), row("a", at="2026-10-01", phrasing="unseen")]
    assert fates_of(rows, share) == [Fate.LEAKED, Fate.HOLDOUT]


def test_rows_without_an_answer_have_nothing_to_train() -> None:
    empty, opening = row("a", "  \n"), row("a")
    opening["messages"] = opening["messages"][1:]
    assert fates_of([empty, opening]) == [Fate.NOTHING_TO_TRAIN] * 2


def test_case_blanks_and_unicode_composition_do_not_change_a_key_but_an_earlier_turn_does() -> None:
    key = content_key(row("Café  is\nopen")["messages"])
    assert content_key(row("cafe\u0301 is open ", "another answer")["messages"]) == key
    before = [{"role": "system", "content": "be kind"}, *row("Café is open")["messages"]]
    assert content_key(before) != key
    assert key == hashlib.sha256("café is open".encode()).hexdigest()


def test_duplicates_are_those_that_sorting_all_columns_finds() -> None:
    dice = np.random.default_rng(5)
    for size in (0, 1, 2, 50, 400):
        keys, answers, times, ids = (dice.integers(0, n, size).astype(np.uint64) for n in (30, 3, 4, 10**9))
        fates = np.where(keys % 5 == 0, Fate.HOLDOUT, Fate.TRAIN).astype(np.int8)
        found = fates.copy()
        decide(keys, answers, times, ids, found)
        first = {}
        for i in np.lexsort((ids, times)):
            first.setdefault((keys[i], answers[i]), i)
        expected = [f if first[keys[i], answers[i]] == i else Fate.DEDUPLICATED for i, f in enumerate(fates)]
        assert found.tolist() == expected
