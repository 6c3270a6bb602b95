"""What made a version, and the way back: `lineage.json`.

    describe(layout, evidence, code)   what registering writes
    lineage(version)                   what a registered version says
    diff(first, second)                what differs between two of them, by section

It holds nothing that changes between two registrations of the same thing: no time, no host, no user.
"""

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from regraft.artifacts import digest_bytes, digest_file, dir_digest, read_json, write_json
from regraft.errors import DamagedArtifact, GateRefused, ParamsError, RegraftError
from regraft.layout import STAGES, Layout
from regraft.params import read_yaml
from regraft.register.evidence import Evidence
from regraft.register.fetch import read_file
from regraft.register.version import Version

NAME = "lineage.json"
PACKAGES = (
    "regraft", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors", "datasets",
    "pyarrow", "numpy", "great-expectations", "dvc", "mlflow",
)  # fmt: skip
"""Packages whose versions can change a result; the digest of the lock covers all others."""
_Json = dict[str, Any]


def describe(layout: Layout, evidence: Evidence, code: _Json, *, resolved: _Json | None = None) -> _Json:
    """Gather the lineage of the clone's present adapter.

    Args:
        layout: the clone.
        evidence: its reports and verdict, checked.
        code: from `snapshot.keep_code`.
        resolved: all parameters with their defaults; read from `params.yaml` where not given.

    Raises:
        GateRefused: `params.yaml` is not what `dvc.lock` says the stages ran with.
        ParamsError: `params.yaml` is wrong.
    """
    if resolved is None:
        from regraft.settings import load

        resolved = load(layout).model_dump(mode="json", by_alias=True)
    reports = evidence.reports
    model, rows, data, train = (reports[stage] for stage in STAGES[:4])
    pinned = ("source", "base", "revision", "digest", "tokenizer_digest", "architecture", "parameters")
    return {
        "schema_version": 1,
        "identity": {"digest": evidence.identity, **evidence.parts},
        "data": {
            "raw": rows.get("files", {}),
            "validated": {
                "digest": rows["data_digest"],
                "rows": rows.get("rows_out"),
                "quarantined": rows.get("rows_quarantined"),
            },
            "processed": {
                "train_digest": data["train_digest"],
                "holdout_digest": data["holdout_digest"],
                "counts": data.get("counts", {}),
            },
            "stages": {stage: dir_digest(layout.stage(stage)) for stage in STAGES},
        },
        "dvc": dvc_record(layout),
        "code": code,
        "params": resolved,
        "base": {
            **{name: model.get(name) for name in pinned},
            "quantization": resolved.get("model", {}).get("quantization"),
        },
        "environment": {
            "lock": digest_file(lock) if (lock := layout.root / "requirements.lock").is_file() else None,
            "python": platform.python_version(),
            "packages": packages(),
            "hardware": _hardware(layout),
        },
        "seed": train.get("seed"),
        "parent": None,
        "reports": {stage: digest_file(layout.stage(stage) / "report.json") for stage in STAGES},
        "verdict": {"digest": evidence.verdict_digest, **evidence.verdict.to_dict()},
    }


def dvc_record(layout: Layout) -> _Json:
    """Return what `dvc.lock` says of each stage: md5 of deps and outs, and the parameters that it ran with.

    Raises:
        GateRefused: `params.yaml` says something else now, so it is not what made these outputs.
    """
    path = layout.root / "dvc.lock"
    if not path.is_file():
        return {"stages": None, "reason": "there is no dvc.lock: the stages were not run by DVC"}
    try:
        stages = read_yaml(path).get("stages") or {}
        present = read_yaml(layout.params)
    except ParamsError as error:
        return {"stages": None, "reason": f"dvc.lock or params.yaml cannot be read: {error.message}"}
    found: _Json = {}
    changed = []
    for stage, locked in stages.items():
        if stage not in STAGES:
            continue
        params = locked.get("params", {}).get(layout.params.name, {})
        changed += [name for name, value in params.items() if _at(present, name) != value and name not in changed]
        found[stage] = {
            "deps": {each["path"]: each.get("md5") for each in locked.get("deps", [])},
            "outs": {each["path"]: each.get("md5") for each in locked.get("outs", [])},
            "params": params,
        }
    if changed:
        raise GateRefused(
            f"params.yaml was changed since the stages ran: {', '.join(changed)}",
            fix="`regraft retrain`, or take the change back",
        )
    return {"stages": found}


