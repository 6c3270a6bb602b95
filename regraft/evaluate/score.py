"""Teacher-forced losses and greedy answers of a loaded model, in batches of rows of like length.

A row's result does not depend on the rows beside it, but for the rounding of sums: padding is masked, losses are taken
row by row in float32 and added in float64, and nothing of the model's own generation settings (sampling, penalties,
lengths) is used, only its stop tokens.
"""

import inspect
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from regraft.chat import stop_token_ids
from regraft.errors import DataError
from regraft.evaluate.answers import Answer, graded
from regraft.evaluate.holdout import HeldOutRow
from regraft.evaluate.params import EvaluateParams

log = logging.getLogger("regraft.evaluate")
_IGNORED = -100


def answer_rows(
    model: Any, tokenizer: Any, rows: Sequence[HeldOutRow], params: EvaluateParams, name: str
) -> list[Answer]:
    """Score every row with a model in inference mode, and return the answers in the order of `rows`.

    Args:
        model: a causal language model of transformers, adapters already in place or none.
        tokenizer: the one that the rows were rendered with.
        rows: at least one.
        params: batch sizes and the bound on new tokens.
        name: what progress lines call the model.
    """
    stop = stop_tokens(model, tokenizer)
    losses = row_losses(model, [(row.input_ids, row.labels) for row in rows], params)
    generated = generate(model, [row.prompt_ids for row in rows], stop, params, name)
    answers = []
    for row, (loss, tokens), ids in zip(rows, losses, generated, strict=True):
        stopped = bool(ids) and ids[-1] in stop
        text = tokenizer.decode(
            ids[:-1] if stopped else ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        answers.append(graded(row, text, loss=loss, tokens=tokens, stopped=stopped, json_answers=params.json_answers))
    return answers


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: those of the tokenizer and its template, and of the model's own settings.

    Raises:
        DataError: there is none, so no answer could end.
    """
    settings = getattr(_inner(model), "generation_config", None)
    own = getattr(settings, "eos_token_id", None)
    stop = {*stop_token_ids(tokenizer), *([own] if isinstance(own, int) else own or [])}
    if not stop:
        raise DataError(
            "neither tokenizer nor model names a stop token", fix="set `eos_token` in tokenizer_config.json"
        )
    return frozenset(stop)


def row_losses(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], params: EvaluateParams
) -> list[tuple[float, int]]:
    """Return, for each (input_ids, labels), the negative log likelihood summed over trained tokens, and their count."""
    inner = _inner(model)
    few_logits = "logits_to_keep" in inspect.signature(inner.forward).parameters
    trained = [[at for at, label in enumerate(labels) if at and label != _IGNORED] for _, labels in rows]
    results: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    for batch in _batches([len(ids) for ids, _ in rows], 0, params):
        positions = [at for index in batch for at in trained[index]]
        if not positions:
            continue
        width = max(len(rows[index][0]) for index in batch)
        # Padded on the right, a causal model cannot see the padding; only logits that predict trained tokens are made.
        input_ids = torch.tensor([[*rows[i][0], *[0] * (width - len(rows[i][0]))] for i in batch])
        mask = torch.tensor([[1] * len(rows[i][0]) + [0] * (width - len(rows[i][0])) for i in batch])
        first, last = (min(positions) - 1, max(positions)) if few_logits else (0, width)
        keep = {"logits_to_keep": torch.arange(first, last, device=inner.device)} if few_logits else {}
        with torch.inference_mode():
            logits = inner(
                input_ids=input_ids.to(inner.device), attention_mask=mask.to(inner.device), use_cache=False, **keep
            ).logits
            for place, index in enumerate(batch):
                at = torch.tensor(trained[index], dtype=torch.long)
                if not len(at):
                    continue
                targets = torch.tensor(rows[index][1])[at].to(logits.device)
                chances = torch.log_softmax(logits[place, (at - 1 - first).to(logits.device)].float(), dim=-1)
                loss = -chances.gather(1, targets[:, None]).double().sum()
                results[index] = (float(loss), len(at))
    return results


def generate(
    model: Any, prompts: Sequence[Sequence[int]], stop: frozenset[int], params: EvaluateParams, name: str
) -> list[list[int]]:
    """Continue each prompt greedily up to its first stop token (kept) or `max_new_tokens`."""
    from transformers import GenerationConfig

    inner = _inner(model)
    padding = min(stop)  # masked in prompts; behind an answer it comes after a stop token
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=params.max_new_tokens,
        eos_token_id=sorted(stop),
        pad_token_id=padding,
    )
    results: list[list[int]] = [[] for _ in prompts]
    done, reported = 0, time.monotonic()
    for batch in _batches([len(prompt) for prompt in prompts], params.max_new_tokens, params):
        width = max(len(prompts[index]) for index in batch)
        gaps = [width - len(prompts[index]) for index in batch]
        input_ids = torch.tensor([[padding] * gap + list(prompts[i]) for gap, i in zip(gaps, batch, strict=True)])
        mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
        with torch.inference_mode(), _own_settings(inner, settings):
            output = inner.generate(input_ids=input_ids.to(inner.device), attention_mask=mask.to(inner.device))
        for index, new in zip(batch, output[:, width:].tolist(), strict=True):
            end = next((place + 1 for place, token in enumerate(new) if token in stop), len(new))
            results[index] = new[:end]
        done += len(batch)
        if time.monotonic() - reported > 10:
            log.info("%s: %d of %d rows answered", name, done, len(prompts))
            reported = time.monotonic()
    return results


@contextmanager
def _own_settings(inner: Any, settings: Any) -> Iterator[None]:
    """Generate with `settings` alone: what they leave open would be taken from the model's generation_config.json."""
    before = inner.generation_config
    inner.generation_config = settings
    try:
        yield
    finally:
        inner.generation_config = before


def _inner(model: Any) -> Any:
    """Return the transformers model inside a PeftModel (it carries the adapter), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _batches(lengths: Sequence[int], extra: int, params: EvaluateParams) -> Iterator[list[int]]:
    """Group rows of like length, longest first: a batch that does not fit into memory fails at once, not at the end."""
    batch: list[int] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        width = width or lengths[index] + extra
        if batch and (len(batch) == params.batch_size or width * (len(batch) + 1) > params.batch_tokens):
            yield batch
            batch, width = [], lengths[index] + extra
        batch.append(index)
    if batch:
        yield batch
