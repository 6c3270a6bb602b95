"""How close two causal language models are on held-out answers: distributions token by token, and greedy answers.

The reference's log-probabilities are kept in a scratch file, so that the two models are never in memory together.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regraft.evaluate.holdout import HeldOutRow
from regraft.evaluate.params import EvaluateParams

_IGNORED = -100


@dataclass(frozen=True)
class Distance:
    """How far a model's distributions are from the reference's."""

    positions: int
    top1_agreement: float
    """Share of positions at which both find the same token likeliest."""
    mean_kl: float | None
    """Mean KL(reference || model) in nats; None where it is not finite at some position."""
    max_kl: float | None


def log_probabilities(
    model: Any, rows: Sequence[HeldOutRow], params: EvaluateParams
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `(positions x vocabulary log-probabilities in float32, the targets)` on the CPU, batch by batch.

    A position is one that predicts a trained token. The order depends on `rows` and `params` alone, so the batches of
    two models of one vocabulary belong together.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    few_logits = "logits_to_keep" in inspect.signature(inner.forward).parameters
    for batch in batches(rows, params):
        width = len(batch[0].input_ids)
        input_ids = torch.tensor([[*row.input_ids, *[0] * (width - len(row.input_ids))] for row in batch])
        labels = torch.tensor([[*row.labels, *[_IGNORED] * (width - len(row.labels))] for row in batch])
        mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in batch])
        targets = labels[:, 1:]
        columns = (targets != _IGNORED).any(dim=0).nonzero()[:, 0]
        if not len(columns):
            continue
        first, last = (int(columns[0]), int(columns[-1]) + 1) if few_logits else (0, width)
        keep = {"logits_to_keep": torch.arange(first, last, device=inner.device)} if few_logits else {}
        with torch.inference_mode():
            logits = inner(
                input_ids=input_ids.to(inner.device), attention_mask=mask.to(inner.device), use_cache=False, **keep
            ).logits
            wanted = targets[:, first : min(last, width - 1)]
            logits = logits[:, : wanted.shape[1]]
            trained = wanted != _IGNORED
            chances = torch.log_softmax(logits[trained.to(logits.device)].float(), dim=-1).cpu()
        yield chances, wanted[trained]


def keep_reference(path: Path, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Write the reference's log-probabilities to a scratch file (4 bytes x positions x vocabulary); return positions."""
    positions = 0
    with path.open("wb") as file:
        for chances, targets in batches:
            chances.numpy().tofile(file)
            positions += len(targets)
    return positions


def compare(path: Path, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> Distance:
    """Compare a model's batches with the reference's in the scratch file."""
    agreed, divergences = 0, [torch.zeros(0, dtype=torch.float64)]
    with path.open("rb") as file:
        for chances, targets in batches:
            known = torch.from_numpy(np.fromfile(file, np.float32, chances.numel())).view(len(targets), -1)
            terms = torch.where(known == -math.inf, 0.0, known.exp() * (known - chances))
            divergences.append(terms.double().sum(dim=-1).clamp(min=0.0))
            agreed += int((known.argmax(dim=-1) == chances.argmax(dim=-1)).sum())
    every = torch.cat(divergences)
    if not len(every):
        return Distance(positions=0, top1_agreement=0.0, mean_kl=None, max_kl=None)
    finite = bool(torch.isfinite(every).all())
    return Distance(
        positions=len(every),
        top1_agreement=agreed / len(every),
        mean_kl=float(every.mean()) if finite else None,
        max_kl=float(every.max()) if finite else None,
    )


def batches(rows: Sequence[HeldOutRow], params: EvaluateParams) -> Iterator[list[HeldOutRow]]:
    """Rows of like length together, longest first, within the bounds of the section `evaluate`."""
    batch: list[HeldOutRow] = []
    for row in sorted(rows, key=lambda row: (-len(row.input_ids), row.row_id)):
        width = len(batch[0].input_ids) if batch else 0
        if batch and (len(batch) == params.batch_size or width * (len(batch) + 1) > params.batch_tokens):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
