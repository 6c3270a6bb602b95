"""Checkpoints of training: whole or not at all, found again only by a run with the same inputs.

    CHECKPOINTS/current.json               {"key", "metrics"}: the run under way, for whoever follows it
    CHECKPOINTS/<16 hex of the key>/
        key.json                           the key and what it was made from
        metrics.jsonl                      live: one line for each logged step
        speed.jsonl                        live: tokens a second and memory at those steps; no two runs have the same
        step-000100/                       through commit_dir(): adapter, optimizer, scheduler, RNG states, progress
        finished.json                      once the stage's output was committed

The key digests everything that matters to the result, so a run with other parameters, data, base, code or library
versions looks into another folder.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regraft.artifacts import commit_dir, digest_json, hold, is_held, read_json, verify_dir, write_file, write_json
from regraft.errors import DamagedArtifact, MissingInput, ResumeRefused
from regraft.failpoints import failpoint

log = logging.getLogger("regraft.train")


class Checkpoints:
    """The checkpoints of one set of inputs."""

    def __init__(self, root: Path, inputs: Mapping[str, Any]) -> None:
        self.root = root
        self.inputs = json.loads(json.dumps(inputs))
        self.key = digest_json(self.inputs)
        self.folder = root / self.key[:16]

    @property
    def metrics(self) -> Path:
        """The live metrics, one JSON line for each logged step."""
        return self.folder / "metrics.jsonl"

    @property
    def speed(self) -> Path:
        """The live speed, one JSON line for each logged step; never part of a checkpoint."""
        return self.folder / "speed.jsonl"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder for this process, check whose it is, and point `current.json` at it.

        Raises:
            Busy: another process trains from the same inputs.
            ResumeRefused: the folder's key.json names other inputs; the message says which.
        """
        with hold(self.folder / "lock", f"training {self.key[:16]}"):
            expected = {"schema_version": 1, "key": self.key, "inputs": self.inputs}
            path = self.folder / "key.json"
            if path.exists():
                self._check_key(path, expected)
            else:
                self._say_what_changed()
                write_json(path, expected)
            write_json(self.root / "current.json", {"key": self.key, "metrics": str(self.metrics)})
            yield

    def newest(self) -> Path | None:
        """Return the newest checkpoint whose every byte is as it was written; damaged ones are passed over, aloud."""
        for folder in reversed(self._steps()):
            try:
                verify_dir(folder)
            except (DamagedArtifact, MissingInput) as error:
                log.warning("a damaged checkpoint is not used: %s", error.message)
            else:
                return folder
        return None

    def save(self, step: int, files: Mapping[str, bytes]) -> Path:
        """Write a checkpoint; the metrics so far go into it.

        Raises:
            RegraftError: the disk is full or the folder cannot be written.
        """
        failpoint("train.checkpoint")
        destination = self.folder / f"step-{step:06d}"
        with commit_dir(destination) as folder:
            for name, content in files.items():
                (folder / name).write_bytes(content)
            (folder / "metrics.jsonl").write_bytes(self.metrics.read_bytes())
        failpoint("train.checkpointed")
        return destination

    def rewind_metrics(self, checkpoint: Path | None) -> None:
        """Bring the live metrics back to what they were at a checkpoint (or to nothing)."""
        content = b"" if checkpoint is None else (checkpoint / "metrics.jsonl").read_bytes()
        present = self.metrics.read_bytes() if self.metrics.exists() else b""
        if present.startswith(content) and self.metrics.exists():
            with self.metrics.open("r+b") as file:  # in place: whoever follows the file keeps following it
                file.truncate(len(content))
        else:
            write_file(self.metrics, content)

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints of these inputs."""
        for folder in self._steps()[:-keep]:
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> None:
        """Note that the stage's output is committed, and remove the folders of other runs that had ended so."""
        write_json(self.folder / "finished.json", {"key": self.key})
        for marker in self.root.glob("*/finished.json"):
            if marker.parent != self.folder and not is_held(marker.parent / "lock"):
                shutil.rmtree(marker.parent, ignore_errors=True)

    def _steps(self) -> list[Path]:
        found = [folder for folder in self.folder.glob("step-*") if folder.name.removeprefix("step-").isdigit()]
        return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))

    def _check_key(self, path: Path, expected: dict[str, Any]) -> None:
        found = read_json(path)
        if found == expected:
            return
        changes = differences(found.get("inputs") if isinstance(found, dict) else None, self.inputs) or ["key"]
        raise ResumeRefused(
            f"the checkpoints in {self.folder} were made from other inputs: {'; '.join(changes)}",
            fix=f"to start afresh: rm -r {self.folder}",
        )

    def _say_what_changed(self) -> None:
        """Where another run was under way, say why its checkpoints are not used."""
        try:
            previous = self.root / read_json(self.root / "current.json")["key"][:16]
            found = read_json(previous / "key.json")["inputs"]
        except (MissingInput, DamagedArtifact, KeyError, TypeError):
            return
        if not (previous / "finished.json").exists():
            changes = "; ".join(differences(found, self.inputs))
            log.warning("training starts afresh, the unfinished run in %s was of other inputs: %s", previous, changes)


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Name what differs between two JSON values, one line for each leaf: `train.rank: 8, now 16`."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line
            for key in sorted({*before, *after})
            for line in differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if before == after else [f"{path or 'inputs'}: {_short(before)}, now {_short(after)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
