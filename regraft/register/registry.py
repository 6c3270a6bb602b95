"""`register`: an adapter and its evidence become one model version, however often and wherever it is tried.

Everything is uploaded and read back first; then one call creates the version together with all of its tags. So a
version is either whole or not there, and a killed `register` leaves at most a run and a logged model without a
version, which the next one takes up. Two machines that register the same thing at once both create one; the later
sees the earlier and withdraws its own.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from regraft.artifacts import commit_dir, dir_digest, write_file, write_json
from regraft.errors import DamagedArtifact, GateRefused, MissingInput, ServiceUnavailable
from regraft.failpoints import failpoint
from regraft.gates.profile import NAME as PROFILE
from regraft.gates.profile import profile
from regraft.gates.verdict import VERDICT
from regraft.layout import STAGES, Layout
from regraft.lineage import describe, write
from regraft.register import lookup
from regraft.register.clean import ancestor_of, list_of_stages, present_list
from regraft.register.evidence import ANSWERS, Evidence, gather
from regraft.register.fetch import VERDICTS, check_bundle
from regraft.register.params import RegisterParams
from regraft.register.service import Answer, Service, waited_hold
from regraft.register.store import sqlite_file, store_uri
from regraft.register.version import CHALLENGER, COMPLETE, FORGET_TAG, LIST_TAG, PREFIX, Version, local_folder
from regraft.snapshot import keep_code

AGAIN = "regraft register"
_BATCH = 100  # parameters or tags in one call, MLflow's limit


def register(
    params: RegisterParams, *, layout: Layout, verdict_dir: Path | None = None, resolved: dict[str, Any] | None = None
) -> Version:
    """Register the clone's present adapter, and point the alias `challenger` at it.

    Equal content gives the version that is there already (`new` is False); its verdict is brought up to date.

    Args:
        params: the section `register`.
        layout: the clone; every stage has run.
        verdict_dir: where the verdict is; `layout.verdict` unless given.
        resolved: all parameters with their defaults; read from `params.yaml` where not given.

    Raises:
        GateRefused: the verdict is against it, missing, unreadable or about something else. A verdict against it is
            kept on its MLflow run, with the tag `regraft.verdict=refused`; there is no version.
        MissingInput: a stage has not run.
        DamagedArtifact: bytes differ from their digests.
        ServiceUnavailable: MLflow does not answer; the same command can be repeated.
        Busy: another process of this clone has been registering for five minutes.
    """
    evidence = gather(layout, verdict_dir or layout.verdict)
    listed = list_of_stages(layout)
    if sqlite_file(store_uri(params, layout)) is not None:  # milliseconds, and mlflow is not imported
        for known in lookup.versions(params, layout):
            if known.complete and known.identity == evidence.identity and CHALLENGER in known.aliases:
                same = _says(known, evidence) and listed in (None, known.tags.get(LIST_TAG))
                if evidence.passed and same and FORGET_TAG not in known.tags:
                    return known
                break
    service = Service.of(params, layout, again=AGAIN)
    with waited_hold(layout.lock("register"), "registering"):
        if not evidence.passed:
            _refuse(service, params, layout, evidence)
        found = service.repeated(lambda: _present(service, params, evidence))
        if found is None:
            bundle = _bundle(layout, evidence, resolved)
            found = service.repeated(lambda: _create(service, params, layout, evidence, bundle, listed))
            shutil.rmtree(bundle, ignore_errors=True)
        version = found
        return service.repeated(lambda: _point(service, _cleared(service, version, layout, listed), evidence, listed))


def _present(service: Service, params: RegisterParams, evidence: Evidence) -> Version | None:
    """The complete version of this identity; later ones, made by two machines at once, are withdrawn."""
    found = [each for each in service.versions(params.model_name, evidence.identity) if each.complete]
    for extra in found[1:]:
        if not extra.aliases:
            service.ask("delete_model_version", extra.name, str(extra.number))
    return found[0] if found else None


def _create(
    service: Service, params: RegisterParams, layout: Layout, evidence: Evidence, bundle: Path, listed: str | None
) -> Version:
    """Upload, read back, and create the version in one call; returns the one that won."""
    won = _present(service, params, evidence)
    if won is not None:
        return won
    manifest = dir_digest(bundle)
    run = evidence_run(service, params, layout, evidence)
    source, model = _upload(service, run, evidence, bundle, manifest)
    if service.model(params.model_name) is None:
        try:
            service.ask("create_registered_model", params.model_name)
        except Answer as answer:
            if answer.code != "RESOURCE_ALREADY_EXISTS":
                raise
    tags = {**evidence.tags(), f"{PREFIX}manifest": manifest, COMPLETE: "true"}
    if listed is not None:
        tags[LIST_TAG] = listed
    failpoint("register.version")
    created = service.ask(
        "create_model_version", params.model_name, source, run_id=run.info.run_id, tags=tags, model_id=model
    )
    failpoint("register.versioned")
    won = _present(service, params, evidence)
    if won is None:
        raise service.unavailable("the version that was created cannot be found")
    return replace(won, new=won.number == int(created.version))


def _point(service: Service, version: Version, evidence: Evidence, listed: str | None) -> Version:
    """Bring the version's verdict up to date and point `challenger` at it.

    The list of what is to be forgotten may have grown without a row of the training data on it: the same version is made with it.
    """
    if listed is not None and version.tags.get(LIST_TAG) != listed:
        service.ask("set_model_version_tag", version.name, str(version.number), LIST_TAG, listed)
        version = replace(version, tags={**version.tags, LIST_TAG: listed})
    if not _says(version, evidence):
        attach_verdict(service, version, evidence)
        version = replace(version, tags={**version.tags, **evidence.verdict_tags()})
    failpoint("register.alias")
    if CHALLENGER not in version.aliases:
        service.ask("set_registered_model_alias", version.name, CHALLENGER, str(version.number))
        version = replace(version, aliases=tuple(sorted({*version.aliases, CHALLENGER})))
    failpoint("register.done")
    return version


def _cleared(service: Service, version: Version, layout: Layout, listed: str | None) -> Version:
    """Take the tag `regraft.forget` off a version that came out the same without what is to be forgotten.

    `regraft data forget` tags a version where it cannot tell what it was trained on. The present list was applied and the
    training data stayed the same: none of them was in it.
    """
    if FORGET_TAG not in version.tags or listed is None or listed != present_list(layout):
        return version
    if ancestor_of(version, service.versions(version.name)) is not None:
        return version
    service.ask("delete_model_version_tag", version.name, str(version.number), FORGET_TAG)
    return replace(version, tags={key: value for key, value in version.tags.items() if key != FORGET_TAG})


def _says(version: Version, evidence: Evidence) -> bool:
    """Whether a version's tags name this verdict, all of them."""
    return all(version.tags.get(key) == value for key, value in evidence.verdict_tags().items())


