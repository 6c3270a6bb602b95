"""Held-out preferences: rewards against the base, in float64 and one answer at a time, and what is said of them."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from regraft.artifacts import commit_dir
from regraft.evaluate.evaluate import evaluate, score
from regraft.evaluate.holdout import holdout_digest
from regraft.evaluate.params import EvaluateParams
from regraft.evaluate.preferences import HeldOutPair, Likelihood, read_pairs, summarise_pairs
from regraft.evaluate.report import EvaluateReport
from regraft.model.params import Quantization

PARAMS = EvaluateParams(max_new_tokens=4, threads=1, batch_size=3)
PLAIN = Quantization(bits=32)


@pytest.fixture(scope="module")
def data(place: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The holdout with five pairs, two wanted and two unwanted single answers."""
    import pyarrow as pa

    from regraft.preprocess.files import pair_schema

    chance = random.Random(5)

    def some(least: int) -> list[int]:
        return [chance.randrange(3, 380) for _ in range(chance.randrange(least, 9))]

    rows = [
        {
            "row_id": f"{i:032x}",
            "slices": [("length", "short" if i % 2 else "long")],
            "prompt_ids": some(3),
            "chosen_ids": [] if i in (7, 8) else some(1),
            "rejected_ids": [] if i in (5, 6) else some(1),
        }
        for i in range(9)
    ]
    folder = tmp_path_factory.mktemp("preferences") / "preprocess"
    with commit_dir(folder) as out:
        for name in ("holdout-00000.arrow", "report.json"):
            (out / name).write_bytes((place.dataset / name).read_bytes())
        with pa.ipc.new_stream(out / "holdout_pairs-00000.arrow", pair_schema(held=True)) as stream:
            stream.write_table(pa.Table.from_pylist(rows, pair_schema(held=True)))
    return folder


def reference(base: Path, pairs: list[HeldOutPair], adapter: Path | None) -> list[dict[str, float]]:
    import torch

    from regraft.model.adapter import load_adapter
    from regraft.model.load import load_model, open_base

    model: Any = load_model(open_base(base), PLAIN, training=False).double()
    if adapter is not None:
        model = load_adapter(model, adapter).double()
    found = []
    for pair in pairs:
        each = {}
        for name in ("chosen", "rejected"):
            answer: list[int] = getattr(pair, f"{name}_ids")
            with torch.no_grad():
                chances = model(input_ids=torch.tensor([pair.prompt_ids + answer])).logits[0].log_softmax(-1)
            each[name] = math.fsum(
                float(chances[len(pair.prompt_ids) - 1 + i, token]) for i, token in enumerate(answer)
            )
        found.append(each)
    return found


def test_rewards_are_the_adapters_likelihoods_over_the_bases(place: Any, data: Path, tmp_path: Path) -> None:
    report = evaluate(
        PARAMS, PLAIN, base=place.base, dataset=data, adapters={"challenger": place.adapter}, out=tmp_path / "out"
    )
    pairs = read_pairs(data)
    base, own = reference(place.base, pairs, None), reference(place.base, pairs, place.adapter)
    chosen, rejected = ([b[n] - a[n] for a, b in zip(base, own, strict=True)] for n in ("chosen", "rejected"))

    assert report.preferences is not None
    found = report.preferences["challenger"].overall
    assert (found.rows, found.pairs) == (9, 5)
    margins = [chosen[i] - rejected[i] for i in range(5)]
    assert found.reward_margin == pytest.approx(math.fsum(margins) / 5, abs=1e-4)
    assert found.reward_accuracy == sum(margin > 0 for margin in margins) / 5
    assert found.single_margin == pytest.approx(sum(chosen[5:7]) / 2 - sum(rejected[7:]) / 2, abs=1e-4)
    above = sum(w > u for w in chosen[5:7] for u in rejected[7:])
    assert found.single_accuracy == above / 4
    likelier = [
        own[i]["chosen"] / len(pairs[i].chosen_ids) > own[i]["rejected"] / len(pairs[i].rejected_ids) for i in range(5)
    ]
    assert found.likelihood_accuracy == sum(likelier) / 5
    alone = report.preferences["base"].overall
    assert (alone.reward_accuracy, alone.reward_margin, alone.single_accuracy, alone.single_margin) == (None,) * 4
    assert alone.likelihood_accuracy is not None
    assert {v: s.rows for v, s in report.preferences["challenger"].slices["length"].items()} == {"long": 5, "short": 4}
    assert EvaluateReport.load(tmp_path / "out/report.json") == report


def test_an_adapter_alone_is_measured_against_the_same_base(place: Any, data: Path, tmp_path: Path) -> None:
    both = evaluate(
        PARAMS, PLAIN, base=place.base, dataset=data, adapters={"challenger": place.adapter}, out=tmp_path / "out"
    )
    alone = score(PARAMS, PLAIN, base=place.base, dataset=data, adapter=place.adapter, out=tmp_path / "alone")

    assert both.preferences is not None
    assert alone.preferences == {"adapter": both.preferences["challenger"]}
    assert alone.holdout_digest == both.holdout_digest == holdout_digest(data) != holdout_digest(place.dataset)


def test_a_holdout_of_conversations_reports_no_preferences(place: Any, tmp_path: Path) -> None:
    report = evaluate(PARAMS, PLAIN, base=place.base, dataset=place.dataset, adapters={}, out=tmp_path / "out")

    assert report.preferences is None
    assert "preferences" not in json.loads((tmp_path / "out/report.json").read_text())


@pytest.mark.parametrize(
    ("own", "accuracy", "margin"),
    [([(-1.0, 1), (-2.0, 1)], 1.0, 2.0), ([(-3.0, 1), (-1.0, 1)], 0.0, -1.0), ([(math.nan, 1), (-1.0, 1)], 0.0, None)],
)
def test_a_value_that_is_not_finite_counts_as_wrong(own: Any, accuracy: float, margin: float | None) -> None:
    pair = HeldOutPair("a", {}, [1], [2], [3])
    found = summarise_pairs([pair], [Likelihood(*own)], [Likelihood((-2.0, 1), (-1.0, 1))], []).overall

    assert (found.reward_accuracy, found.reward_margin) == (accuracy, margin)


def test_a_stored_score_keeps_its_preferences(
    place: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft.evaluate.store import keep
    from regraft.layout import Layout

    report = evaluate(
        PARAMS, PLAIN, base=place.base, dataset=data, adapters={"challenger": place.adapter}, out=tmp_path / "out"
    )
    stored = keep(Layout(tmp_path), tmp_path / "out", "challenger")

    assert report.preferences is not None
    assert EvaluateReport.load(stored.report).preferences == {"adapter": report.preferences["challenger"]}
