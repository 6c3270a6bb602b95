"""Training on preferences: TRL's losses in Regraft's engine, on Regraft's tokens.

    dpo     -log sigmoid(beta * (r(chosen) - r(rejected))), r = log pi / pi_ref of a whole answer (arXiv:2305.18290, eq. 7)
    orpo    -log p(chosen) + beta * -log sigmoid(log odds(chosen) - log odds(rejected)), p the mean likelihood of a token
            of the answer (arXiv:2403.07691, eq. 6)
    kto     weight * (1 - sigmoid(+-beta * (r - z))), z the KL estimated from answers of other rows (arXiv:2402.01306, eq. 8)

The reference is the base with the adapter switched off; with a parent, and where a start was taken out of the base, it is
a frozen copy of what training began at. What TRL would do besides its loss is not let through: it neither tokenises nor
cuts, casts no adapter to bf16, logs, saves and sends nothing. A step's loss is the mean over all its examples, however
they lie in its batches, so accumulation changes nothing but KTO's estimate.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from regraft.errors import ParamsError
from regraft.train import crew
from regraft.train.adapt import Trainee
from regraft.train.data import moved
from regraft.train.loop import AdapterTrainer, Progress
from regraft.train.params import TrainParams

# It warns at import that ORPO's API may change; its version is locked.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

_REFERENCE = "ref"
"""TRL's name for the frozen copy."""
_MARGINS, _ACCURACIES = "rewards/margins", "rewards/accuracies"
_COUNTED = ("tokens", "answered", "examples")
Row = Mapping[str, Sequence[int]]


def make_trainer(
    trainee: Trainee,
    settings: Mapping[str, Any],
    rows: Any,
    tokenizer: Any,
    *,
    params: TrainParams,
    progress: Progress,
    callbacks: Sequence[Any],
    held_out: Any = None,
) -> "PreferenceTrainer":
    """Return the trainer of an objective; `release` it when it has trained.

    Args:
        trainee: from `make_trainee`, at its start (also where a checkpoint is to be loaded afterwards).
        settings: what `TrainingArguments` takes.
        rows: from `open_pairs`.
        tokenizer: the base's; only its token for padding matters.
        params: how to train.
        progress: where each step is noted.
        callbacks: of the Trainer.
        held_out: rows that measure a held-out loss.

    Raises:
        ParamsError: what is trained is beyond the reach of TRL's output layer.
    """
    _check_output(params, trainee)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    own = params.preference
    common = {**settings, "beta": own.beta, "max_length": None}
    kinds: dict[str, Any] = {"dpo": DpoTrainer, "orpo": OrpoTrainer, "kto": KtoTrainer}
    collators: dict[str, Any] = {"dpo": collate_pairs, "orpo": collate_pairs, "kto": collate_singles}
    arguments: Any
    with _old_names():
        if params.objective == "dpo":
            arguments = DPOConfig(**common, loss_type=[own.loss or "sigmoid"], label_smoothing=own.label_smoothing)
        elif params.objective == "kto":
            weights = {"desirable_weight": own.desirable_weight, "undesirable_weight": own.undesirable_weight}
            arguments = KTOConfig(**common, loss_type=own.loss or "kto", **weights)
        else:
            arguments = ORPOConfig(**{**common, "max_length": 1 << 30})  # never cut: rows are as `preprocess` let them
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer: PreferenceTrainer = kinds[params.objective](
            trainee,
            args=arguments,
            data_collator=partial(collators[params.objective], pad_id=pad),
            train_dataset=_AsItIs(rows) if params.objective == "orpo" else rows,
            processing_class=tokenizer,
            params=params,
            progress=progress,
            held_out=held_out,
            callbacks=list(callbacks),
        )
    trainer.train_dataset = rows
    # TRL pairs KTO's answers when it prepares a data set, so their order must stay; here each batch pairs its own.
    trainer.args.train_sampling_strategy = "random"
    return trainer