def attach_verdict(service: Service, version: Version, evidence: Evidence) -> None:
    """Put another verdict beside a version's files, then name it in the version's tags."""
    local = local_folder(version.source)
    name = f"{evidence.verdict_digest[:16]}.json"
    if local is not None:
        write_file(local / VERDICTS / name, evidence.verdict_data)
    else:
        service.upload(version.source, VERDICTS, name, evidence.verdict_data)
    # The digest first: between the calls the verdict is one that does not match its tag, which is a "no".
    tags = evidence.verdict_tags()
    for key in (f"{PREFIX}verdict_digest", f"{PREFIX}judged_against", f"{PREFIX}verdict"):
        failpoint("register.verdict")
        service.ask("set_model_version_tag", version.name, str(version.number), key, tags[key])


def _refuse(service: Service, params: RegisterParams, layout: Layout, evidence: Evidence) -> None:
    """Keep a verdict that is against the adapter where it can be found, and raise."""
    reasons = evidence.verdict.reasons or ["no reason given"]
    message = "the verdict is against this adapter: " + "; ".join(reasons)

    def keep() -> str:
        run = evidence_run(service, params, layout, evidence)
        for version in service.versions(params.model_name, evidence.identity):
            if version.complete and not _says(version, evidence):
                attach_verdict(service, version, evidence)
        return str(run.info.run_id)

    try:
        run_id = service.repeated(keep)
    except ServiceUnavailable as error:
        raise GateRefused(f"{message}\n  (not kept in MLflow: {error.message})", fix=error.fix) from error
    raise GateRefused(f"{message}\n  (kept as MLflow run {run_id})", fix="`regraft status` shows the verdict")


