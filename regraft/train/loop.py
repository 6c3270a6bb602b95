"""The Trainer that trains an adapter: raw losses and gradients watched, checkpoints exact, stopping without loss."""

import dataclasses
import io
import json
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from regraft.errors import ParamsError, Preempted, TrainingDiverged
from regraft.failpoints import failpoint
from regraft.model.adapter import adapter_bytes, load_parameters
from regraft.train import crew
from regraft.train.adapt import START, Trainee
from regraft.train.checkpoint import Checkpoints
from regraft.train.data import IGNORE, batches, moved
from regraft.train.loss import CHUNK, can_chunk, chunked_loss, summed_loss
from regraft.train.machine import spare_walks
from regraft.train.params import TrainParams
from regraft.train.shard import enable_sharding, follow_shards, gathered, load_states, whole, whole_states
from regraft.train.speed import Speed
from regraft.train.stop import StopRequest

log = logging.getLogger("regraft.train")
ADAPTER, PROGRESS, BEST = "adapter.safetensors", "progress.json", "best.safetensors"
_MOST_SKIPPED = 20
"""fp16 steps in a row that loss scaling may skip; a healthy run skips a handful while it finds its scale."""


@dataclass
class Progress:
    """What was measured at each step so far."""

    losses: list[float] = field(default_factory=list)
    """Mean negative log-likelihood of each step's trained tokens; with preferences the mean loss of its examples."""
    trained: list[int] = field(default_factory=list)
    """Trained tokens of each step."""
    seen: int = 0
    """Tokens through the model, padding not counted."""
    computed: int = 0
    """Tokens through the model, padding counted."""
    grad_norm_largest: float = 0.0
    held_out: list[tuple[int, float]] = field(default_factory=list)
    """Step and held-out loss of each measurement."""
    stopped_early: bool = False
    examples: list[int] = field(default_factory=list)
    """Pairs or single answers of each step; empty where tokens count."""
    margins: list[float] = field(default_factory=list)
    """Reward of the preferred answers minus that of the others, of each step's `compared`; only with preferences."""
    compared: list[int] = field(default_factory=list)
    """Examples that each step's margin was measured on: with kto those of batches with answers of both kinds, maybe none."""
    accuracies: list[float] = field(default_factory=list)
    """Share of each step's pairs whose preferred answer has the higher reward; only where there are pairs."""

    @property
    def best_step(self) -> int | None:
        """The first step with the lowest held-out loss; None where none was measured."""
        return min(self.held_out, key=lambda each: each[1])[0] if self.held_out else None

    def mean(self, first: int, last: int) -> float:
        """Mean loss for each trained token over a range of steps (from `first`, before `last`, counted from 0).

        With preferences, for each example.
        """
        return self.mean_of(self.losses, first, last)

    def mean_of(self, values: list[float], first: int, last: int) -> float:
        """Mean of what was measured at each step, over a range of steps, by what the steps' losses are means of."""
        return _mean(values[first:last], (self.examples or self.trained)[first:last])

    def margin(self, first: int, last: int) -> float | None:
        """Mean margin of the examples that it was measured on, over a range of steps; None where it was on none."""
        counts = self.compared[first:last]
        return _mean(self.margins[first:last], counts) if any(counts) else None

    @classmethod
    def load(cls, checkpoint: Path) -> "Progress":
        """Read the progress at a checkpoint."""
        content = json.loads((checkpoint / PROGRESS).read_bytes())
        content["held_out"] = [(step, loss) for step, loss in content["held_out"]]
        return cls(**content)

    def to_bytes(self) -> bytes:
        """The progress as JSON; floats come back bit for bit."""
        return json.dumps(dataclasses.asdict(self)).encode()


