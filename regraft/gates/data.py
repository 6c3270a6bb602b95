"""Is the data fit to train on: the contract of `validate` held, and enough rows were accepted."""

from collections.abc import Mapping

from regraft.gates.params import DataGate
from regraft.gates.verdict import Check, Verdict, at_least, decide, none_of, same
from regraft.validate.report import ValidateReport

GATE = "data"


def judge_data(params: DataGate, report: ValidateReport, *, rows: str, expected: Mapping[str, str]) -> Verdict:
    """Judge the accepted rows.

    Args:
        params: how many rows are asked for.
        report: of the stage `validate`.
        rows: sha256 of the `rows.parquet` that the report lies beside.
        expected: `rows`: the digest of the rows that were prepared for training.
    """
    broken = [each.name for each in report.expectations if each.level == "block" and not each.passed]
    warned = [each.name for each in report.expectations if each.level == "warn" and not each.passed]
    checks = [
        *same(expected, {"rows": rows}, "the data"),
        none_of("contract", broken, "Expectations of level block that failed"),
        at_least("rows", report.rows_out, params.min_rows, "Accepted rows"),
        _warnings(warned),
    ]
    return decide(GATE, checks, {**expected, "data": report.data_digest})


def _warnings(warned: list[str]) -> Check:
    return none_of("warnings", warned, "Expectations of level warn that failed").model_copy(update={"decisive": False})
