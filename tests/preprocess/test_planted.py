"""What was planted is found, on real rows and through both stages: leaks into the training side, and drift."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from paraphrases import paraphrased, reordered

from regraft.gates.drift import judge_drift
from regraft.gates.params import DriftGate
from regraft.gates.profile import Profile, profile
from regraft.gates.verdict import Verdict
from regraft.preprocess.params import HoldoutParams, LeakParams, PreprocessParams
from regraft.preprocess.preprocess import preprocess
from regraft.validate.params import DataParams, ValidateParams
from regraft.validate.validate import validate

HELD, OTHERS = 300, 700


def spaced(text: str, dice: random.Random) -> str:
    return "  " + text.replace(" ", "\n", 1) + " "


def run_validate(root: Path, layout: dict[str, Any]) -> Path:
    permissive = ValidateParams.model_validate({"expectations": {"quarantined": {"share": 0.2}}})
    report = validate(
        permissive, DataParams.model_validate(layout), raw_root=root, out=root / "validate", docs=root / "docs"
    )
    assert report.rows_in == report.rows_out + report.rows_quarantined
    return root / "validate"


def test_no_exact_or_reordered_copy_of_a_held_out_question_is_trained_on_and_hardly_a_paraphrase(
    shared: Path, tokenizer_base: Path, tmp_path: Path
) -> None:
    dice = random.Random(3)
    with (shared / "data/gsm8k/train.jsonl").open(encoding="utf-8") as file:
        pairs = [(row["question"], row["answer"]) for row in map(json.loads, file)][: HELD + OTHERS]
    kinds: dict[str, Callable[[str, random.Random], str]] = {
        "exact": lambda text, _: text,
        "spaced": spaced,
        "reordered": reordered,
        "paraphrased": paraphrased,
    }
    rows = [("other", question, answer) for question, answer in pairs[HELD:]]
    # The copies come first, in the files too: it is not the order that decides which of two goes.
    rows += [(kind, make(q, dice), "other words " + a) for kind, make in kinds.items() for q, a in pairs[:HELD]]
    dice.shuffle(rows)
    rows += [("held", question, answer) for question, answer in pairs[:HELD]]
    (tmp_path / "data/raw").mkdir(parents=True)
    with (tmp_path / "data/raw/a.jsonl").open("w", encoding="utf-8") as file:
        for i, (kind, question, answer) in enumerate(rows):
            side = "held" if kind == "held" else "train"
            file.write(json.dumps({"q": question, "a": answer, "side": side, "id": f"{kind}-{i}"}) + "\n")
    layout = {"layout": "prompt_answer", "prompt": "{q}", "answer": "{a}", "id": "id", "slices": ["side"]}
    validated = run_validate(tmp_path, layout)
    params = PreprocessParams(
        max_length=4096, holdout=HoldoutParams(share=0, always={"side": "held"}), leaks=LeakParams(near=0.6)
    )
    report = preprocess(params, base=tokenizer_base, rows=validated, out=tmp_path / "out")

    accepted = pq.read_table(validated / "rows.parquet").to_pylist()
    came = {kind: sum(row["id"].startswith(kind) for row in accepted) for kind in (*kinds, "other", "held")}
    assert min(came.values()) > 0.95 * HELD, "the contract let nearly all of them in"
    names = {row["row_id"]: row["id"].split("-")[0] for row in accepted}
    trained = pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / "out").glob("train_rows-*.parquet")))
    stayed = [names[row_id] for row_id in trained["row_id"].to_pylist()]
    assert report.counts.rows_in == len(accepted)
    assert report.counts.holdout == came["held"]
    assert (stayed.count("exact"), stayed.count("spaced"), stayed.count("reordered")) == (0, 0, 0)
    assert stayed.count("paraphrased") <= 0.05 * came["paraphrased"]
    assert stayed.count("other") >= 0.99 * came["other"]


@pytest.fixture(scope="module")
def requests(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Banking77's requests as `validate` accepts them: ten thousand real texts with 77 labels."""
    root = tmp_path_factory.mktemp("requests")
    (root / "data/raw").mkdir(parents=True)
    (root / "data/raw/a.csv").write_bytes((shared / "data/banking77/train.csv").read_bytes())
    layout = {"layout": "prompt_answer", "prompt": "{text}", "answer": "{category}", "slices": ["category"]}
    return pq.read_table(run_validate(root, layout) / "rows.parquet")


def of(rows: pa.Table, folder: Path) -> Profile:
    pq.write_table(rows, folder / "rows.parquet")
    return profile(folder / "rows.parquet")


def drift(new: Profile, old: Profile) -> Verdict:
    return judge_drift(DriftGate(), new, old, judged={"rows": "r"})


def test_a_hundred_resamples_of_the_same_real_rows_cry_at_most_once(requests: pa.Table, tmp_path: Path) -> None:
    random_ = np.random.default_rng(7)
    cried = []
    for _ in range(100):
        order = random_.permutation(len(requests))
        verdict = drift(of(requests.take(order[:800]), tmp_path), of(requests.take(order[800:2800]), tmp_path))
        cried += verdict.reasons if not verdict.passed else []
    assert len(cried) <= 1, cried


def changed(rows: pa.Table, change: Callable[[dict[str, Any]], dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([change(row) for row in rows.to_pylist()], rows.schema)


def said(row: dict[str, Any], prompt: str) -> dict[str, Any]:
    return {**row, "messages": [{"role": "user", "content": prompt}, row["messages"][1]]}


PLANTED: dict[str, tuple[str, Callable[[dict[str, Any], random.Random], dict[str, Any]]]] = {
    "a label that takes a fifth of the rows": (
        "slice category",
        lambda row, dice: {**row, "slices": [("category", "new_card")]} if dice.random() < 0.2 else row,
    ),
    "another source for half of the rows": (
        "source",
        lambda row, dice: {**row, "source": "data/raw/chat/b.csv"} if dice.random() < 0.5 else row,
    ),
    "pasted mails before half of the requests": (
        "prompt length",
        lambda row, dice: said(row, "Dear bank, " * 30 + row["messages"][0]["content"]) if dice.random() < 0.5 else row,
    ),
    "another product in what is said": (
        "words",
        lambda row, dice: (
            said(row, " ".join("crypto wallet" for _ in row["messages"][0]["content"].split()))
            if dice.random() < 0.4
            else row
        ),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_change_that_was_planted_in_real_rows_is_found_where_it_is(
    requests: pa.Table, tmp_path: Path, name: str
) -> None:
    part, change = PLANTED[name]
    dice = random.Random(1)
    order = np.random.default_rng(1).permutation(len(requests))
    new = changed(requests.take(order[:3000]), lambda row: change(row, dice))
    verdict = drift(of(new, tmp_path), of(requests.take(order[3000:8000]), tmp_path))
    assert not verdict.passed
    assert any(reason.startswith(f"{part}: changed") for reason in verdict.reasons), verdict.reasons