def _at(params: _Json, name: str) -> Any:
    """The value at `train` or `model.base`; None where there is none (DVC records it as null, too)."""
    current: Any = params
    for part in name.split("."):
        current = current.get(part) if isinstance(current, dict) else None
    return current


def packages() -> dict[str, str | None]:
    """Return the installed version of each package whose version can change a result; null where it is not there."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _hardware(layout: Layout) -> _Json:
    """What training ran on, as `train` measured it; else the kind of this machine."""
    try:
        measured = read_json(layout.measurements("train"))
    except RegraftError:
        measured = {}
    if isinstance(measured, dict) and isinstance(measured.get("hardware"), dict):
        return dict(measured["hardware"])
    return {"machine": platform.machine(), "system": sys.platform, "measured": False}


def lineage(version: Version) -> _Json:
    """Return the lineage of a registered version, checked against its manifest.

    Raises:
        DamagedArtifact: its bytes are not those that were registered.
        MissingInput: the registry has lost it.
        ServiceUnavailable: a server does not answer.
    """
    manifest = read_file(version, "manifest.json")
    if digest_bytes(manifest) != version.manifest_digest:
        raise DamagedArtifact(f"{version.label()}: its manifest differs from the digest in its tag")
    data = read_file(version, NAME)
    if digest_bytes(data) != json.loads(manifest)["files"].get(NAME, {}).get("sha256"):
        raise DamagedArtifact(f"{version.label()}: {NAME} differs from its manifest")
    found = json.loads(data)
    if not isinstance(found, dict) or found.get("schema_version") != 1:
        raise DamagedArtifact(f"{version.label()}: {NAME} has a schema_version that this Regraft cannot read")
    return found


def diff(first: _Json, second: _Json) -> _Json:
    """Return what differs between two lineages.

    Returns:
        For each section that differs, {path: [value in first, value in second]} (null where it is absent); for `raw`,
        {file: {rows: [n, m], changed: added | removed | content}}. Equal lineages give {}.
    """
    found: _Json = {}
    raw = _raw(first.get("data", {}).get("raw", {}), second.get("data", {}).get("raw", {}))
    if raw:
        found["raw"] = raw
    for section in sorted(set(first) | set(second)):
        old, new = _flat(first.get(section)), _flat(second.get(section))
        changed = {
            path: [old.get(path), new.get(path)]
            for path in sorted(set(old) | set(new))
            if old.get(path) != new.get(path) and not (section == "data" and path.startswith("raw."))
        }
        if changed:
            found[section] = changed
    return found


def _raw(first: _Json, second: _Json) -> _Json:
    found: _Json = {}
    for name in sorted(set(first) | set(second)):
        old, new = first.get(name), second.get(name)
        if old is not None and new is not None and old.get("sha256") == new.get("sha256"):
            continue
        changed = "added" if old is None else "removed" if new is None else "content"
        found[name] = {"changed": changed, "rows": [(old or {}).get("rows"), (new or {}).get("rows")]}
    return found


def _flat(value: Any, path: str = "") -> _Json:
    if not isinstance(value, dict) or not value:
        return {} if value is None and not path else {path or "value": value}
    found: _Json = {}
    for name, inner in value.items():
        found.update(_flat(inner, f"{path}.{name}" if path else str(name)))
    return found


def write(folder: Path, content: _Json) -> None:
    """Write `lineage.json` into a version's folder."""
    write_json(folder / NAME, content)
