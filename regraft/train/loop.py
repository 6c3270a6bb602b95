"""The Trainer that trains an adapter: raw losses and gradients watched, checkpoints exact, stopping without loss."""

import dataclasses
import io
import json
import logging
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from regraft.errors import Preempted, TrainingDiverged
from regraft.failpoints import failpoint
from regraft.model.adapter import adapter_bytes, load_weights
from regraft.train.checkpoint import Checkpoints
from regraft.train.loss import summed_loss
from regraft.train.params import TrainParams
from regraft.train.stop import StopRequest

log = logging.getLogger("regraft.train")
ADAPTER, PROGRESS = "adapter.safetensors", "progress.json"
_MOST_SKIPPED = 20
"""fp16 steps in a row that loss scaling may skip; a healthy run skips a handful while it finds its scale."""


@dataclass
class Progress:
    """What was measured at each step so far."""

    losses: list[float] = field(default_factory=list)
    """Mean negative log-likelihood of each step's trained tokens."""
    trained: list[int] = field(default_factory=list)
    """Trained tokens of each step."""
    seen: int = 0
    """Tokens through the model, padding not counted."""
    computed: int = 0
    """Tokens through the model, padding counted."""
    grad_norm_largest: float = 0.0

    def mean(self, first: int, last: int) -> float:
        """Mean loss for each trained token over a range of steps (from `first`, before `last`, counted from 0)."""
        tokens = self.trained[first:last]
        total = math.fsum(loss * count for loss, count in zip(self.losses[first:last], tokens, strict=True))
        return total / max(1, sum(tokens))

    @classmethod
    def load(cls, checkpoint: Path) -> "Progress":
        """Read the progress at a checkpoint."""
        return cls(**json.loads((checkpoint / PROGRESS).read_bytes()))

    def to_bytes(self) -> bytes:
        """The progress as JSON; floats come back bit for bit."""
        return json.dumps(dataclasses.asdict(self)).encode()


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with the loss of `regraft.train.loss`, which stops at the first value that is not finite.

    It neither logs nor saves by itself: `Recorder` does, at the end of each step.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the trained tokens of the whole step

    def __init__(self, *args: Any, progress: Progress, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.progress = progress
        self.grad_norm = self.learning_rate = 0.0
        self._loss = torch.zeros(())
        self._seen = self._computed = self._skipped = 0

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], Any]:
        """Take the batches of one step and their number of trained tokens."""
        batches, items = super().get_batch_samples(*args)
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
        return summed_loss(model, inputs) / max(int(num_items_in_batch), 1)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: walking all parameters at each batch costs a tiny model a tenth of its time."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Look at the raw loss and gradient norm of a step before the optimizer uses them (one transfer from the GPU).

        Raises:
            TrainingDiverged: one of them is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        step = self.state.global_step + 1
        loss, self.grad_norm = torch.stack(
            [self._loss.double(), torch.as_tensor(norm).to(self._loss).double()]
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
        self.progress.trained.append(int(self._trained))
        self.progress.seen += self._seen
        self.progress.computed += self._computed
        return norm

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint) / ADAPTER)

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
            "optimizer.pt": self.optimizer.state_dict(),
            "scheduler.pt": self.lr_scheduler.state_dict(),
            "rng_state.pth": rng,
        }
        if self.accelerator.scaler is not None:
            states["scaler.pt"] = self.accelerator.scaler.state_dict()
        return {
            ADAPTER: adapter_bytes(self.model),
            PROGRESS: self.progress.to_bytes(),
            "trainer_state.json": (json.dumps(dataclasses.asdict(self.state), sort_keys=True) + "\n").encode(),
            **{name: _saved(state) for name, state in states.items()},
        }


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Writes metrics and checkpoints at the end of steps, and stops there when a signal asks for it."""

    def __init__(self, params: TrainParams, checkpoints: Checkpoints, stop: StopRequest, progress: Progress) -> None:
        self.params = params
        self.checkpoints = checkpoints
        self.stop = stop
        self.progress = progress
        self.trainer: AdapterTrainer | None = None

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Log, save, stop: in that order, so that a checkpoint holds the metrics of its own step.

        Raises:
            Preempted: a signal came; a checkpoint of this step was written.
        """
        failpoint("train.step")
        trainer, step = self.trainer, state.global_step
        assert trainer is not None
        last = step == state.max_steps
        if step % self.params.logging_every == 0 or last:
            self._log(trainer, state)
        if step % self.params.checkpoint_every == 0 or last or self.stop.requested:
            self.checkpoints.save(step, trainer.snapshot())
            self.checkpoints.prune(self.params.keep_checkpoints)
        if self.stop.requested:
            raise Preempted(
                f"stopped by {self.stop.requested} after step {step} of {state.max_steps}; its checkpoint is written",
                fix="run the same command again: it goes on from there",
            )

    def _log(self, trainer: AdapterTrainer, state: Any) -> None:
        step = state.global_step
        since = (step - 1) // self.params.logging_every * self.params.logging_every
        line = {
            "step": step,
            "epoch": state.epoch,
            "loss": self.progress.mean(since, step),
            "grad_norm": trainer.grad_norm,
            "learning_rate": trainer.learning_rate,
        }
        with self.checkpoints.metrics.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
        log.info("step %d of %d: loss %.4f", step, state.max_steps, line["loss"])


def _saved(state: Any) -> bytes:
    """Serialise in memory: torch reports a full disk as something else than an OSError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
