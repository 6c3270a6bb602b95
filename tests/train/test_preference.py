"""Training on preferences: the papers' losses in float64, what is learned, and the engine's promises for each objective."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regraft import failpoints
from regraft.errors import DataError, ParamsError, Preempted, RegraftError, TrainingDiverged
from regraft.model.params import ModelParams, Quantization
from regraft.train.params import PreferenceParams, TrainParams
from regraft.train.report import TrainReport

OBJECTIVES = ("dpo", "orpo", "kto")
STEPS = TrainParams(
    objective="dpo", max_steps=6, batch_size=4, accumulation=2, rank=4, alpha=8, learning_rate=2e-2, warmup=0.0,
    checkpoint_every=2, logging_every=2, threads=1,
)  # fmt: skip
Rows = list[dict[str, list[int]]]
Train = Callable[..., tuple[Path, TrainReport]]
Write = Callable[[Path, Rows], Path]


@pytest.fixture(scope="module")
def rows(make_preferences: Callable[[int], Rows]) -> Rows:
    return make_preferences(24)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, rows: Rows, write_preferences: Write) -> Path:
    return write_preferences(tmp_path_factory.mktemp("pairs") / "preprocess", rows)


@pytest.fixture
def train(pinned: Path, pairs: Path, tmp_path: Path) -> Train:
    def _train(name: str = "out", data: Path = pairs, bits: int = 32, **changes: Any) -> tuple[Path, TrainReport]:
        from regraft.train.trainer import train

        report = train(
            TrainParams.model_validate(STEPS.model_dump() | changes),
            ModelParams(quantization=Quantization(bits=bits)),
            base=pinned,
            dataset=data,
            out=tmp_path / name,
            checkpoints=tmp_path / f"{changes.get('objective', 'dpo')}-checkpoints",
        )
        return tmp_path / name, report

    return _train


def log_likelihoods(base: Path, rows: Rows, adapter: Path | None = None) -> list[dict[str, list[float]]]:
    """Of each answer token of each row, in float64, one row at a time and without padding."""
    import torch

    from regraft.model.adapter import load_adapter
    from regraft.model.load import load_model, open_base

    model: Any = load_model(open_base(base), Quantization(bits=32), training=False).double()
    if adapter is not None:
        model = load_adapter(model, adapter).double()
    found = []
    for row in rows:
        each = {}
        for column in ("chosen_ids", "rejected_ids"):
            prompt, answer = row["prompt_ids"], row[column]
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                chances = model(input_ids=ids).logits[0].log_softmax(-1)
            each[column] = [float(chances[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
        found.append(each)
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(tokens: list[float]) -> float:
    mean = math.fsum(tokens) / len(tokens)
    return mean - math.log1p(-math.exp(mean))


def papers_loss(
    objective: str, beta: float, policy: Any, reference: Any, weights: tuple[float, float], kl: float
) -> float:
    """The mean loss of all rows by the papers' formulas."""
    losses = []
    for own, its in zip(policy, reference, strict=True):
        chosen, rejected = (math.fsum(own[c]) - math.fsum(its[c]) for c in ("chosen_ids", "rejected_ids"))
        if objective == "dpo":  # arXiv:2305.18290, equation 7
            losses.append(-math.log(sigmoid(beta * (chosen - rejected))))
        elif objective == "orpo":  # arXiv:2403.07691, equations 6 and 7
            likelihood = -math.fsum(own["chosen_ids"]) / len(own["chosen_ids"])
            odds = log_odds(own["chosen_ids"]) - log_odds(own["rejected_ids"])
            losses.append(likelihood - beta * math.log(sigmoid(odds)))
        else:  # arXiv:2402.01306, equation 8: lambda - v
            losses.append(weights[0] * (1 - sigmoid(beta * (chosen - kl))))
            losses.append(weights[1] * (1 - sigmoid(beta * (kl - rejected))))
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_first_loss_is_the_papers_in_float64(objective: str, train: Train, pinned: Path, rows: Rows) -> None:
    weights = (1.0, 2.0) if objective == "kto" else (1.0, 1.0)
    own = {"beta": 0.3, "desirable_weight": weights[0], "undesirable_weight": weights[1]}

    _, report = train(objective=objective, preference=own, max_steps=1, batch_size=24, accumulation=1)

    base = log_likelihoods(pinned, rows)
    # The adapter does nothing yet, so each reward and the KL are 0.
    assert report.loss_first == pytest.approx(papers_loss(objective, 0.3, base, base, weights, 0.0), rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_later_loss_is_the_papers_for_the_adapter_of_then(
    objective: str, train: Train, pinned: Path, rows: Rows
) -> None:
    own = {
        "objective": objective,
        "preference": {"beta": 0.3},
        "batch_size": 24,
        "accumulation": 1,
        "scheduler": "constant",
    }
    first, _ = train("first", **own, max_steps=3)
    _, report = train("second", **own, max_steps=4)

    base, policy = log_likelihoods(pinned, rows), log_likelihoods(pinned, rows, first / "adapter")
    kl = 0.0
    if objective == "kto":  # each prompt with the answer before it, in the order of the batch
        from regraft.train.preference import collate_singles

        order = _order(rows, 4)
        singles = [(row["prompt_ids"], row[c]) for c in ("chosen_ids", "rejected_ids") for row in order]
        borrowed: Rows = [
            {"prompt_ids": prompt, "chosen_ids": singles[i - 1][1], "rejected_ids": [3]}
            for i, (prompt, _) in enumerate(singles)
        ]
        batch = collate_singles(order, 0)
        assert [ids for ids in batch["KL_input_ids"][1].tolist() if ids] == [*singles[1][0], *singles[0][1]]
        its = log_likelihoods(pinned, borrowed), log_likelihoods(pinned, borrowed, first / "adapter")
        gains = [math.fsum(b["chosen_ids"]) - math.fsum(a["chosen_ids"]) for a, b in zip(*its, strict=True)]
        kl = max(0.0, math.fsum(gains) / len(gains))
    assert report.loss_last == pytest.approx(papers_loss(objective, 0.3, policy, base, (1.0, 1.0), kl), rel=2e-4)
    assert abs(report.loss_last - report.loss_first) > 0.05


def margins(report: TrainReport) -> tuple[float, float]:
    """Of the first and of the last tenth of the steps, both measured."""
    result = report.preference
    assert result is not None
    assert result.margin_first is not None
    assert result.margin_last is not None
    return result.margin_first, result.margin_last


def _order(rows: Rows, step: int) -> Rows:
    """The rows in the order in which the seeded sampler gives them at a step of one batch."""
    import torch
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(rows, generator=torch.Generator(), data_seed=STEPS.seed)
    sampler.set_epoch(step - 1)
    return [rows[i] for i in sampler]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_lowers_its_loss_and_prefers_what_was_preferred(objective: str, train: Train) -> None:
    out, report = train(objective=objective, max_steps=12)

    result = report.preference
    assert result is not None
    assert report.steps == 12
    assert report.loss_last < 0.9 * report.loss_first
    assert report.loss_decreased
    first, last = margins(report)
    assert last > first + 0.05
    assert result.reference == (None if objective == "orpo" else "base")
    if objective == "kto":
        assert (result.accuracy_first, result.accuracy_last) == (None, None)
    else:
        assert result.accuracy_last is not None
        assert result.accuracy_first is not None
        assert result.accuracy_last > 0.9 > result.accuracy_first
    assert TrainReport.load(out / "report.json") == report
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all("reward_margin" in line for line in lines)
    assert all(("reward_accuracy" in line) == (objective != "kto") for line in lines)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_saved_adapter_is_the_trained_one_alone(
    objective: str, train: Train, pinned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from regraft.model.adapter import load_adapter
    from regraft.model.load import load_model, open_base
    from regraft.train.adapt import Trainee

    said: list[Any] = []
    save, ids = Trainee.save, torch.arange(3, 40).repeat(2, 1)

    def spy(self: Trainee, *args: Any, **kwargs: Any) -> str:
        assert list(self.model.peft_config) == ["default"]
        self.model.eval()
        with torch.no_grad():
            said.append(self.model(input_ids=ids).logits)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Trainee, "save", spy)
    out, _ = train(objective=objective)

    model = load_adapter(load_model(open_base(pinned), Quantization(bits=32), training=False), out / "adapter")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, said[0])


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_that_was_broken_off_twice_gives_the_same_bytes(
    objective: str, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, _ = train("undisturbed", objective=objective)
    whole = content(out)
    (tmp_path / f"{objective}-checkpoints").rename(tmp_path / "kept")

    for at in (3, 2):  # a checkpoint is at every second step: the second one is step 4 of the whole
        failpoints._passages.clear()
        monkeypatch.setenv("REGRAFT_FAILPOINT", f"train.step@{at}=EIO")
        with pytest.raises(OSError, match="Input/output"):
            train("broken", objective=objective)
    monkeypatch.delenv("REGRAFT_FAILPOINT")
    failpoints._passages.clear()
    out, _ = train("resumed", objective=objective)

    assert content(out) == whole


def test_a_signal_writes_a_checkpoint_and_the_run_goes_on_to_the_same_bytes(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, _ = train("undisturbed", objective="kto")
    whole = content(out)
    (tmp_path / "kto-checkpoints").rename(tmp_path / "kept")
    failpoints._passages.clear()
    monkeypatch.setenv("REGRAFT_FAILPOINT", "train.step@1=TERM")
    with pytest.raises(Preempted, match="SIGTERM after step 1 of 6"):
        train("stopped", objective="kto")
    monkeypatch.delenv("REGRAFT_FAILPOINT")

    assert content(train("resumed", objective="kto")[0]) == whole


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_accumulation_of_uneven_batches_gives_every_example_the_same_weight(
    objective: str, train: Train, tmp_path: Path
) -> None:
    own = {"objective": objective, "max_steps": 3, "scheduler": "constant"}

    _, one = train("one", batch_size=24, accumulation=1, **own)
    _, more = train("more", batch_size=7, accumulation=4, **own)  # 7 + 7 + 7 + 3

    assert more.loss_last == pytest.approx(one.loss_last, rel=1e-4)
    assert margins(more)[1] == pytest.approx(margins(one)[1], rel=1e-3)


def test_on_a_4_bit_base_the_adapter_is_trained_in_full_precision(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from regraft.train.preference import PreferenceTrainer

    seen = []
    real = PreferenceTrainer.get_batch_samples

    def look(self: PreferenceTrainer, *args: Any) -> Any:
        trained = [p for p in self.trainee.model.parameters() if p.requires_grad]
        assert {id(p) for p in trained} == {id(p) for p in self.trainee.parameters.values()}
        seen.append({p.dtype for p in trained})
        seen.append(any(bool((p != p.bfloat16().float()).any()) for p in trained))
        return real(self, *args)

    monkeypatch.setattr(PreferenceTrainer, "get_batch_samples", look)
    _, report = train(bits=4, max_steps=1)

    assert seen == [{torch.float32}, True]
    assert report.loss_first == pytest.approx(math.log(2), rel=1e-6)


def test_with_a_parent_the_reference_is_the_parent_also_after_a_resume(
    train: Train, pinned: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from regraft.train.adapt import Trainee

    save = Trainee.save

    def spy(self: Trainee, *args: Any, **kwargs: Any) -> str:
        assert list(self.model.peft_config) == ["default"]
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Trainee, "save", spy)
    parent, first = train("parent", objective="orpo")
    own = {"parent": str(parent / "adapter"), "parent_digest": first.adapter_digest, "preference": {"beta": 0.3}}
    own |= {"batch_size": 24, "accumulation": 1, "scheduler": "constant"}
    out, report = train("undisturbed", **own, max_steps=5)
    (tmp_path / "dpo-checkpoints").rename(tmp_path / "kept")
    monkeypatch.setenv("REGRAFT_FAILPOINT", "train.step@4=EIO")
    failpoints._passages.clear()
    with pytest.raises(OSError, match="Input/output"):
        train("broken", **own, max_steps=5)
    monkeypatch.delenv("REGRAFT_FAILPOINT")
    failpoints._passages.clear()

    assert content(train("resumed", **own, max_steps=5)[0]) == content(out)
    assert report.loss_first == pytest.approx(math.log(2), rel=1e-6)
    assert report.preference is not None
    assert report.preference.reference == first.adapter_digest
    fourth, _ = train("fourth", **own, max_steps=4)
    its = log_likelihoods(pinned, rows, parent / "adapter")
    policy = log_likelihoods(pinned, rows, fourth / "adapter")
    assert report.loss_last == pytest.approx(papers_loss("dpo", 0.3, policy, its, (1, 1), 0), rel=2e-4)


@pytest.mark.parametrize(
    "kind", [{"dora": True}, {"trainable_tokens": ["<|endoftext|>"]}, {"modules_to_save": ["norm"]}]
)
def test_whatever_is_trained_is_off_in_the_reference(
    kind: dict[str, Any], train: Train, pinned: Path, rows: Rows
) -> None:
    own = {**kind, "preference": {"beta": 0.3}, "batch_size": 24, "accumulation": 1, "scheduler": "constant"}
    if "trainable_tokens" in kind:  # with tied embeddings the output layer would be trained
        with pytest.raises(ParamsError, match="output layer"):
            train(**own, max_steps=1)
        return
    third, _ = train("third", **own, max_steps=3)
    _, fourth = train("fourth", **own, max_steps=4)

    base, policy = log_likelihoods(pinned, rows), log_likelihoods(pinned, rows, third / "adapter")
    assert fourth.loss_last == pytest.approx(papers_loss("dpo", 0.3, policy, base, (1, 1), 0), rel=2e-4)


@pytest.mark.parametrize("init", ["pissa", pytest.param("eva", marks=pytest.mark.extended)])
def test_another_start_begins_at_the_reference(init: str, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"init": init, "max_steps": 4, "learning_rate": 1e-3}
    out, report = train("undisturbed", **own)
    assert report.loss_first == pytest.approx(math.log(2), rel=1e-4)
    assert report.preference is not None
    assert report.preference.reference == ("start" if init == "pissa" else "base")

    whole = content(out)
    for folder in out.parent.glob("dpo-checkpoints/*/step-000004"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert content(train("resumed", **own)[0]) == whole


def test_a_loss_that_is_not_finite_stops_at_once(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from regraft.train.preference import PreferenceTrainer

    real = PreferenceTrainer._mean_loss
    monkeypatch.setattr(
        PreferenceTrainer,
        "_mean_loss",
        lambda self, *args: real(self, *args) * (math.nan if self.state.global_step else 1),
    )
    with pytest.raises(TrainingDiverged, match="at step 2 of 6 the loss was nan"):
        train()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_held_out_loss_is_that_of_the_rows_that_are_not_trained_on(
    objective: str, train: Train, pinned: Path, rows: Rows
) -> None:
    out, report = train(objective=objective, validation_share=0.25, validate_every=2, max_steps=6, batch_size=6)

    assert [step for step, _ in report.held_out] == [2, 4, 6]
    assert report.blocks == 18
    if objective != "kto":  # whose KL is an estimate of its own
        held = [rows[(2 * i + 1) * 24 // 12] for i in range(6)]
        base, policy = log_likelihoods(pinned, held), log_likelihoods(pinned, held, out / "adapter")
        expected = papers_loss(objective, 0.1, policy, base, (1, 1), 0)
        assert report.held_out[-1][1] == pytest.approx(expected, rel=1e-4)
        _, best = train("best", objective=objective, validation_share=0.25, validate_every=2, keep="best", batch_size=6)
        assert best.kept_step == min(best.held_out, key=lambda each: each[1])[0]


def test_checkpointed_activations_and_fused_kernels_give_the_same_losses(train: Train) -> None:
    _, plain = train("plain", max_steps=3)
    _, less = train("less", max_steps=3, gradient_checkpointing=True)
    _, fused = train("fused", max_steps=3, kernels="fused")

    assert less.loss_last == pytest.approx(plain.loss_last, rel=1e-6)
    assert fused.loss_last == pytest.approx(plain.loss_last, rel=1e-4)


LOSSES = (
    "hinge",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "sigmoid_norm",
)


@pytest.mark.parametrize("loss", ["ipo", *(pytest.param(each, marks=pytest.mark.extended) for each in LOSSES)])
def test_other_losses_of_dpo_train(loss: str, train: Train) -> None:
    smoothing = 0.1 if loss in ("robust", "exo_pair") else 0.0
    _, report = train(preference={"loss": loss, "label_smoothing": smoothing}, max_steps=8)

    assert report.preference is not None
    assert report.preference.loss == loss
    first, last = margins(report)
    assert last > first


def test_answers_with_labels_train_kto_and_nothing_else(
    train: Train, rows: Rows, tmp_path: Path, write_preferences: Write
) -> None:
    singles = [{**row, ("rejected_ids" if i % 2 else "chosen_ids"): []} for i, row in enumerate(rows)]
    data = write_preferences(tmp_path / "singles", singles)

    _, report = train(objective="kto", data=data, max_steps=12)

    first, last = margins(report)
    assert last > first + 0.05
    with pytest.raises(DataError, match="24 of 24 rows have one only"):
        train(objective="dpo", data=data)
    alike = write_preferences(tmp_path / "alike", [{**row, "rejected_ids": []} for row in rows])
    with pytest.raises(DataError, match="nothing to prefer"):
        train(objective="kto", data=alike)


@pytest.mark.parametrize("kinds", list(itertools.product(("pair", "wanted", "unwanted"), repeat=3)))
def test_every_prompt_borrows_an_answer_of_another_row(kinds: tuple[str, ...]) -> None:
    from regraft.train.preference import collate_singles

    for some in (kinds, kinds[:2]):
        batch = collate_singles(
            [
                {
                    "prompt_ids": [10 * (i + 1)],
                    "chosen_ids": [] if kind == "unwanted" else [10 * (i + 1) + 1],
                    "rejected_ids": [] if kind == "wanted" else [10 * (i + 1) + 2],
                }
                for i, kind in enumerate(some)
            ],
            0,
        )

        answers = sum(2 if kind == "pair" else 1 for kind in some)
        assert batch["examples"] == answers == len(batch["KL_input_ids"])
        own, borrowed = batch["input_ids"].tolist(), batch["KL_input_ids"].tolist()
        assert [prompt for prompt, _ in own] == [prompt for prompt, _ in borrowed]
        assert all(prompt // 10 != answer // 10 for prompt, answer in borrowed)


def test_a_batch_of_one_row_has_only_its_own_answers_to_borrow() -> None:
    from regraft.train.preference import collate_singles

    batch = collate_singles([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}], 0)

    assert batch["KL_input_ids"].tolist() == [[1, 3], [1, 2]]


def test_the_margin_of_single_answers_is_that_of_the_batches_with_both_kinds(
    train: Train, rows: Rows, tmp_path: Path, write_preferences: Write
) -> None:
    order: Any = _order(range(len(rows)), 1)  # type: ignore[arg-type]
    unwanted = {order[4], order[23]}  # in the third and the last of 12 batches
    singles = [{**row, ("chosen_ids" if i in unwanted else "rejected_ids"): []} for i, row in enumerate(rows)]
    data = write_preferences(tmp_path / "singles", singles)
    own = {"objective": "kto", "data": data, "max_steps": 12, "batch_size": 2, "accumulation": 1}

    def lines(out: Path) -> list[dict[str, float]]:
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    out, report = train("each", **own, logging_every=1)
    found = {line["step"]: line["reward_margin"] for line in lines(out) if "reward_margin" in line}

    assert list(found) == [3, 12]
    assert found[12] != found[3] != 0
    assert report.preference is not None
    assert (report.preference.margin_first, report.preference.margin_last) == (None, found[12])
    (tmp_path / "kto-checkpoints").rename(tmp_path / "kept")
    (line,) = lines(train("all", **own, logging_every=12)[0])
    assert line["reward_margin"] == pytest.approx((found[3] + found[12]) / 2, rel=1e-9)


def test_data_without_preferences_is_named(train: Train, dataset: Path) -> None:
    with pytest.raises(DataError, match="no preferences") as raised:
        train(data=dataset)
    assert "data.layout to preference" in str(raised.value)


def test_a_missing_library_is_named_before_anything_is_loaded(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RegraftError, match="needs the package trl") as raised:
        train()
    assert ".[preference]" in str(raised.value)


def test_a_trained_output_layer_is_refused_where_the_loss_would_pass_it_by(train: Train) -> None:
    with pytest.raises(ParamsError, match="output layer"):
        train(modules_to_save=["lm_head"])


def test_nothing_is_sent(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import base_trainer

    def sent(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was sent")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", sent)
    train(max_steps=1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dropout": 0.1}, "`dropout: 0`"),
        ({"compile": True}, "`compile: false`"),
        ({"method": "full"}, "`method: lora` for `objective: dpo`"),
        ({"preference": {"loss": "kto"}}, "`preference.loss` of sigmoid"),
        ({"preference": {"label_smoothing": 0.1}}, "`preference.loss` of robust"),
        ({"preference": {"loss": "exo_pair"}}, "above 0 for `exo_pair`"),
        ({"preference": {"desirable_weight": 2.0}}, "`objective: kto`"),
        ({"objective": "kto", "batch_size": 1}, "`batch_size` of at least 2"),
        ({"objective": "supervised", "preference": {"beta": 1.0}}, "dpo, orpo or kto for `preference`"),
    ],
)
def test_settings_that_do_not_go_with_an_objective_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TrainParams.model_validate(STEPS.model_dump() | changes)


def test_the_digest_of_supervised_parameters_does_not_know_of_preferences() -> None:
    from regraft.train.trainer import _sections

    old = _sections(TrainParams(max_steps=1), ModelParams())["train"]
    new = _sections(STEPS, ModelParams())["train"]

    assert {*new} - {*old} == {"objective"}


def test_preferences_keep_the_defaults_of_the_papers() -> None:
    assert PreferenceParams().model_dump() == {
        "beta": 0.1,
        "loss": None,
        "label_smoothing": 0.0,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
    }
