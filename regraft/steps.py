"""The steps of a retraining, each a thin, idempotent call of the library: done twice, the second changes nothing.

Stages measure (through DVC). `judge_and_save` compares with the champion of this moment. `register_challenger`,
`promote_if_passed` and `export_version` change the world, and each looks at the verdict again where it does so.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from regraft import pipeline, signals
from regraft.artifacts import read_json, write_json
from regraft.errors import DamagedArtifact, GateRefused, RegraftError
from regraft.gates.verdict import Verdict, save_verdict
from regraft.layout import Layout
from regraft.pipeline import StageResult
from regraft.register.lookup import champion as find_champion
from regraft.register.lookup import version as find_version
from regraft.register.lookup import versions as find_versions
from regraft.register.version import FORGET_TAG, Version, identity
from regraft.settings import Settings

if TYPE_CHECKING:
    from regraft.register.promote import Promotion

log = logging.getLogger("regraft.steps")


@dataclass(frozen=True)
class Exported:
    """A published export; `new` is False where it was there already."""

    version: int
    folder: Path
    new: bool


def bring_up(layout: Layout, settings: Settings, stage: str) -> StageResult:
    """Bring one pure stage up to date; training is followed in MLflow while it runs.

    Raises:
        StageFailed, Busy, Preempted: as `pipeline.repro`.
        MissingInput: what the stage reads is not there.
    """
    pipeline.require(layout, stage)
    with signals.forwarded():
        if stage != "train":
            result = pipeline.repro(layout, stage, echo=_said_by(stage))
        else:
            from regraft.tracking import MetricsTail

            with MetricsTail(settings.register_, layout):
                result = pipeline.repro(layout, stage, echo=_said_by(stage))
    log.info("%s: %s", stage, f"done in {result.seconds:.0f} s" if result.ran else "unchanged")
    return result


def present_parts(layout: Layout) -> dict[str, str]:
    """Return the parts of the identity of the adapter that the stages made.

    Raises:
        MissingInput, DamagedArtifact: there is no whole training.
    """
    report = read_json(layout.stage("train") / "report.json")
    names = ("adapter_digest", "base_digest", "tokenizer_digest", "dataset_digest", "params_digest")
    try:
        return dict(
            zip(("adapter", "base", "tokenizer", "data", "params"), (report[each] for each in names), strict=True)
        )
    except (KeyError, TypeError) as error:
        raise DamagedArtifact(f"the report of `train` lacks {error}", fix="regraft train") from error


def present_identity(layout: Layout) -> str | None:
    """Return the identity of the adapter that the stages made; None before the first training."""
    try:
        return identity(**present_parts(layout))
    except RegraftError:
        return None


def judge_and_save(layout: Layout, settings: Settings) -> Verdict:
    """Judge the present adapter against the present champion, and save the verdict under `data/work/verdict/`.

    The champion is scored on the present holdout first, in a process of its own, unless that was done before.

    Raises:
        ServiceUnavailable: the registry does not answer; that is not the same as having no champion.
        StageFailed: scoring the champion ended with an error.
    """
    from regraft.evaluate.store import keep
    from regraft.gates.run import champion_evidence, judge_run
    from regraft.register.fetch import fetch

    began = time.monotonic()
    champion = find_champion(settings.register_, layout)
    evidence = None
    if champion is not None:
        log.info("verdict: comparing with the champion, version %d", champion.number)
        files = fetch(champion, _files(layout, champion))
        evidence = champion_evidence(
            layout,
            settings.evaluate,
            settings.model.quantization,
            adapter=files / "adapter",
            base=champion.base_digest,
            answers=files / "answers.parquet",
            label=f"the champion (version {champion.number})",
        )
        evidence = replace(evidence, forgets=FORGET_TAG in champion.tags and _is_clean(layout, settings))
    verdict = judge_run(layout, settings.gates, evidence)
    save_verdict(verdict, layout.verdict)
    if verdict.passed:  # as champion it need not be scored on this holdout again
        keep(layout, layout.stage("evaluate"), "challenger")
    _took(layout, "verdict", began)
    log.info("verdict: %s", "passed" if verdict.passed else "refused")
    return verdict


def register_challenger(layout: Layout, settings: Settings) -> Version | None:
    """Register the present adapter with its evidence; None where the verdict is against it (kept on its MLflow run).

    Raises:
        GateRefused: there is no verdict about this adapter, or the evidence does not belong together.
        ServiceUnavailable, Busy: it can be repeated.
    """
    from regraft.register.evidence import gather
    from regraft.register.registry import register

    began = time.monotonic()
    against = not gather(layout, layout.verdict).passed
    try:
        version = register(settings.register_, layout=layout, resolved=settings.model_dump(mode="json", by_alias=True))
    except GateRefused as refusal:
        if not against:
            raise
        log.info("register: %s", refusal.message.splitlines()[-1].strip())
        return None
    _took(layout, "register", began)
    log.info("register: version %d%s", version.number, "" if version.new else " (it was there already)")
    return version


def promote_if_passed(layout: Layout, settings: Settings, which: str | int, reason: str | None = None) -> "Promotion":
    """Make a version the champion, if its verdict passed and was made against the present champion.

    Raises:
        GateRefused: it did not, or the champion has changed since.
        ServiceUnavailable, Busy: it can be repeated.
    """
    from regraft.register.promote import promote

    began = time.monotonic()
    done = promote(settings.register_, layout, which, reason=reason)
    _took(layout, "promote", began)
    log.info("promote: version %d %s the champion", done.version.number, "is now" if done.changed else "was already")
    return done


def export_version(
    layout: Layout, settings: Settings, which: str = "champion", *, remembering: bool = False
) -> Exported:
    """Merge a version into its base and publish the proved files, in a process of its own.

    `data/exports/latest` moves only to the champion's export; other versions lie beside it.

    Args:
        layout: the clone.
        settings: all parameters.
        which: a version number, an alias or the beginning of an identity.
        remembering: export it although it was trained on rows that are to be forgotten.

    Raises:
        GateRefused: the version never was the champion, and its verdict did not pass; or it was trained on rows that are
            to be forgotten.
        StageFailed: as the export's own process says; code 3 where the merged files differ too much, and nothing was
            published.
        MissingInput: there is no such version.
        Busy, Preempted: it can be repeated.
    """
    from regraft.export.certificate import verify_export
    from regraft.lineage import NAME
    from regraft.register.exportable import check_exportable
    from regraft.register.fetch import fetch

    version = find_version(settings.register_, layout, which)
    check_exportable(settings.register_, layout, version, remembering=remembering)
    champion = find_champion(settings.register_, layout)
    in_use = champion is not None and champion.number == version.number
    files = fetch(version, _files(layout, version))
    log.info("export: merging version %d and comparing the merged files with it", version.number)
    arguments = ["--adapter", str(files / "adapter"), "--lineage", str(files / NAME), "--identity", version.identity]
    arguments += ["--latest" if in_use else "--no-latest"]
    if champion is not None and champion.identity:
        arguments += ["--champion", champion.identity]
    with signals.forwarded():
        pipeline.run_module(layout, "export", arguments, echo=_said_by("export"))
    report = read_json(layout.stage("export") / "report.json")
    folder = layout.exports / str(report["folder"])
    verify_export(folder)
    log.info("export: %s%s", folder, " (it was there already)" if report["already_exported"] else "")
    return Exported(version.number, folder, not report["already_exported"])


def check_publishable(folder: Path, *, remembering: bool = False) -> None:
    """Look an export up in the registry of the clone that it lies in, before it is published; elsewhere nothing is known of it.

    Raises:
        GateRefused: its version was trained on rows that are to be forgotten, and `remembering` does not allow that.
        ServiceUnavailable: MLflow does not answer.
    """
    from regraft import settings
    from regraft.export.certificate import CERTIFICATE
    from regraft.register import exportable

    whole = folder.resolve()
    layout = Layout(whole.parents[2]) if len(whole.parents) > 2 else Layout()
    is_ours = (layout.root / "dvc.yaml").is_file() and layout.params.is_file() and layout.exports == whole.parent
    if not is_ours or not (whole / CERTIFICATE).is_file():
        return
    identity = str(read_json(whole / CERTIFICATE).get("identity"))
    exportable.check_publishable(settings.load(layout).register_, layout, identity, remembering=remembering)


def _is_clean(layout: Layout, settings: Settings) -> bool:
    """Whether the present adapter could replace a champion that is to forget: the gate is lowered for no other."""
    from regraft.register.clean import list_of_stages, present_list, tainted_ancestor

    if not present_list(layout) == list_of_stages(layout) == settings.data.forget:
        log.warning(
            "verdict: data.forget has changed since `validate` ran: the challenger may have learnt what it names"
        )
        return False
    ancestor = tainted_ancestor(settings.train.parent_digest, find_versions(settings.register_, layout))
    if ancestor is not None:
        log.warning("verdict: the challenger went on from version %d, which is to be forgotten", ancestor.number)
    return ancestor is None


def _took(layout: Layout, step: str, began: float) -> None:
    """Keep how long a step took, for the next plan."""
    write_json(layout.measurements(step), {"seconds": round(time.monotonic() - began, 2)})


def _files(layout: Layout, version: Version) -> Path:
    return layout.work / "versions" / version.identity[:16]


def _said_by(name: str) -> Callable[[str], None]:
    return lambda line: log.info("%s: %s", name, line.removeprefix(f"{name}: "))