@contextmanager
def _old_names() -> Iterator[None]:
    """Be silent about the names by which TRL 1.16 and peft 0.21 ask transformers 5.23 for checkpointing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`(is_)?gradient_checkpointing", category=FutureWarning)
        yield


class PreferenceTrainer(AdapterTrainer):
    """`AdapterTrainer` with the loss of the TRL trainer that follows it in a subclass's bases."""

    metrics = "_metrics"

    def __init__(self, trainee: Trainee, *args: Any, **kwargs: Any) -> None:
        if trainee.start.tensors:
            with torch.no_grad():
                for key, tensor in trainee.start.tensors.items():
                    trainee.parameters[key].copy_(tensor)
        began = {key: parameter.detach().clone() for key, parameter in trainee.parameters.items()}
        super().__init__(trainee, *args, **kwargs)
        for key, parameter in trainee.parameters.items():  # TRL casts them to bf16 on a quantised base
            parameter.data = began[key]
        self._mend_reference(began)
        self._items = 0
        self._sums: dict[str, float] = {}
        self._measured: dict[str, int] = {}
        self._ahead: dict[str, float] = {}

    def _mend_reference(self, began: Mapping[str, torch.Tensor]) -> None:
        """Keep TRL's copy of the adapter only where the base alone is not what training began at."""
        model = self.trainee.model
        if _REFERENCE not in model.peft_config:
            return
        if not self.trainee.start.tensors and self.params.parent is None:
            model.delete_adapter(_REFERENCE)
            return
        from regraft.model.adapter import adapter_parameters

        copies = adapter_parameters(model, _REFERENCE)
        for key, parameter in copies.items():
            parameter.data = began[key].clone()
            parameter.requires_grad_(False)

    def release(self) -> None:
        """Take the reference off the model, so that it can be saved."""
        if _REFERENCE in self.trainee.model.peft_config:
            self.trainee.model.delete_adapter(_REFERENCE)

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], Any]:
        """Take the batches of one step and their number of examples."""
        batches, _ = super().get_batch_samples(*args)
        counted = torch.tensor(
            [float(sum(batch[name] for batch in batches)) for name in ("examples", "answered")],
            dtype=torch.float64,
            device=self.args.device,
        )
        self._items, self._trained = (int(value) for value in crew.summed(counted).tolist())
        self._sums, self._measured = {}, {}
        return batches, self._items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """A batch's share of the step's mean loss for each example."""
        examples = inputs["examples"]
        loss = self._mean_loss(model, inputs)
        for name, value in self._rewards().items():
            self._sums[name] = self._sums.get(name, 0.0) + examples * value
            self._measured[name] = self._measured.get(name, 0) + examples
        self._forget()
        share: float = examples * crew.size() / max(self._items, 1)
        return loss * share

    def _rewards(self) -> dict[str, float]:
        """What TRL measured of the last batch."""
        found = self._metrics["train"]
        return {name: float(found[name][-1]) for name in (_MARGINS, _ACCURACIES) if found[name]}

    def _forget(self) -> None:
        """Drop what TRL keeps for its own logs."""
        for measured in getattr(self, self.metrics).values():
            measured.clear()

    def _mean_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        given = {key: value for key, value in inputs.items() if key not in _COUNTED}
        with _old_names():
            loss: torch.Tensor = super(AdapterTrainer, self).compute_loss(model, given)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        names = (_MARGINS, _ACCURACIES)
        local = [*(self._sums.get(name, 0.0) for name in names), *(float(self._measured.get(n, 0)) for n in names)]
        margin, accuracy, *counts = crew.summed(
            torch.tensor(local, dtype=torch.float64, device=self.args.device)
        ).tolist()
        self.progress.examples.append(self._items)
        self.progress.margins.append(margin / max(counts[0], 1))
        self.progress.compared.append(int(counts[0]))
        if counts[1]:
            self.progress.accuracies.append(accuracy / counts[1])
        return norm

    def measure_held_out(self) -> float:
        """Return the mean loss for each example of the rows that are not trained on."""
        total, examples, size = 0.0, 0, self.params.batch_size
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for first in range(0, len(self.held_out), size):
                batch = self.data_collator(
                    [self.held_out[i] for i in range(first, min(first + size, len(self.held_out)))]
                )
                total += float(self._mean_loss(self.model, moved(batch, self.args.device))) * batch["examples"]
                examples += batch["examples"]
        self._forget()
        self.model.train()
        return total / max(1, examples)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        """The rows are tokens already."""
        return dataset

    def _send_telemetry(self) -> None:
        """TRL sends what is trained on what to its authors; nothing is sent from here."""


