"""The flow `retrain`: the stages that changed, then verdict, registration, promotion and export."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from regraft import decision
from regraft import retrain as library
from regraft import settings as parameters
from regraft.errors import RegraftError
from regraft.layout import STAGES, Layout
from regraft.retrain import Outcome
from regraft.settings import Settings
from tasks.common import bounded, let_the_library_speak
from tasks.evaluate import evaluate
from tasks.export import export
from tasks.model import model
from tasks.preprocess import preprocess
from tasks.promote import promote
from tasks.register import register
from tasks.train import train
from tasks.validate import validate
from tasks.verdict import verdict

TASKS = {"model": model, "validate": validate, "preprocess": preprocess, "train": train, "evaluate": evaluate}
LOOKING = ("model", "validate")
"""Stages that show what the data has become."""
NAMES = {
    "promoted": "Promoted",
    "rejected": "Rejected",
    "waiting": "Waiting",
    "skipped": "Skipped",
    "nothing to do": "NothingToDo",
}
"""Names of the final states; all of them are `Completed`, since a gate's no is an answer and not a crash."""


@flow(name="retrain", persist_result=False)
def retrain(fingerprint: str | None = None, patience: float = 0) -> State[dict[str, object]]:
    """Bring the champion up to date with data, code and parameters of the working directory.

    Args:
        fingerprint: the raw data that an event was about; data that a retraining has ended with is not trained again.
        patience: seconds to wait for a retraining that another process runs in this folder.
    """
    let_the_library_speak()
    try:
        outcome = _retrain(Layout(), fingerprint, patience)
    except RegraftError as error:  # it says what happened; a trace would only hide it
        create_markdown_artifact(key="outcome", markdown=f"# failed\n\n{error}")
        return Failed(message=str(error), data=error)
    create_markdown_artifact(key="outcome", markdown="\n".join([f"# {outcome.state}", "", *outcome.lines]))
    return Completed(name=NAMES[outcome.state], message=" ".join(outcome.lines), data=outcome.to_dict())


def _retrain(layout: Layout, fingerprint: str | None, patience: float) -> Outcome:
    with library.exclusive(layout, patience=patience):
        settings = parameters.load(layout)
        began_with = library.fingerprint_now(layout, settings)  # before the plan: what comes later is new data
        found = library.plan(layout, settings, fingerprint)
        if not found.steps:
            return library.remember(layout, settings, found, began_with)
        return _work(layout, settings, list(found.steps), began_with)


def _work(layout: Layout, settings: Settings, todo: list[str], fingerprint: str | None) -> Outcome:
    """Run the steps in order; each is done or nothing of it is, so that a killed run is simply run again."""
    wanted = [stage for stage in STAGES if stage in todo]
    ran = _bring_up([stage for stage in wanted if stage in LOOKING], layout, settings)

    # Whether the change of the data is worth the rest, and what training begins with.
    decided = None
    if rest := [stage for stage in wanted if stage not in LOOKING]:
        decided = decision.decide(layout, settings)
        if decided.action == "skip":
            return library.conclude(layout, settings, ran=ran, fingerprint=fingerprint, decision=decided)
        settings = decision.heed(layout, settings, decided)
        ran += _bring_up(rest, layout, settings)

    # The same bytes as the champion's, or a challenger that a person has rolled back: nothing to compare.
    judged = version = None
    if library.is_champion(layout, settings) is None and library.rolled_back(layout, settings) is None:
        judged = bounded(verdict, "verdict", settings.retrain)(layout, settings)
        version = bounded(register, "register", settings.retrain)(layout, settings)
        ran += ["verdict", "register"]
        if version is not None and settings.promote.auto:
            bounded(promote, "promote", settings.retrain)(layout, settings, str(version.number))
            ran.append("promote")

    folder: Path | None = None
    if library.is_champion(layout, settings) is not None:
        exported = bounded(export, "export", settings.retrain)(layout, settings)
        folder = exported.folder
        ran += ["export"] if exported.new else []
    return library.conclude(
        layout,
        settings,
        ran=ran,
        fingerprint=fingerprint,
        verdict=judged,
        version=version,
        export=folder,
        decision=decided,
    )


def _bring_up(stages: list[str], layout: Layout, settings: Settings) -> list[str]:
    """Run stages in order; return those that did something."""
    done = [bounded(TASKS[stage], stage, settings.retrain)(layout, settings) for stage in stages]
    return [each.stage for each in done if each.ran]
