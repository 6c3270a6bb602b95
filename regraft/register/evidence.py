"""What a version is registered with: reports, verdict and adapter, checked to be about one another.

The gate's answer is enforced again here: no readable verdict, one about another adapter, holdout or base, or a stage's
output that was made from other inputs than its neighbour, and nothing is registered.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.artifacts import MANIFEST, digest_bytes, digest_file, dir_digest, read_json, verify_dir
from regraft.errors import DamagedArtifact, GateRefused, MissingInput, RegraftError
from regraft.gates.verdict import VERDICT, Verdict, load_verdict
from regraft.layout import STAGES, Layout
from regraft.model.adapter import adapter_digest
from regraft.register.version import PREFIX, identity

RUN = "run"
"""The gate whose verdict counts: all gates of one run together (`regraft.gates.run`)."""
NO_CHAMPION = "none"
"""What a verdict's `champion` is where there was none."""
ANSWERS = "answers-challenger.parquet"
"""The challenger's answers in `evaluate`'s output; `answers.parquet` of the version."""


@dataclass(frozen=True)
class Evidence:
    """Everything about one trained adapter, read from one clone."""

    reports: dict[str, dict[str, Any]]
    """Each stage's `report.json`."""
    parts: dict[str, str]
    """The parts of the identity."""
    verdict: Verdict
    verdict_data: bytes
    """The verdict's file as it is."""

    @property
    def identity(self) -> str:
        """The version's identity."""
        return identity(**self.parts)

    @property
    def passed(self) -> bool:
        """Whether the verdict let it pass."""
        return self.verdict.passed

    @property
    def verdict_digest(self) -> str:
        """sha256 of the verdict's file."""
        return digest_bytes(self.verdict_data)

    def verdict_tags(self) -> dict[str, str]:
        """Tags that name the verdict; they change when the adapter is judged again."""
        return {
            f"{PREFIX}verdict": "passed" if self.passed else "refused",
            f"{PREFIX}verdict_digest": self.verdict_digest,
            f"{PREFIX}judged_against": self.verdict.judged.get("champion", ""),
        }

    def tags(self) -> dict[str, str]:
        """Tags of the version and of its run."""
        return {
            f"{PREFIX}identity": self.identity,
            f"{PREFIX}adapter_digest": self.parts["adapter"],
            f"{PREFIX}base_digest": self.parts["base"],
            f"{PREFIX}tokenizer_digest": self.parts["tokenizer"],
            f"{PREFIX}dataset_digest": self.parts["data"],
            f"{PREFIX}params_digest": self.parts["params"],
            f"{PREFIX}holdout_digest": str(self.reports["evaluate"]["holdout_digest"]),
            f"{PREFIX}data_digest": str(self.reports["validate"]["data_digest"]),
            **self.verdict_tags(),
        }

    def metrics(self) -> dict[str, float]:
        """The final figures, for MLflow: numbers at the top of each report, and every adapter's overall scores."""
        found = {}
        for stage in ("validate", "train", "evaluate"):
            found.update(_numbers(stage, self.reports[stage]))
        found.update(_numbers("preprocess", self.reports["preprocess"].get("counts", {})))
        for name, score in self.reports["evaluate"].get("scores", {}).items():
            found.update(_numbers(f"evaluate/{name}", score.get("overall", {})))
        for name, score in self.reports["evaluate"].get("preferences", {}).items():
            found.update(_numbers(f"evaluate/{name}/preferences", score.get("overall", {})))
        return found


