"""Whether new data is worth a training: what differs from the champion's rows, and what `retrain.decide` makes of it.

Looked at between `validate` and `preprocess`, against the champion's own rows, so that small changes add up until they
are worth it. Parameters that make another adapter are always worth a training, and so is what cannot be compared.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from regraft.errors import MissingInput, RegraftError
from regraft.layout import Layout
from regraft.outputs import cache_of, outputs
from regraft.preprocess.difference import Moved, moved
from regraft.register.lookup import champion as find_champion
from regraft.register.lookup import version as find_version
from regraft.register.version import FORGET_TAG, Version
from regraft.settings import Settings

_MAKERS = ("model", "preprocess", "train")
_PARENT = ("parent", "parent_digest")
ROWS = "rows.parquet"
_SHOWN = 12  # values of a slice; `regraft data diff` shows all, and what the texts have that is new


@dataclass(frozen=True)
class Decision:
    """What a retraining does about the present rows."""

    action: Literal["train", "continue", "skip"]
    """`continue`: training goes on from the champion's adapter."""
    lines: list[str] = field(default_factory=list)
    """Why, in words; empty where there is nothing to compare with."""
    champion: int | None = None
    difference: Moved | None = None
    afresh: bool = False
    """Whether the champion learnt what is to be forgotten, so that nothing may go on from it, or wait."""


def decide(layout: Layout, settings: Settings) -> Decision:
    """Compare the accepted rows with those that the champion was made from, and say what to do.

    A champion that learnt what is to be forgotten is replaced however little differs: few rows are taken out by
    `regraft data forget`, and what goes on from a tagged version is never promoted.

    Raises:
        ServiceUnavailable: the registry does not answer.
    """
    champion = find_champion(settings.register_, layout)
    if champion is None:
        return Decision("train")
    afresh = FORGET_TAG in champion.tags
    try:
        lineage = _lineage(champion)
        found = moved(_rows(layout, champion, lineage), layout.stage("validate") / ROWS)
    except RegraftError as error:
        said = f"The data cannot be compared with the champion's: {error.message}"
        return Decision("train", [said], champion.number, afresh=afresh)
    other = changed_parameters(lineage.get("params", {}), settings)
    action, why = judge(found, other, settings)
    if afresh:
        action, why = "train", f"Trained: version {champion.number} learnt from rows that are to be forgotten."
    said = f"Against the data of version {champion.number}: {found.told}"
    grown = [f"{name}: " + ", ".join(f"{v} {n:+,}" for v, n in values.items()) for name, values in found.slices.items()]
    said += "".join(f"; {each}" for each in grown if each.count(",") < _SHOWN) + "."
    return Decision(action, [said, why] if found.touched or afresh else [], champion.number, found, afresh)


def foreseen(layout: Layout, settings: Settings, todo: Collection[str]) -> list[str]:
    """Return in words what would be decided now; nothing where `validate` has to run first, or nothing is prepared."""
    if not {"preprocess", "train"} & set(todo) or {"model", "validate"} & set(todo):
        return []
    return decide(layout, settings).lines


def heed(layout: Layout, settings: Settings, decision: Decision) -> Settings:
    """Write what a decision asks of the training into `params.yaml`, and return the parameters as they are then.

    Only with `retrain.decide.continue_below` above 0, and where rows differ or the champion is to be forgotten: else the
    parent stays as it is.

    Raises:
        ParamsError: `params.yaml` has no line for the parent.
        MissingInput, DamagedArtifact: the champion's files are gone, or not the registered ones.
    """
    found = decision.difference
    if settings.retrain.decide.continue_below == 0 or decision.action == "skip":
        return settings
    if not decision.afresh and (found is None or not found.touched):
        return settings
    from regraft.parent import set_parent
    from regraft.settings import load

    if decision.action == "continue" or settings.train.parent is not None:
        set_parent(layout, settings, str(decision.champion) if decision.action == "continue" else None)
    return load(layout)


def judge(found: Moved, other: list[str], settings: Settings) -> tuple[Literal["train", "continue", "skip"], str]:
    """Return the action for a difference, and the reason in a sentence.

    Args:
        found: from the champion's rows to the present ones.
        other: parameters that are not as they were for the champion.
        settings: with the thresholds, `retrain.decide`.
    """
    limits = settings.retrain.decide
    rows = found.touched
    share = rows / max(found.before, 1)
    told = f"{rows:,} {'row differs' if rows == 1 else 'rows differ'}, {share:.2%} of the champion's"
    if other or not rows:
        return "train", f"Trained: {', '.join(other) or 'the code'} changed since the champion."
    if rows < limits.min_rows or share < limits.min_share:
        return "skip", (
            f"Not trained: {told}; `retrain.decide` asks for {limits.min_rows:,} rows and {limits.min_share:.2%}. "
            "They are looked at again with the next change; `min_rows: 0` and `min_share: 0` train now."
        )
    if share <= limits.continue_below:
        return "continue", f"Training goes on from the champion: {told}, at most {limits.continue_below:.2%}."
    return "train", f"Trained: {told}."


def changed_parameters(made: dict[str, Any], settings: Settings) -> list[str]:
    """Return the parameters of model, preparation and training that differ from a lineage's, but for the parent."""
    now = settings.model_dump(mode="json", by_alias=True)
    return [
        f"{section}.{name}"
        for section in _MAKERS
        for name in sorted({*now[section], *(made.get(section) or {})} - set(_PARENT))
        if now[section].get(name) != (made.get(section) or {}).get(name)
    ]


def rows_of(layout: Layout, settings: Settings, which: str) -> Path:
    """Return the accepted rows that a version was made from, found in the clone or in DVC's local cache.

    Args:
        layout: the clone.
        settings: its parameters.
        which: a number, an alias or the start of an identity.

    Raises:
        MissingInput: there is no such version, or its rows are gone.
        DamagedArtifact: its files are not those that were registered.
    """
    version = find_version(settings.register_, layout, which)
    return _rows(layout, version, _lineage(version))


def _lineage(version: Version) -> dict[str, Any]:
    from regraft.lineage import lineage

    return lineage(version)


def _rows(layout: Layout, version: Version, lineage: dict[str, Any]) -> Path:
    found = outputs(layout, cache_of(layout), lineage, "validate", ROWS)
    if not found:
        raise MissingInput(
            f"the rows of version {version.number} are neither in data/work/validate nor in DVC's cache",
            fix="`dvc fetch` them at the commit that `regraft lineage` names",
        )
    return found[0]
