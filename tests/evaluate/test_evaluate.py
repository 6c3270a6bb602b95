import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from regraft.artifacts import verify_dir
from regraft.errors import DamagedArtifact, DataError, MissingInput, ParamsError, PinMismatch
from regraft.evaluate.answers import read_answers
from regraft.evaluate.evaluate import evaluate, score
from regraft.evaluate.params import EvaluateParams
from regraft.evaluate.report import EvaluateReport
from regraft.model.params import Quantization

PARAMS = EvaluateParams(max_new_tokens=8, json_answers=True, threads=1)
PLAIN = Quantization(bits=16)
Run = Callable[..., EvaluateReport]


@pytest.fixture
def run(place: Any) -> Run:
    def do(
        out: Path, params: EvaluateParams = PARAMS, quantization: Quantization = PLAIN, **changes: Any
    ) -> EvaluateReport:
        inputs = {"base": place.base, "dataset": place.dataset, "adapters": {"challenger": place.adapter}, **changes}
        return evaluate(params, quantization, out=out, **inputs)

    return do


def test_base_and_challenger_are_scored_on_every_row_and_nothing_else_is_written(run: Run, tmp_path: Path) -> None:
    report = run(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "answers-base.parquet",
        "answers-challenger.parquet",
        "manifest.json",
        "report.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    verify_dir(tmp_path / "out")
    assert report == EvaluateReport.load(tmp_path / "out/report.json")
    assert list(report.scores) == ["base", "challenger"]
    assert list(report.adapters) == ["challenger"]
    base = read_answers(tmp_path / "out/answers-base.parquet")
    challenger = read_answers(tmp_path / "out/answers-challenger.parquet")
    assert [row.row_id for row in base] == [row.row_id for row in challenger] == sorted(row.row_id for row in base)
    assert all(a.loss != b.loss for a, b in zip(base, challenger, strict=True))
    assert {value: each.rows for value, each in report.scores["base"].slices["length"].items()} == {
        "long": 3,
        "short": 3,
    }


def test_the_same_inputs_give_the_same_bytes(run: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(tmp_path / name, quantization=Quantization())
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()


def test_batches_change_neither_answers_nor_losses(run: Run, tmp_path: Path) -> None:
    alone = PARAMS.model_copy(update={"batch_size": 1})
    narrow = PARAMS.model_copy(update={"batch_tokens": 120})
    for name, params in (("together", PARAMS), ("alone", alone), ("narrow", narrow)):
        run(tmp_path / name, params)
    for name in ("answers-base.parquet", "answers-challenger.parquet"):
        together = read_answers(tmp_path / "together" / name)
        for other in ("alone", "narrow"):
            found = read_answers(tmp_path / other / name)
            assert [row.generated for row in found] == [row.generated for row in together]
            assert [row.loss for row in found] == pytest.approx([row.loss for row in together], rel=1e-5)


def test_losses_are_those_of_the_plain_model_on_each_row_alone(run: Run, place: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from regraft.evaluate.holdout import read_holdout
    from regraft.model.load import open_base

    run(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(open_base(place.base).folder)
    expected = []
    for row in read_holdout(place.dataset).rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss
        expected.append((pytest.approx(float(loss) * int((labels >= 0).sum()), rel=1e-5), int((labels >= 0).sum())))
    assert [(row.loss, row.tokens) for row in read_answers(tmp_path / "out/answers-base.parquet")] == expected


def test_an_answer_is_exact_where_the_model_says_what_was_expected(
    run: Run, holdout_of: Callable[[Path, Sequence[str]], Path], place: Any, tmp_path: Path
) -> None:
    from regraft.evaluate.holdout import read_holdout

    run(tmp_path / "first")
    said = {row.row_id: row.generated for row in read_answers(tmp_path / "first/answers-base.parquet")}
    order = [f"{(index * 7) % 11:032x}" for index in range(6)]
    dataset = holdout_of(tmp_path / "dataset", [said[row_id] for row_id in order[:5]] + ["something else"])
    report = run(tmp_path / "second", dataset=dataset)
    assert report.scores["base"].overall.exact_match == pytest.approx(5 / 6)
    assert report.scores["challenger"].overall.exact_match < 5 / 6
    assert report.holdout_digest == read_holdout(dataset).digest != read_holdout(place.dataset).digest


def test_the_settings_for_generation_that_a_model_brings_change_nothing(
    run: Run, tiny_base: Path, place: Any, tmp_path: Path
) -> None:
    import shutil

    from regraft.model.params import ModelParams
    from regraft.model.pin import pin

    shutil.copytree(tiny_base, tmp_path / "weights")
    settings = json.loads((tmp_path / "weights/generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "min_new_tokens": 8, "max_length": 9}
    (tmp_path / "weights/generation_config.json").write_text(json.dumps(settings))
    pin(ModelParams(base=str(tmp_path / "weights")), corpus=tmp_path / "none", out=tmp_path / "model")
    run(tmp_path / "plain")
    run(tmp_path / "other", base=tmp_path / "model")
    plain, other = (read_answers(tmp_path / name / "answers-base.parquet") for name in ("plain", "other"))
    assert [row.generated for row in other] == [row.generated for row in plain]


def test_an_answer_ends_at_the_first_stop_token_which_is_not_part_of_it(place: Any) -> None:
    import torch

    from regraft.evaluate.score import generate

    class Fake:
        device = torch.device("cpu")
        generation_config = None

        def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            assert attention_mask.sum(dim=1).tolist() == [3, 1]
            assert attention_mask[1].tolist() == [0, 0, 1]
            new = torch.tensor([[11, 2, 2, 2], [12, 13, 14, 15]])
            return torch.cat([input_ids, new], dim=1)

    params = EvaluateParams(max_new_tokens=4)
    assert generate(Fake(), [[9], [5, 6, 7]], frozenset({2}), params, "fake") == [[12, 13, 14, 15], [11, 2]]


def test_one_adapter_alone_gets_the_score_that_it_has_beside_the_base(run: Run, place: Any, tmp_path: Path) -> None:
    beside = run(tmp_path / "beside")
    alone = score(PARAMS, PLAIN, base=place.base, dataset=place.dataset, adapter=place.adapter, out=tmp_path / "alone")
    assert alone.scores == {"adapter": beside.scores["challenger"]}
    assert read_answers(tmp_path / "alone/answers-adapter.parquet") == read_answers(
        tmp_path / "beside/answers-challenger.parquet"
    )


def test_an_adapter_leaves_nothing_behind_for_the_next_one(
    run: Run, adapter_of: Callable[..., Path], place: Any, tmp_path: Path
) -> None:
    other = adapter_of(tmp_path / "other", seed=2)
    both = run(tmp_path / "both", adapters={"first": other, "challenger": place.adapter}, quantization=Quantization())
    alone = run(tmp_path / "alone", quantization=Quantization())
    assert both.scores["challenger"] == alone.scores["challenger"]
    assert both.scores["first"] != alone.scores["challenger"]


def test_a_limit_takes_the_rows_with_the_lowest_ids(run: Run, tmp_path: Path) -> None:
    report = run(tmp_path / "out", PARAMS.model_copy(update={"max_rows": 2}))
    assert (report.rows, report.held_out) == (2, 6)
    assert [row.row_id for row in read_answers(tmp_path / "out/answers-base.parquet")] == [f"{n:032x}" for n in (0, 2)]


def test_expected_answers_that_cannot_be_given_within_the_limit_are_counted(run: Run, tmp_path: Path) -> None:
    assert run(tmp_path / "out").answers_too_long == 2
    assert run(tmp_path / "out", PARAMS.model_copy(update={"max_new_tokens": 64})).answers_too_long == 0


def test_a_slice_that_no_row_has_is_a_mistake_in_the_parameters(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="no held-out row has lenght; the rows have length"):
        run(tmp_path / "out", PARAMS.model_copy(update={"slices": ["lenght"]}))
    assert not (tmp_path / "out").exists()


def test_an_adapter_cannot_take_the_name_of_the_base(run: Run, place: Any, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="cannot be named `base`"):
        run(tmp_path / "out", adapters={"base": place.adapter})


def test_a_holdout_made_with_another_tokenizer_is_refused_with_both_digests(
    place: Any, run: Run, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(place.dataset, tmp_path / "dataset")
    (tmp_path / "dataset/report.json").write_text('{"tokenizer_digest": "other"}')
    with pytest.raises(PinMismatch, match=r"tokenizer other, the base has [0-9a-f]{64}"):
        run(tmp_path / "out", dataset=tmp_path / "dataset")


def test_a_byte_altered_in_the_holdout_is_found_before_anything_is_scored(place: Any, run: Run, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(place.dataset, tmp_path / "dataset")
    path = tmp_path / "dataset/holdout-00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedArtifact, match=r"holdout-00000.arrow is damaged"):
        run(tmp_path / "out", dataset=tmp_path / "dataset")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_missing_or_pickled_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(MissingInput):
        run(tmp_path / "out", adapters={"challenger": tmp_path / "nowhere"})
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(DamagedArtifact, match=r"adapter_model\.bin"):
        run(tmp_path / "out", adapters={"challenger": tmp_path / "pickled"})


def test_an_empty_holdout_proves_nothing(place: Any, tmp_path: Path) -> None:
    import pyarrow as pa

    from regraft.artifacts import commit_dir
    from regraft.evaluate.holdout import read_holdout

    with pa.ipc.open_stream(place.dataset / "holdout-00000.arrow") as reader:
        table = reader.read_all()
    with commit_dir(tmp_path / "dataset") as folder, pa.ipc.new_stream(folder / "holdout-00000.arrow", table.schema):
        pass
    with pytest.raises(DataError, match="the holdout is empty"):
        read_holdout(tmp_path / "dataset")
