"""Preferences through the stages and their gates: raw rows to an adapter that ranks held-out answers right."""

import json
from pathlib import Path
from typing import Any

import pytest

from regraft.evaluate.evaluate import evaluate
from regraft.evaluate.params import EvaluateParams
from regraft.gates.params import SupervisionGate, TrainingGate
from regraft.gates.supervision import judge_supervision
from regraft.gates.training import judge_training
from regraft.model.params import ModelParams, Quantization
from regraft.model.pin import pin
from regraft.preprocess.params import HoldoutParams, PreprocessParams
from regraft.preprocess.preprocess import preprocess
from regraft.preprocess.report import PreprocessReport
from regraft.train.params import TrainParams
from regraft.train.report import TrainReport
from regraft.validate.params import DataParams, ValidateParams
from regraft.validate.validate import validate

MODEL = ModelParams(quantization=Quantization(bits=4))
TRAIN = TrainParams(
    max_steps=16, batch_size=8, rank=8, alpha=16, learning_rate=1e-2, warmup=0.1, logging_every=4, checkpoint_every=50,
    threads=1,
)  # fmt: skip


def rows(form: str) -> list[dict[str, Any]]:
    made = []
    for i in range(120):
        item = ("lamp", "sofa", "desk", "chair")[i % 4]
        prompt = f"where is my {item} {i}"
        right = json.dumps({"action": "track_order", "item": item})
        wrong = json.dumps({"action": "cancel_order", "item": item})
        if form == "pairs":
            made.append({"prompt": prompt, "chosen": right, "rejected": wrong, "item": item})
        else:
            made.append({"prompt": prompt, "completion": wrong if i % 3 else right, "label": not i % 3, "item": item})
    return made


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job") / "model"
    pin(ModelParams(base=str(tiny_base)), corpus=folder, out=folder)
    return folder


@pytest.fixture(scope="module")
def prepared(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for form in ("pairs", "singles"):
        root = tmp_path_factory.mktemp(form)
        (root / "data/raw").mkdir(parents=True)
        (root / "data/raw/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(form)))
        validate(
            ValidateParams(), DataParams(layout="auto", slices={"item": "{item}"}), raw_root=root, out=root / "validate",
            docs=root / "docs",
        )  # fmt: skip
        params = PreprocessParams(max_length=128, holdout=HoldoutParams(share=0.2))
        preprocess(params, base=base, rows=root / "validate", out=root / "preprocess")
        folders[form] = root / "preprocess"
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "form"),
    [("dpo", "pairs"), ("orpo", "pairs"), ("kto", "pairs"), ("kto", "singles"), ("supervised", "pairs")],
)
def test_an_adapter_ranks_held_out_answers_right_and_passes_its_gates(
    objective: str, form: str, base: Path, prepared: dict[str, Path], tmp_path: Path
) -> None:
    from regraft.train.trainer import train

    dataset = prepared[form]
    report = train(
        TRAIN.model_copy(update={"objective": objective}), MODEL, base=base, dataset=dataset, out=tmp_path / "train",
        checkpoints=tmp_path / "checkpoints",
    )  # fmt: skip
    scores = evaluate(
        EvaluateParams(max_new_tokens=4, threads=1), MODEL.quantization, base=base, dataset=dataset,
        adapters={"challenger": tmp_path / "train/adapter"}, out=tmp_path / "evaluate",
    )  # fmt: skip

    assert scores.preferences is not None
    found = scores.preferences["challenger"].overall
    accuracy = found.reward_accuracy if form == "pairs" else found.single_accuracy
    margin = found.reward_margin if form == "pairs" else found.single_margin
    assert accuracy is not None
    assert margin is not None
    if objective != "supervised":  # which makes both answers likelier
        assert accuracy > 0.9
        assert margin > 1.0
    assert set(scores.preferences["challenger"].slices["item"]) <= {"lamp", "sofa", "desk", "chair"}
    loss = scores.scores["challenger"].overall.loss
    assert loss is not None

    data = PreprocessReport.load(dataset / "report.json")
    assert report.dataset_digest == data.train_digest
    assert scores.holdout_digest == data.holdout_digest
    own = {"tokenizer": data.tokenizer_digest, "data": data.train_digest, "holdout": data.holdout_digest}
    supervision = judge_supervision(SupervisionGate(min_rows=30), data, expected=own)
    assert supervision.passed, supervision
    assert {"learning_to_stop", "other_learning_to_stop"} <= {check.name for check in supervision.checks}
    lines = [json.loads(line) for line in (tmp_path / "train/metrics.jsonl").read_text().splitlines()]
    trained = judge_training(
        TrainingGate(min_loss_drop=0.05), TrainReport.load(tmp_path / "train/report.json"), lines,
        adapter=report.adapter_digest, expected={"data": data.train_digest, "adapter": report.adapter_digest},
    )  # fmt: skip
    assert trained.passed, trained
    assert any(check.name == "reward_margin" for check in trained.checks) == (objective != "supervised")
