"""The way back: rebuild a registered version from its lineage in a clean checkout, and say how near it came."""

import json
import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from regraft import pipeline
from regraft.artifacts import digest_file, dir_digest, read_json
from regraft.errors import MissingInput, ParamsError, RegraftError
from regraft.gates.statistics import proportion
from regraft.layout import STAGES, Layout
from regraft.lineage import lineage, packages
from regraft.register.fetch import read_file
from regraft.register.lookup import version as find_version
from regraft.register.version import Version
from regraft.report import Report
from regraft.settings import Settings
from regraft.steps import present_parts

log = logging.getLogger("regraft.reproduce")
_CONFIDENCE = 0.95  # of the registered version's share of exact answers
_Json = dict[str, Any]


class Reproduced(Report):
    """What came out of the second making of a version."""

    version: int
    state: Literal["bit-equal", "metric-equal", "drifted"]
    """`bit-equal`: the same adapter, byte for byte. `metric-equal`: another one, whose share of exact answers on the same
    holdout lies in the registered one's 95 % interval (Wilson). `drifted`: neither."""
    differs: list[str] = Field(default_factory=list)
    """What differs, the earliest first: parts of the identity, stages, packages."""
    exact_match: dict[str, float | None]
    """Shares of exact answers: `registered`, its interval's `low` and `high`, and `rebuilt`."""
    folder: str
    """The checkout, with everything that was made."""

    def lines(self) -> list[str]:
        """The result in words."""
        told = {
            "bit-equal": "byte for byte the same adapter",
            "metric-equal": "another adapter, as good within the registered one's 95 % interval",
            "drifted": "another adapter, whose exact answers differ by more than chance explains",
        }[self.state]
        share = self.exact_match
        lines = [f"Version {self.version} was made again in {self.folder}: {self.state}, {told}."]
        if share["registered"] is not None and share["rebuilt"] is not None:
            lines.append(f"Exact answers: registered {share['registered']:.3f}, rebuilt {share['rebuilt']:.3f}.")
        return [*lines, *(f"differs: {each}" for each in self.differs)]


def reproduce(layout: Layout, settings: Settings, which: str, out: Path) -> Reproduced:
    """Check out the code of a version, run the pure stages on its data there, and compare with what was registered.

    Nothing is registered, and no cache is read: every stage runs. It takes as long as the version took.

    Args:
        layout: the clone whose registry has the version.
        settings: its parameters (only the registry's address counts; the stages run with the version's own).
        which: a number, an alias or the beginning of an identity.
        out: a folder that does not exist yet, outside the clone.

    Raises:
        MissingInput: no such version, or its code or data is not here.
        ParamsError: `out` exists, or lies in the clone.
        StageFailed, Busy, Preempted: a stage ended so over there.
    """
    version = find_version(settings.register_, layout, which)
    made = lineage(version)
    root, out = layout.root.resolve(), out.resolve()
    if out.exists() or out.is_relative_to(root):
        found = "it exists" if out.exists() else "it lies in the clone"
        raise ParamsError(f"--out {out}: {found}; expected a new folder outside {root}", fix="name another folder")
    _check_out(root, made["code"], version, out)
    there = Layout(out)
    _bring_data(root, out, made["data"]["raw"])
    for stage in STAGES:
        log.info("reproduce: %s", stage)
        if not pipeline.repro(there, stage, echo=lambda line: log.info("reproduce: %s", line)).ran:
            raise RegraftError(f"`{stage}` was not run in {out} but restored", fix="name another folder as --out")
    return _compare(version, made, there)


def _check_out(root: Path, code: _Json, version: Version, out: Path) -> None:
    commit, ref = code.get("commit"), code.get("ref")
    if not commit:
        raise MissingInput(f"{version.label()} was registered without its code: {code.get('reason', 'no commit')}")
    if _git(root, "cat-file", "-e", f"{commit}^{{commit}}").returncode:
        raise MissingInput(
            f"the code of {version.label()}, commit {commit}, is not in this clone",
            fix=f"git fetch <where it was registered> {ref}:{ref}",
        )
    top = Path(_git(root, "rev-parse", "--show-toplevel").stdout.strip())
    for command in (
        ["clone", "--quiet", "--no-checkout", str(top), str(out)],
        ["-C", str(out), "fetch", "--quiet", str(top), f"{ref}:{ref}"],
        ["-C", str(out), "checkout", "--quiet", "--detach", commit],
    ):
        done = _git(root, *command)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RegraftError(f"git cannot check {commit} out into {out}: {said}", fix="look at the folder and at git")
    if (out / ".dvc").is_dir():  # a shared cache would hand the old outputs back
        (out / ".dvc/config.local").write_text("[cache]\n    dir = cache\n", encoding="utf-8")


def _bring_data(root: Path, out: Path, raw: _Json) -> None:
    """Put the raw files that git did not keep in place, from the clone; each is checked by its digest."""
    missing = []
    for name, entry in raw.items():
        wanted, target = entry.get("sha256"), out / name
        if target.is_file() and digest_file(target) == wanted:
            continue
        if (root / name).is_file() and digest_file(root / name) == wanted:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target)
        else:
            missing.append(f"{name} (sha256 {str(wanted)[:16]})")
    foreign = [
        path
        for path in sorted((out / "data/raw").rglob("*"))
        if path.is_file() and str(path.relative_to(out)) not in raw
    ]
    for path in foreign:  # came with the code, was not part of the version's data
        path.unlink()
    if missing:
        raise MissingInput(
            f"raw files of that version are neither in its code nor here: {', '.join(missing)}",
            fix="bring them back under data/raw/, then run the same command with another --out",
        )


def _compare(version: Version, made: _Json, there: Layout) -> Reproduced:
    was, now = made["identity"], present_parts(there)
    differs = [
        f"{part}: {str(was.get(part))[:16]} was registered, {now[part][:16]} came out"
        for part in ("base", "tokenizer", "data", "params", "adapter")
        if was.get(part) != now[part]
    ]
    stages = made["data"].get("stages", {})
    differs += [f"the output of `{stage}`" for stage in STAGES if stages.get(stage) != dir_digest(there.stage(stage))]
    then = made.get("environment", {}).get("packages") or {}
    differs += [f"{name} {then.get(name)} then, {has} now" for name, has in packages().items() if then.get(name) != has]

    registered = _exact(json.loads(read_file(version, "reports/evaluate.json")))
    rebuilt = _exact(read_json(there.stage("evaluate") / "report.json"))
    share: dict[str, float | None] = {"registered": None, "low": None, "high": None, "rebuilt": None}
    state: Literal["bit-equal", "metric-equal", "drifted"] = "drifted"
    if registered is not None and rebuilt is not None:
        value, rows = registered
        interval = proportion(round(value * rows), rows, _CONFIDENCE)
        share = {"registered": value, "low": interval.low, "high": interval.high, "rebuilt": rebuilt[0]}
        same_rows = rebuilt[1] == rows
        state = "metric-equal" if same_rows and interval.low <= rebuilt[0] <= interval.high else "drifted"
    if was.get("adapter") == now["adapter"]:
        state = "bit-equal"
    return Reproduced(version=version.number, state=state, differs=differs, exact_match=share, folder=str(there.root))


def _exact(report: _Json) -> tuple[float, int] | None:
    overall = report.get("scores", {}).get("challenger", {}).get("overall", {})
    if "exact_match" not in overall:
        return None
    return float(overall["exact_match"]), int(overall["rows"])


def _git(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(
        ["git", "-c", "core.hooksPath=/dev/null", *arguments],
        cwd=folder,
        env={**inherited, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
