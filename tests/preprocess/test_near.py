"""Planted leaks are found, and other rows stay."""

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paraphrases import paraphrased, reordered

from regraft.preprocess.holdout import plain
from regraft.preprocess.near import HeldOut, grams, sketch
from regraft.preprocess.params import HoldoutParams, LeakParams, PreprocessParams
from regraft.preprocess.preprocess import preprocess


@pytest.fixture(scope="module")
def questions(shared: Path) -> list[str]:
    lines = (shared / "data/gsm8k/train.jsonl").read_text().splitlines()[:2000]
    return [json.loads(line)["question"] for line in lines]


def near(held: list[str], rows: list[str], threshold: float = 0.6) -> np.ndarray:
    return HeldOut(*sketch([plain(text) for text in held]), threshold).near(*sketch([plain(text) for text in rows]))


def test_all_exact_and_reordered_copies_are_found_and_nearly_all_paraphrased_ones(questions: list[str]) -> None:
    dice, held = random.Random(0), questions[:1000]
    assert near(held, [text.upper() for text in held]).all()
    assert near(held, [reordered(text, dice) for text in held]).all()
    assert near(held, [" ".join(dice.sample(text.split(), len(text.split()))) for text in held]).all()
    assert near(held, [paraphrased(text, dice) for text in held]).mean() >= 0.95


def test_other_questions_are_not_taken_for_copies(questions: list[str]) -> None:
    assert near(questions[:1000], questions[1000:]).mean() <= 0.01


def test_signatures_estimate_the_jaccard_index_of_word_pairs() -> None:
    dice = random.Random(1)
    for _ in range(30):
        one = [f"w{dice.randrange(50)}" for _ in range(60)]
        other = [*one[: dice.randrange(60)], *(f"x{dice.randrange(50)}" for _ in range(30))]
        pairs = [set(pairwise(words)) for words in (one, other)]
        signatures, _ = sketch([" ".join(one), " ".join(other)])
        wanted = len(pairs[0] & pairs[1]) / len(pairs[0] | pairs[1])
        assert abs((signatures[0] == signatures[1]).mean() - wanted) < 0.22  # 3.5 standard errors of 64 hashes


def test_texts_without_words_and_with_one_word_have_sketches() -> None:
    signatures, _ = sketch(["", "hello", "hello"])
    assert (signatures[1] == signatures[2]).all()
    assert not (signatures[0] == signatures[1]).any()
    assert sketch([])[0].shape == (0, 64)


def test_runs_of_words_are_those_within_a_text() -> None:
    found, counts = grams(["a b c d", "x", "b c d", ""], 3)
    assert counts.tolist() == [2, 0, 1, 0]
    assert found[1] == found[2] != found[0]


def row(question: str, side: str, answer: str = "yes") -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "slices": {"side": side}}


LONG = "the answer is seven because three and four make seven and nothing else was ever asked of anybody here"


@pytest.mark.parametrize(
    ("leaks", "lost"),
    [
        ({}, {}),
        ({"near": 0.6}, {"near_holdout": 2}),
        ({"run": 13}, {"contaminated": 3}),
        ({"near": 0.6, "run": 13}, {"near_holdout": 2, "contaminated": 1}),
    ],
)
def test_training_rows_near_the_holdout_are_left_out_and_counted_and_the_holdout_stays(
    tokenizer_base: Path, write_rows: Callable[..., Path], tmp_path: Path, leaks: dict[str, Any], lost: dict[str, int]
) -> None:
    held = "I lost the green lamp that I ordered on Monday. Could you tell me where it is now? It was a gift."
    rows = [
        row(held, "held", "no"),
        row("what is three and four", "held", LONG),
        row("Hello there! " + held, "train"),
        row(
            "It was a gift. I lost the green lamp that I ordered on Monday. Could you tell me where it is now?", "train"
        ),
        row("something else is asked here about opening hours", "train", "well: " + LONG),
        *(row(f"order {i} has not arrived from shop {i * i} for {i + 7} days", "train", f"{i}") for i in range(20)),
    ]
    params = PreprocessParams(
        max_length=512, holdout=HoldoutParams(share=0, always={"side": "held"}), leaks=LeakParams(**leaks)
    )
    report = preprocess(params, base=tokenizer_base, rows=write_rows(rows), out=tmp_path / "out")
    counts = report.counts.model_dump()
    assert {name: counts[name] for name in ("near_holdout", "contaminated") if counts[name]} == lost
    assert counts["holdout"] == 2
    assert counts["train"] == 23 - sum(lost.values())