class DpoTrainer(PreferenceTrainer, DPOTrainer):  # type: ignore[misc]
    """DPO and its relatives."""


class KtoTrainer(PreferenceTrainer, KTOTrainer):  # type: ignore[misc]
    """KTO; TRL tells its margin only for batches with answers of both kinds, so it is the mean over those alone."""


class OrpoTrainer(PreferenceTrainer, ORPOTrainer):  # type: ignore[misc]
    """ORPO."""

    metrics = "_stored_metrics"

    def _rewards(self) -> dict[str, float]:
        """TRL cuts its own as if every batch of the last step were the last one, which may be shorter."""
        return self._ahead

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
        """TRL's forward pass, with the paper's likelihood: of the answer given its prompt, the mean of its tokens.

        TRL takes it over prompt and answer, so that long prompts outweigh the answers.
        """
        outputs: tuple[Any, ...] = super().concatenated_forward(model, _halves(batch))
        with torch.no_grad():
            ahead = outputs[0] - outputs[1]
            self._ahead = {
                _MARGINS: self.beta * float(ahead.mean()),
                _ACCURACIES: float((ahead > 0).float().mean()),
            }
        return (*outputs[:4], -outputs[0].mean(), *outputs[5:])


class _AsItIs:
    """A data set that stays as it is while TRL's constructor maps it; the rows themselves would be written beside it."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]

    def map(self, *args: Any, **kwargs: Any) -> "_AsItIs":
        """Stay."""
        return self


def collate_pairs(rows: Sequence[Row], pad_id: int) -> dict[str, Any]:
    """Batch pairs: all preferred answers, then all others, each behind its prompt.

    Returns:
        `input_ids`, `attention_mask` and `completion_mask` (the answers' tokens), int64 of (2 x rows, longest); how many
        `tokens` are not padding, how many of them are `answered`, and `examples`, the rows.
    """
    batch: dict[str, Any] = DataCollatorForPreference(pad_token_id=pad_id)([dict(row) for row in rows])
    return _counted(batch, len(rows))


def collate_singles(rows: Sequence[Row], pad_id: int) -> dict[str, Any]:
    """Batch answers with their labels, a pair as two, and with each prompt an answer of another row.

    That is the answer of the nearest example before it that is of another row, the last one being before the first; a
    batch of one row has none but its own. Preferred answers come first.

    Returns:
        as `collate_pairs`, of (answers, longest), with `label`, and the borrowed answers under `KL_` names.
    """
    singles = [
        (number, {"prompt_ids": list(row["prompt_ids"]), "completion_ids": list(row[column]), "label": label})
        for column, label in (("chosen_ids", True), ("rejected_ids", False))
        for number, row in enumerate(rows)
        if row[column]
    ]
    for place, (own, example) in enumerate(singles):
        before = [singles[place - back] for back in range(1, len(singles))]
        lender = next((each for number, each in before if number != own), singles[place - 1][1])
        example["KL_completion_ids"] = lender["completion_ids"]
    examples = [example for _, example in singles]
    return _counted(DataCollatorForUnpairedPreference(pad_token_id=pad_id)(examples), len(examples))


def _halves(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what `collate_pairs` made as TRL's ORPO takes it; labels are -100 outside the answers."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    halves = {}
    for name, content in (
        ("input_ids", batch["input_ids"]),
        ("attention_mask", batch["attention_mask"]),
        ("labels", labels),
    ):
        halves[f"chosen_{name}"], halves[f"rejected_{name}"] = content.chunk(2)
    return halves


def _counted(batch: dict[str, Any], examples: int) -> dict[str, Any]:
    counts = {"tokens": int(batch["attention_mask"].sum()), "answered": int(batch["completion_mask"].sum())}
    return {**batch, **counts, "examples": examples}


def _check_output(params: TrainParams, trainee: Trainee) -> None:
    """TRL multiplies by the output layer's own weights: an adapter on it, or a copy trained whole, would be left out."""
    output = trainee.model.get_output_embeddings()
    if params.objective != "orpo" and type(output).__module__.startswith("peft."):
        raise ParamsError(
            f"train.objective {params.objective} takes the output layer as it is in the base; here it is trained "
            "(by target_modules, modules_to_save, or trainable_tokens with tied embeddings)",
            fix="leave the output layer out of what is trained, or set train.objective to orpo",
        )
