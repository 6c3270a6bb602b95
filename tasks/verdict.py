"""The task `verdict`."""

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from regraft import steps
from regraft.gates.verdict import Verdict, explain
from regraft.layout import Layout
from regraft.settings import Settings
from tasks.common import OPTIONS


@task(name="verdict", tags=["regraft"], **OPTIONS)
def verdict(layout: Layout, settings: Settings) -> Verdict:
    """Judge the challenger against the champion of this moment; the verdict is a table among the artifacts."""
    judged = steps.judge_and_save(layout, settings)
    rows = [
        {
            "check": each.name,
            "passed": "yes" if each.passed else "no" if each.decisive else "no (not decisive)",
            "measured": each.measured,
            "interval": "" if each.low is None else f"{each.low:.4g} to {each.high or each.low:.4g}",
            "threshold": each.threshold,
            "detail": each.detail,
        }
        for each in judged.checks
    ]
    create_table_artifact(key="verdict", table=rows, description="passed" if judged.passed else "refused")
    create_markdown_artifact(key="verdict-in-words", markdown="\n".join(f"- {line}" for line in explain(judged)))
    return judged