def evidence_run(service: Service, params: RegisterParams, layout: Layout, evidence: Evidence) -> Any:
    """Return the MLflow run of this training, with parameters, final metrics, reports, verdict and tags on it.

    The run is the one that followed the training live (tag `regraft.training`), or one of the same adapter, or a new
    one, which then gets the loss curve from the training's own file. What is there already is not logged again.
    """
    from regraft import tracking

    experiment = service.experiment(params.experiment)
    key = tracking.training_key(layout)
    run = service.find_run(experiment, {f"{PREFIX}identity": evidence.identity})
    if run is None and key is not None:
        run = service.find_run(experiment, {tracking.TAG: key})
    if run is None:
        failpoint("register.run")
        tags = {"mlflow.runName": f"train {evidence.identity[:8]}", f"{PREFIX}identity": evidence.identity}
        run = service.ask("create_run", experiment, tags=tags | ({tracking.TAG: key} if key else {}))
    run_id = run.info.run_id
    tracking.replay(service, run_id, layout.stage("train") / "metrics.jsonl")

    from mlflow.entities import Metric, Param, RunTag

    logged = {name: str(value)[:500] for name, value in _flat_params(layout, evidence).items()}
    new = [Param(name, value) for name, value in sorted(logged.items()) if name not in run.data.params]
    for start in range(0, len(new), _BATCH):
        service.ask("log_batch", run_id, params=new[start : start + _BATCH])
    last = int(evidence.reports["train"].get("steps", 0))
    at = run.info.start_time
    metrics = [
        Metric(name, value, at, last)
        for name, value in sorted(evidence.metrics().items())
        if run.data.metrics.get(name) != value
    ]
    service.ask("log_batch", run_id, metrics=metrics, tags=[RunTag(k, v) for k, v in evidence.tags().items()])
    with commit_dir(layout.work / "run-evidence") as folder:
        _reports(layout, folder)
        (folder / VERDICT).write_bytes(evidence.verdict_data)
    service.transfer(service.client.log_artifacts, run_id, str(layout.work / "run-evidence"), "evidence")
    shutil.rmtree(layout.work / "run-evidence", ignore_errors=True)
    if run.info.status == "RUNNING":
        service.ask("set_terminated", run_id, "FINISHED")
    return run


def _flat_params(layout: Layout, evidence: Evidence) -> dict[str, Any]:
    """The sections that stages read, as `train.rank: 16`."""
    from regraft.params import read_yaml

    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, f"{path}.{name}" if path else str(name))
        else:
            found[path] = value if isinstance(value, str) else json.dumps(value)

    walk({name: value for name, value in read_yaml(layout.params).items() if name in (*STAGES, "data")}, "")
    return found


def _bundle(layout: Layout, evidence: Evidence, resolved: dict[str, Any] | None) -> Path:
    """Write a version's files into one folder with a manifest."""
    content = describe(layout, evidence, keep_code(layout.root), resolved=resolved)
    bundle = layout.work / "bundle"
    with commit_dir(bundle) as folder:
        shutil.copytree(layout.stage("train") / "adapter", folder / "adapter")
        _reports(layout, folder / "reports")
        shutil.copyfile(layout.stage("evaluate") / ANSWERS, folder / "answers.parquet")
        write_json(folder / PROFILE, profile(layout.stage("validate") / "rows.parquet").to_dict())
        (folder / VERDICT).write_bytes(evidence.verdict_data)
        write(folder, content)
    return bundle


def _reports(layout: Layout, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for stage in STAGES:
        shutil.copyfile(layout.stage(stage) / "report.json", folder / f"{stage}.json")


def _upload(service: Service, run: Any, evidence: Evidence, bundle: Path, manifest: str) -> tuple[str, str]:
    """Upload the bundle into a logged model of the run and read it back; a leftover of a killed attempt is reused.

    Returns:
        Where it lies and the logged model's id.
    """
    wanted = {"regraft.identity": evidence.identity, "regraft.manifest": manifest}
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in wanted.items())
    found = service.ask("search_logged_models", [run.info.experiment_id], query, max_results=1)
    model = (
        found[0]
        if found
        else service.ask(
            "create_logged_model", run.info.experiment_id, name="adapter", source_run_id=run.info.run_id, tags=wanted
        )
    )
    failpoint("register.artifacts")
    service.transfer(service.client.log_model_artifacts, model.model_id, str(bundle))
    failpoint("register.uploaded")
    try:
        service.read_back(
            model.artifact_location, lambda folder: check_bundle(folder, manifest, "the uploaded adapter")
        )
    except (DamagedArtifact, MissingInput):
        service.ask("delete_logged_model", model.model_id)  # the next attempt begins with an empty one
        raise
    service.ask("finalize_logged_model", model.model_id, "READY")
    return str(model.artifact_location), str(model.model_id)
