"""The stage: every adapter and the base without one, on the same held-out rows, with one load of the base."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.artifacts import commit_dir, read_json, write_json
from regraft.errors import ParamsError, PinMismatch
from regraft.evaluate.answers import summarise, write_answers
from regraft.evaluate.holdout import Holdout, read_holdout
from regraft.evaluate.params import EvaluateParams
from regraft.evaluate.preferences import likelihoods, read_pairs, summarise_pairs
from regraft.evaluate.report import BASE, AdapterScores, EvaluateReport, PreferenceScore, PreferenceScores
from regraft.evaluate.store import code_digest, params_digest
from regraft.failpoints import failpoint
from regraft.model.params import Quantization

log = logging.getLogger("regraft.evaluate")
ALONE = "adapter"
"""The name under which `score` scores its one adapter."""


def evaluate(
    params: EvaluateParams,
    quantization: Quantization,
    *,
    base: Path,
    dataset: Path,
    adapters: Mapping[str, Path],
    out: Path,
    attention: str = "sdpa",
    measurements: Path | None = None,
) -> EvaluateReport:
    """Score the base without an adapter, and each of `adapters`, on the holdout in `dataset`.

    Args:
        params: bounds of batches and answers.
        quantization: how the base lies in memory; as it was trained on.
        base: output of the stage `model`.
        dataset: output of the stage `preprocess`.
        adapters: folders by name; `base` is taken.
        attention: `model.attention`; its kernels differ by rounding only.
        out: gets `answers-NAME.parquet` for each name and `report.json`.
        measurements: gets times and memory, where given.

    Raises:
        MissingInput, DamagedArtifact, PinMismatch: an input is not there, not whole, or not the one that was pinned.
        DataError: the holdout is empty or wrong.
        ParamsError: a name is taken, or a slice to report does not occur.
    """
    if BASE in adapters:
        raise ParamsError(f"an adapter cannot be named `{BASE}`: that is the base without one")
    scored: dict[str, Path | None] = {BASE: None, **adapters}
    return _score_all(params, quantization, base, dataset, scored, out, attention, measurements)


def score(
    params: EvaluateParams,
    quantization: Quantization,
    *,
    base: Path,
    dataset: Path,
    adapter: Path,
    out: Path,
    attention: str = "sdpa",
) -> EvaluateReport:
    """Score one adapter alone, such as the champion's on a new holdout; see `evaluate`.

    Writes `answers-adapter.parquet` and `report.json` into `out`.
    """
    return _score_all(params, quantization, base, dataset, {ALONE: adapter}, out, attention, None)


def _score_all(
    params: EvaluateParams,
    quantization: Quantization,
    base: Path,
    dataset: Path,
    scored: Mapping[str, Path | None],
    out: Path,
    attention: str,
    measurements: Path | None,
) -> EvaluateReport:
    import torch

    from regraft.evaluate.score import answer_rows
    from regraft.model.adapter import adapter_digest, check_adapter, load_adapter, take_off
    from regraft.model.load import load_model, load_tokenizer, open_base

    # Everything that can be wrong is looked at before the weights are loaded.
    if params.threads is not None:
        torch.set_num_threads(params.threads)
    opened = open_base(base)
    _check_tokenizer(dataset, opened.report.tokenizer_digest)
    holdout = read_holdout(dataset, params.max_rows)
    pairs = read_pairs(dataset, params.max_rows)
    slices = _slices(params, holdout)
    adapters = {name: path for name, path in scored.items() if path is not None}
    for folder in adapters.values():
        check_adapter(folder)
    digests = {name: adapter_digest(folder) for name, folder in adapters.items()}

    clock = time.monotonic()
    tokenizer = load_tokenizer(opened)
    model: Any = load_model(opened, quantization, training=False, attention=attention, gpu_memory=params.gpu_memory)
    seconds = {"load": time.monotonic() - clock}
    scores: dict[str, AdapterScores] = {}
    preferences: dict[str, PreferenceScores] = {}
    plain = likelihoods(model, pairs, params)
    with commit_dir(out) as made:
        for name, path in scored.items():
            clock = time.monotonic()
            if path is None:
                answers = answer_rows(model, tokenizer, holdout.rows, params, name)
                own = plain
            else:
                adapted = load_adapter(model, path)
                answers = answer_rows(adapted, tokenizer, holdout.rows, params, name)
                own = likelihoods(adapted, pairs, params)
                model = take_off(adapted)  # the plain base again, for the next adapter
            seconds[name] = time.monotonic() - clock
            write_answers(made / f"answers-{name}.parquet", answers)
            scores[name] = summarise(answers, slices)
            overall = scores[name].overall
            log.info(
                "%s: %.1f %% of %d rows exact, loss %s, %.1f s",
                name,
                100 * overall.exact_match,
                overall.rows,
                "not finite" if overall.loss is None else f"{overall.loss:.4f}",
                seconds[name],
            )
            if pairs:
                preferences[name] = summarise_pairs(pairs, own, None if path is None else plain, slices)
                log.info("%s: %s", name, _ranking(preferences[name].overall))
            failpoint("evaluate.scored")
        report = EvaluateReport(
            base_digest=opened.report.digest,
            tokenizer_digest=opened.report.tokenizer_digest,
            holdout_digest=holdout.digest,
            params_digest=params_digest(params, quantization),
            code_digest=code_digest(),
            rows=len(holdout.rows),
            held_out=holdout.held_out,
            answers_too_long=_too_long(tokenizer, holdout, params.max_new_tokens),
            adapters=digests,
            scores=scores,
            preferences=preferences or None,
        )
        if report.answers_too_long:
            log.warning(
                "%d expected answers have more than evaluate.max_new_tokens = %d tokens: they cannot be answered exactly",
                report.answers_too_long,
                params.max_new_tokens,
            )
        report.save(made / "report.json")
    if measurements is not None:
        device = str(model.device)
        write_json(
            measurements,
            {
                "rows": report.rows,
                "seconds": {name: round(value, 2) for name, value in seconds.items()},
                "device": device,
                "threads": torch.get_num_threads(),
                "peak_gpu_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1) if device != "cpu" else None,
            },
        )
    return report


def _ranking(score: PreferenceScore) -> str:
    accuracy = score.reward_accuracy if score.pairs else score.single_accuracy
    margin = score.reward_margin if score.pairs else score.single_margin
    if accuracy is None or margin is None:
        return f"{score.rows} held-out preferences, rewards are measured against the base"
    return f"{accuracy:.1%} of {score.rows} held-out preferences ranked right, margin {margin:.3f} nats"


def _check_tokenizer(dataset: Path, tokenizer_digest: str) -> None:
    """Refuse a holdout that was tokenised by another tokenizer than the base's."""
    content = read_json(dataset / "report.json")
    found = content.get("tokenizer_digest") if isinstance(content, dict) else None
    if found != tokenizer_digest:
        raise PinMismatch(
            f"{dataset} was tokenised with the tokenizer {found}, the base has {tokenizer_digest}",
            fix="regraft preprocess",
        )


def _slices(params: EvaluateParams, holdout: Holdout) -> list[str]:
    present = sorted({name for row in holdout.rows for name in row.slices})
    if params.slices is None:
        return present
    if unknown := sorted(set(params.slices) - set(present)):
        raise ParamsError(
            f"evaluate.slices: no held-out row has {', '.join(unknown)}; the rows have {', '.join(present) or 'none'}",
            fix="edit evaluate.slices in params.yaml, or data.slices",
        )
    return sorted(params.slices)


def _too_long(tokenizer: Any, holdout: Holdout, bound: int) -> int:
    lengths = tokenizer([row.answer for row in holdout.rows], add_special_tokens=False)["input_ids"]
    return sum(len(ids) + 1 > bound for ids in lengths)  # with the stop token
