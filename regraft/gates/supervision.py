"""After tokenising: every row still trains something, learns to stop, and no text became control."""

from collections.abc import Mapping

from regraft.gates.params import SupervisionGate
from regraft.gates.verdict import Verdict, at_least, at_most, decide, same
from regraft.preprocess.report import PreprocessReport

GATE = "supervision"


def judge_supervision(params: SupervisionGate, report: PreprocessReport, *, expected: Mapping[str, str]) -> Verdict:
    """Judge the supervision audit.

    Args:
        params: shares that are asked for.
        report: of the stage `preprocess`.
        expected: digests that the report must name: `tokenizer` of the base, `data` that was trained on, `holdout` that
            was answered.
    """
    audit = report.supervision
    found = {"tokenizer": report.tokenizer_digest, "data": report.train_digest, "holdout": report.holdout_digest}
    unknown = audit.unknown_tokens / audit.tokens if audit.tokens else 1.0
    checks = [
        *same(expected, found, "the preprocess report"),
        at_least("rows", audit.rows, params.min_rows, "Training rows"),
        at_least("trained_tokens", audit.trained_tokens, 1, "Trained tokens"),
        at_most("training_nothing", audit.rows_training_nothing, 0, "Rows that train nothing"),
        at_least(
            "learning_to_stop",
            audit.rows_learning_to_stop,
            params.min_learning_to_stop,
            "Share of rows that learn to stop",
            rows=audit.rows,
        ),
        at_least(
            "answers_recovered",
            audit.answers_recovered,
            params.min_recovered,
            "Share of answers that come back from their tokens",
            rows=audit.answers,
        ),
        at_least(
            "round_trip",
            audit.round_trip,
            params.min_recovered,
            "Share of rows that survive the tokenizer",
            rows=audit.rows,
        ),
        at_most("control_leaked", audit.control_leaked, 0, "Control tokens that somebody typed"),
        at_most("truncated", audit.truncated, 0, "Rows that were cut"),
        at_most("unknown_tokens", unknown, params.max_unknown, "Share of tokens that stand for unknown text"),
    ]
    return decide(GATE, checks, {**expected, "template": report.template_digest})
