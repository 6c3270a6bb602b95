"""After tokenising: every row still trains something, learns to stop, and no text became control."""

from collections.abc import Mapping

from regraft.gates.params import SupervisionGate
from regraft.gates.verdict import Check, Verdict, at_least, at_most, decide, same
from regraft.preprocess.report import PreprocessReport, Supervision

GATE = "supervision"


def judge_supervision(params: SupervisionGate, report: PreprocessReport, *, expected: Mapping[str, str]) -> Verdict:
    """Judge the supervision audit.

    Args:
        params: shares that are asked for.
        report: of the stage `preprocess`.
        expected: digests that the report must name: `tokenizer` of the base, `data` that was trained on, `holdout` that
            was answered.
    """
    found = {"tokenizer": report.tokenizer_digest, "data": report.train_digest, "holdout": report.holdout_digest}
    audit = report.supervision
    checks = [
        *same(expected, found, "the preprocess report"),
        at_least("rows", audit.rows, params.min_rows, "Training rows"),
        *_of_audit(params, audit),
    ]
    if report.preferences is not None and report.preferences.supervision.rows:
        checks += _of_audit(params, report.preferences.supervision, "other_", " (answers that are not wanted)")
    return decide(GATE, checks, {**expected, "template": report.template_digest})


def _of_audit(params: SupervisionGate, audit: Supervision, prefix: str = "", of: str = "") -> list[Check]:
    unknown = audit.unknown_tokens / audit.tokens if audit.tokens else 1.0
    checks = [
        at_least("trained_tokens", audit.trained_tokens, 1, f"Trained tokens{of}"),
        at_most("training_nothing", audit.rows_training_nothing, 0, f"Rows that train nothing{of}"),
        at_least(
            "learning_to_stop",
            audit.rows_learning_to_stop,
            params.min_learning_to_stop,
            f"Share of rows that learn to stop{of}",
            rows=audit.rows,
        ),
        at_least(
            "answers_recovered",
            audit.answers_recovered,
            params.min_recovered,
            f"Share of answers that come back from their tokens{of}",
            rows=audit.answers,
        ),
        at_least(
            "round_trip",
            audit.round_trip,
            params.min_recovered,
            f"Share of rows that survive the tokenizer{of}",
            rows=audit.rows,
        ),
        at_most("control_leaked", audit.control_leaked, 0, f"Control tokens that somebody typed{of}"),
        at_most("truncated", audit.truncated, 0, f"Rows that were cut{of}"),
        at_most("unknown_tokens", unknown, params.max_unknown, f"Share of tokens that stand for unknown text{of}"),
    ]
    return [each.model_copy(update={"name": f"{prefix}{each.name}"}) for each in checks]
