"""Tables of answers and reports, made by hand."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from regraft.evaluate.answers import Answer
from regraft.model.report import BaseReport
from regraft.preprocess.report import Counts, PreprocessReport, Supervision
from regraft.train.report import TrainReport
from regraft.validate.report import ValidateReport

Table = list[Answer]


def make_table(
    right: Sequence[bool],
    *,
    first: int = 0,
    loss: float | Sequence[float] = 1.0,
    slices: Mapping[str, str] | Callable[[int], Mapping[str, str]] | None = None,
) -> Table:
    """Make one answer for each truth value; ids count from `first`, ten trained tokens a row."""
    return [
        Answer(
            row_id=f"{first + index:032x}",
            slices=dict(slices(index) if callable(slices) else slices or {}),
            answer=f'{{"n": {first + index}}}',
            generated=f'{{"n": {first + index}}}' if exact else "?",
            loss=loss if isinstance(loss, float) else loss[index],
            tokens=10,
            exact=exact,
            json_valid=exact,
            stopped=True,
        )
        for index, exact in enumerate(right)
    ]


@pytest.fixture
def table() -> Callable[..., Table]:
    return make_table


DIGESTS = {name: name[0] * 64 for name in ("adapter", "base", "tokenizer", "data", "holdout", "rows")}


class Reports:
    """Reports of stages that went well, with changes."""

    def model(self) -> BaseReport:
        return BaseReport(
            source="folder",
            base="base",
            name="base",
            revision=None,
            path="base",
            digest=DIGESTS["base"],
            tokenizer_digest=DIGESTS["tokenizer"],
            files={},
            parameters=1,
            dtype="float32",
            architecture="Any",
        )

    def validate(
        self, *, blocked: Sequence[str] = (), warned: Sequence[str] = (), rows_out: int = 500
    ) -> ValidateReport:
        results = [("block", name, False) for name in blocked] + [("warn", name, False) for name in warned]
        return ValidateReport.model_validate(
            {
                "rows_in": rows_out,
                "rows_out": rows_out,
                "rows_quarantined": 0,
                "rows_duplicate": 0,
                "quarantined_by_reason": {},
                "unknown_labels": {},
                "expectations": [
                    {"name": name, "level": level, "passed": passed, "measured": 0, "threshold": 1, "rows": 0}
                    for level, name, passed in [*results, ("block", "rows", True)]
                ],
                "passed": not blocked,
                "slices": {},
                "time": {},
                "files": {},
                "ignored": [],
                "data_digest": DIGESTS["data"],
            }
        )

    def preprocess(self, digests: Mapping[str, str] = DIGESTS, **changes: Any) -> PreprocessReport:
        audit = {
            "rows": 400,
            "tokens": 10_000,
            "trained_tokens": 4_000,
            "answers": 400,
            "rows_training_nothing": 0,
            "rows_learning_to_stop": 1.0,
            "answers_recovered": 1.0,
            "answers_exact": 1.0,
            "round_trip": 1.0,
            "agreement": 1.0,
            "agreement_rows": 400,
            "kept_apart": 0,
            "control_text": 0,
            "control_leaked": 0,
            "unknown_tokens": 0,
            "truncated": 0,
            "longest": 40,
            "dropped_share": 0.0,
        }
        counts = {"rows_in": 500, "train": 400, "holdout": 100}
        nothing = dict.fromkeys(("deduplicated", "leaked", "too_long", "nothing_to_train"), 0)
        return PreprocessReport(
            counts=Counts(**counts, **nothing),
            supervision=Supervision.model_validate({**audit, **changes}),
            holdout_slices={},
            train_slices={},
            max_length=64,
            supervise="assistant",
            blocks=100,
            block_length=128,
            block_fill=0.9,
            longest_block=128,
            stop_token_ids=[2],
            template_digest="t" * 64,
            tokenizer_digest=digests["tokenizer"],
            base="base",
            rows_digest=digests["rows"],
            train_digest=digests["data"],
            holdout_digest=digests["holdout"],
        )

    def train(
        self,
        digests: Mapping[str, str] = DIGESTS,
        norms: Mapping[str, tuple[float, float]] | None = None,
        **changes: Any,
    ) -> TrainReport:
        found = {"layer.0": (1.0, 0.5), "layer.1": (1.0, 0.5)} if norms is None else norms
        report = {
            "base": "base",
            "base_digest": digests["base"],
            "tokenizer_digest": digests["tokenizer"],
            "dataset_digest": digests["data"],
            "params_digest": "p" * 64,
            "adapter_digest": digests["adapter"],
            "seed": 7,
            "planned_steps": 10,
            "steps": 10,
            "blocks": 100,
            "tokens_seen": 1000,
            "tokens_trained": 400,
            "loss_first": 2.0,
            "loss_last": 0.2,
            "loss_decreased": True,
            "all_finite": True,
            "non_finite_steps": [],
            "non_finite_parameters": [],
            "grad_norm_largest": 2.0,
            "adapted_modules": [{"name": n, "rank": 4, "a_norm": a, "b_norm": b} for n, (a, b) in found.items()],
            "expected_modules": sorted(found),
            "missing_modules": [],
            "zero_b": [],
            "trainable_parameters": 100,
            "total_parameters": 1000,
        }
        return TrainReport.model_validate({**report, **changes})


@pytest.fixture
def reports() -> Reports:
    return Reports()