def _mean(values: Sequence[float], counts: Sequence[int]) -> float:
    return math.fsum(value * count for value, count in zip(values, counts, strict=True)) / max(1, sum(counts))


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with the loss of `regraft.train.loss`, which stops at the first value that is not finite.

    It neither logs nor saves by itself: `Recorder` does, at the end of each step.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the trained tokens of the whole step

    def __init__(
        self, trainee: Trainee, *args: Any, params: TrainParams, progress: Progress, held_out: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(trainee.model, *args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.trainee = trainee
        self.params = params
        self.progress = progress
        self.held_out = held_out
        self.best: bytes | None = None
        self._chunk = _logits_chunk(params, trainee)
        self._sharded = params.sharding == "full"
        if not self._sharded:
            spare_walks(self.model, trainee.parameters)
        self.grad_norm = self.learning_rate = 0.0
        self._loss = torch.zeros(())
        self._seen = self._computed = self._skipped = 0

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], Any]:
        """Take the batches of one step and their number of trained tokens, which is read from the GPU once, if at all."""
        batches, items = super().get_batch_samples(*args)
        if crew.size() == 1 and all("trained" in batch for batch in batches):
            items = sum(batch["trained"].shape[1] for batch in batches)
        elif items is not None:
            items = int(items)
        self._trained = items
        self._seen = sum(batch["tokens"] for batch in batches)
        self._computed = sum(batch["input_ids"].numel() for batch in batches)
        self._loss = torch.zeros((), device=self.args.device)
        return batches, items

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one batch; the raw losses of a step's batches are summed."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._loss = self._loss + loss
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """A batch's share of the step's mean loss for each trained token."""
        # Gradients are averaged over processes, and the tokens counted are those of all of them.
        share = crew.size() / max(int(num_items_in_batch), 1)
        return self._summed_loss(model, inputs) * share

    def _summed_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self._chunk is not None:
            return chunked_loss(model, inputs, self._chunk)
        return summed_loss(model, inputs, self.trainee.prompt_tokens)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer; with `lora_plus`, B in groups of its own."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if fresh and self.params.lora_plus != 1:
            faster = {id(p) for key, p in self.trainee.parameters.items() if ".lora_B." in key}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in faster]
                group["params"] = [p for p in group["params"] if id(p) not in faster]
                rest = {key: value for key, value in group.items() if key != "params"}
                optimizer.add_param_group({**rest, "params": own, "lr": group["lr"] * self.params.lora_plus})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def measure_held_out(self) -> float:
        """Return the mean loss for each trained token of the blocks that are not trained on."""
        total, tokens = 0.0, 0
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in batches(self.held_out, self.params.batch_size, self.data_collator.keywords["pad_id"]):
                on_device = moved(batch, self.args.device)
                total += float(self._summed_loss(self.model, on_device))
                tokens += int((batch["labels"][:, 1:] != IGNORE).sum())
        self.model.train()
        return total / max(1, tokens)

    def release(self) -> None:
        """Leave the model as it is to be saved."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: walking all parameters at each batch costs a tiny model a tenth of its time."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Look at the raw loss and gradient norm of a step before the optimizer uses them (one transfer from the GPU).

        Raises:
            TrainingDiverged: one of them is not finite.
        """
        norm = whole(super()._get_grad_norm(model, grad_norm))
        step = self.state.global_step + 1
        counted = torch.tensor([self._seen, self._computed], dtype=torch.float64, device=self._loss.device)
        loss, self.grad_norm, seen, computed = torch.cat(
            [
                crew.summed(self._loss.double().reshape(1)) / crew.size(),
                torch.as_tensor(norm).to(self._loss).double().reshape(1),
                crew.summed(counted) if crew.size() > 1 else counted,
            ]
        ).tolist()
        if not (math.isfinite(loss) and math.isfinite(self.grad_norm)):
            self._skipped += 1
            scaling = self.accelerator.scaler is not None and math.isfinite(loss)
            if not scaling or self._skipped > _MOST_SKIPPED:
                raise TrainingDiverged(
                    f"at step {step} of {self.state.max_steps} the loss was {loss} and the gradient norm "
                    f"{self.grad_norm}; training stopped there, earlier checkpoints are as they were",
                    fix="lower train.learning_rate (or raise train.warmup), or look for broken rows, and train again",
                )
        else:
            self._skipped = 0
            self.progress.grad_norm_largest = max(self.progress.grad_norm_largest, self.grad_norm)
        self.learning_rate = self.optimizer.param_groups[0]["lr"]
        self.progress.losses.append(loss)
        self.progress.trained.append(self._trained)
        self.progress.seen += int(seen)
        self.progress.computed += int(computed)
        return norm

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's, which leaves sharding to accelerate."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and getattr(self.accelerator.state, "fsdp_plugin", None) is None:
            enable_sharding(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled: bool = True

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._sharded:
            follow_shards(self.model, self.trainee.parameters)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_states(self.optimizer, torch.load(Path(checkpoint) / "optimizer.pt", weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._sharded:
            follow_shards(self.model, self.trainee.parameters)
        load_parameters(self.trainee.parameters, Path(resume_from_checkpoint) / ADAPTER)
        best = Path(resume_from_checkpoint) / BEST
        self.best = best.read_bytes() if best.exists() else None

    def adapter(self) -> bytes:
        """All that is trained, as the bytes of a file; every process must ask for it."""
        parameters = self.trainee.parameters
        return adapter_bytes(gathered(parameters) if self._sharded else parameters)

    def snapshot(self) -> dict[str, bytes]:
        """Everything that the next step depends on, as files that the Trainer finds again when it resumes."""
        rng: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.random.get_rng_state(),
        }
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.random.get_rng_state()
        states = {
            "optimizer.pt": whole_states(self.optimizer) if self._sharded else self.optimizer.state_dict(),
            "scheduler.pt": self.lr_scheduler.state_dict(),
            **_by_process(rng),
        }
        if self.accelerator.scaler is not None:
            states["scaler.pt"] = self.accelerator.scaler.state_dict()
        extra = {} if self.best is None else {BEST: self.best}
        if self.trainee.start.tensors:
            extra[START] = adapter_bytes(self.trainee.start.tensors)
        return {
            **extra,
            ADAPTER: self.adapter(),
            PROGRESS: self.progress.to_bytes(),
            "trainer_state.json": (json.dumps(dataclasses.asdict(self.state), sort_keys=True) + "\n").encode(),
            **{name: _saved(state) for name, state in states.items()},
        }


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Writes metrics and checkpoints at the end of steps, and stops there when a signal asks for it."""

    def __init__(
        self, params: TrainParams, checkpoints: Checkpoints, stop: StopRequest, progress: Progress, speed: Speed
    ) -> None:
        self.params = params
        self.checkpoints = checkpoints
        self.stop = stop
        self.progress = progress
        self.speed = speed
        self.trainer: AdapterTrainer | None = None

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, log, save, stop: in that order, so that a checkpoint holds the metrics of its own step.

        Raises:
            Preempted: a signal came; a checkpoint of this step was written.
        """
        failpoint("train.step")
        trainer, step = self.trainer, state.global_step
        assert trainer is not None
        last = step == state.max_steps
        stop = next(iter(filter(None, crew.from_all(self.stop.requested))), None)
        measured = trainer.held_out is not None and (step % self.params.validate_every == 0 or last)
        if measured:
            self._validate(trainer, step)
            if self.progress.stopped_early:
                control.should_training_stop = last = True
        if crew.is_first() and (step % self.params.logging_every == 0 or last or measured):
            self._log(trainer, state, measured)
        if step % self.params.checkpoint_every == 0 or last or stop:
            files = trainer.snapshot()  # each process has its own part in it
            if crew.is_first():
                self.checkpoints.save(step, files)
                self.checkpoints.prune(self.params.keep_checkpoints)
            crew.told_by_first(None)  # none ends before it is written
        if stop:
            raise Preempted(
                f"stopped by {stop} after step {step} of {state.max_steps}; its checkpoint is written",
                fix="run the same command again: it goes on from there",
            )

    def _validate(self, trainer: AdapterTrainer, step: int) -> None:
        loss = trainer.measure_held_out()
        if not math.isfinite(loss):
            raise TrainingDiverged(f"at step {step} the held-out loss was {loss}", fix="lower train.learning_rate")
        self.progress.held_out.append((step, loss))
        best = self.progress.best_step
        if best == step and self.params.keep == "best":
            trainer.best = trainer.adapter()
        since = sum(each > (best or 0) for each, _ in self.progress.held_out)
        if self.params.early_stopping is not None and since >= self.params.early_stopping:
            self.progress.stopped_early = True
            log.info("stopping at step %d: the held-out loss was lowest at step %d", step, best)

    def _log(self, trainer: AdapterTrainer, state: Any, measured: bool) -> None:
        step = state.global_step
        line = {
            "step": step,
            "epoch": state.epoch,
            "loss": self.progress.mean(self._logged_before(step), step),
            "grad_norm": trainer.grad_norm,
            "learning_rate": trainer.learning_rate,
        }
        if (margin := self.progress.margin(self._logged_before(step), step)) is not None:
            line["reward_margin"] = margin
        if self.progress.accuracies:
            line["reward_accuracy"] = self.progress.mean_of(self.progress.accuracies, self._logged_before(step), step)
        if measured:
            line["held_out_loss"] = self.progress.held_out[-1][1]
        with self.checkpoints.metrics.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
        speed = self.speed.note(self.checkpoints.speed, step, self.progress)
        log.info("step %d of %d: loss %.4f%s", step, state.max_steps, line["loss"], speed)

    def _logged_before(self, step: int) -> int:
        """The step of the line before, by the parameters alone, so that it is the same after a resume."""
        every = [self.params.logging_every, *([self.params.validate_every] if self.params.validation_share else [])]
        return max((step - 1) // each * each for each in every)


def _logits_chunk(params: TrainParams, trainee: Trainee) -> int | None:
    """Trained tokens whose logits are made at once, None for all.

    Raises:
        ParamsError: chunks were asked for, and the model does something to its logits that they would leave out.
    """
    possible = can_chunk(trainee.model, trainee.prompt_tokens)
    if params.logits_chunk is not None:
        if not possible:
            raise ParamsError(
                f"train.logits_chunk: found {params.logits_chunk}, but this model caps or scales its logits",
                fix="set train.logits_chunk to null",
            )
        return params.logits_chunk
    # On a CPU a step's logits fit; making them twice would cost time.
    return CHUNK if params.kernels == "fused" and torch.cuda.is_available() and possible else None


def _by_process(rng: dict[str, Any]) -> dict[str, Any]:
    """The random states under the names by which the Trainer finds them: one alone, or one for each process."""
    if crew.size() == 1:
        return {"rng_state.pth": rng}
    return {f"rng_state_{index}.pth": each for index, each in enumerate(crew.from_all(rng))}


def _saved(state: Any) -> bytes:
    """Serialise in memory: torch reports a full disk as something else than an OSError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
