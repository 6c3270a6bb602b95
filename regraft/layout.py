"""Where everything lies in a clone: one place that knows the paths."""

from dataclasses import dataclass
from pathlib import Path

STAGES = ("model", "validate", "preprocess", "train", "evaluate")
"""The pure stages of `dvc.yaml`, in the order in which they run."""


@dataclass(frozen=True)
class Layout:
    """Paths of one clone; `root` holds `params.yaml` and `dvc.yaml`."""

    root: Path = Path()

    @property
    def params(self) -> Path:
        """The parameters of every stage."""
        return self.root / "params.yaml"

    @property
    def work(self) -> Path:
        """What stages make; safe to delete."""
        return self.root / "data/work"

    def stage(self, name: str) -> Path:
        """The committed output folder of a pure stage."""
        return self.work / name

    @property
    def docs(self) -> Path:
        """The HTML data docs of `validate` (they carry a time, so no stage depends on them)."""
        return self.work / "docs"

    def outcome(self, stage: str) -> Path:
        """How the last run of a stage ended: its own exit code and error."""
        return self.work / "outcomes" / f"{stage}.json"

    def lock(self, name: str) -> Path:
        """The lock that one run of a stage, or of the whole job (`retrain`), holds."""
        return self.work / "locks" / f"{name}.lock"

    def measurements(self, stage: str) -> Path:
        """Times, memory and hardware of a stage's last run; never an input of anything."""
        return self.work / "measurements" / f"{stage}.json"

    def cache(self, stage: str) -> Path:
        """What a stage keeps to be faster next time; safe to delete, and no output."""
        return self.work / "cache" / stage

    @property
    def checkpoints(self) -> Path:
        """Training checkpoints, one folder for each digest of everything that matters to training."""
        return self.work / "checkpoints"

    @property
    def scores(self) -> Path:
        """Scores of adapters on holdouts, one folder for each pair of digests."""
        return self.work / "scores"

    @property
    def verdict(self) -> Path:
        """The last verdict: champion against challenger."""
        return self.work / "verdict"

    @property
    def exports(self) -> Path:
        """Published exports, one folder for each version's identity, and the pointer `latest`."""
        return self.root / "data/exports"