def gather(layout: Layout, verdict_dir: Path) -> Evidence:
    """Read and cross-check the evidence of the clone's present adapter.

    Raises:
        MissingInput: a stage has not run.
        DamagedArtifact: bytes differ from their manifest, or a report is unreadable.
        GateRefused: there is no verdict about this adapter, or a stage's output does not belong to the others; the
            message lists everything that is wrong.
    """
    reports = {stage: _report(layout.stage(stage), whole=stage in ("train", "evaluate")) for stage in STAGES}
    model, rows, data, train, scores = (reports[stage] for stage in STAGES)
    adapter = adapter_digest(layout.stage("train") / "adapter")
    verdict, verdict_data = read_verdict(verdict_dir), (verdict_dir / VERDICT).read_bytes()
    judged = verdict.judged

    problems: list[str] = []

    def same(what: str, found: object, expected: object) -> None:
        if found != expected:
            problems.append(f"{what} is {_short(found)}, expected {_short(expected)}")

    try:
        same("the adapter's digest in the training report", train["adapter_digest"], adapter)
        same("the base that was trained on", train["base_digest"], model["digest"])
        same("the tokenizer that was trained with", train["tokenizer_digest"], model["tokenizer_digest"])
        same("the tokenizer that preprocess used", data["tokenizer_digest"], model["tokenizer_digest"])
        same("the data that was trained on", train["dataset_digest"], data["train_digest"])
        same("the adapter that was evaluated", scores["adapters"].get("challenger"), adapter)
        same("the holdout that was evaluated", scores["holdout_digest"], data["holdout_digest"])
        same("the base that was evaluated", scores["base_digest"], model["digest"])
        same("the gate of the verdict", verdict.gate, RUN)
        present = {
            "adapter": adapter,
            "base": model["digest"],
            "tokenizer": model["tokenizer_digest"],
            "data": data["train_digest"],
            "rows": data["rows_digest"],
            "holdout": data["holdout_digest"],
        }
        for name, digest in present.items():
            same(f"the {name} that the verdict is about", judged.get(name), digest)
        if "champion" not in judged:
            problems.append("the verdict does not say which champion it compared with")
        parts = {
            "adapter": adapter,
            "base": train["base_digest"],
            "tokenizer": train["tokenizer_digest"],
            "data": train["dataset_digest"],
            "params": train["params_digest"],
        }
        unread = [name for name in ("data_digest",) if name not in rows]
    except (KeyError, AttributeError, TypeError) as error:
        raise DamagedArtifact(f"a stage's report lacks {error}", fix="regraft retrain") from error
    problems += [f"the validation report lacks {name}" for name in unread]
    if problems:
        raise GateRefused(
            "the evidence is not about this adapter:\n" + "\n".join(f"  {each}" for each in problems),
            fix="`regraft retrain` brings every stage and the verdict up to date",
        )
    return Evidence(reports=reports, parts=parts, verdict=verdict, verdict_data=verdict_data)


def read_verdict(folder: Path) -> Verdict:
    """Read a verdict's folder; anything but a whole, readable verdict is a refusal."""
    try:
        return load_verdict(folder)
    except (RegraftError, OSError) as error:
        why = error.message if isinstance(error, RegraftError) else str(error)
        raise GateRefused(f"there is no readable verdict in {folder}: {why}", fix="regraft retrain") from error


def _report(folder: Path, *, whole: bool) -> dict[str, Any]:
    """Read a stage's report, checked against the manifest; with `whole`, every file of the stage is checked."""
    try:
        if whole:
            verify_dir(folder)
        else:
            dir_digest(folder)
        listed = read_json(folder / MANIFEST)["files"]["report.json"]["sha256"]
        if digest_file(folder / "report.json") != listed:
            raise DamagedArtifact(f"{folder / 'report.json'} differs from its manifest")
        report = read_json(folder / "report.json")
    except (FileNotFoundError, KeyError) as error:
        raise MissingInput(f"{folder} has no whole report: {error}", fix="regraft retrain") from error
    if not isinstance(report, dict):
        raise DamagedArtifact(f"{folder / 'report.json'} is not a report")
    return report


def _numbers(prefix: str, report: dict[str, Any]) -> dict[str, float]:
    return {
        f"{prefix}/{name}": float(value)
        for name, value in report.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "schema_version"
    }


def _short(value: object) -> str:
    return f"{value[:16]}..." if isinstance(value, str) and len(value) > 20 else repr(value)
