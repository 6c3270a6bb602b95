"""Scores that were made before: an adapter is scored on a holdout once, whoever asks.

The key covers everything that answers depend on: adapter, holdout, base, parameters, and the code that scores. A stored
score whose bytes differ from its manifest is made again.
"""

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from regraft.artifacts import commit_dir, digest_file, digest_json, read_json, verify_dir
from regraft.errors import DamagedArtifact, MissingInput, RegraftError, StageFailed
from regraft.evaluate.params import EvaluateParams
from regraft.evaluate.report import EvaluateReport
from regraft.layout import Layout
from regraft.model.params import Quantization

log = logging.getLogger("regraft.evaluate")
_SCORING = (
    "chat.py",
    "evaluate/answers.py",
    "evaluate/evaluate.py",
    "evaluate/holdout.py",
    "evaluate/preferences.py",
    "evaluate/score.py",
)
_LOADING = ("model/adapter.py", "model/load.py")
_LIBRARIES = ("bitsandbytes", "peft", "tokenizers", "torch", "transformers")
_GRACE = 20.0  # seconds that a scoring process has to end before it is killed


@dataclass(frozen=True)
class Stored:
    """One adapter's score on one holdout."""

    report: Path
    answers: Path


def params_digest(params: EvaluateParams, quantization: Quantization) -> str:
    """Return the digest of the parameters that answers depend on (batch sizes, threads and slices are none)."""
    answers = params.model_dump(mode="json", include={"max_new_tokens", "max_rows", "json_answers", "gpu_memory"})
    return digest_json({"evaluate": answers, "quantization": quantization.model_dump(mode="json")})


def code_digest() -> str:
    """Return the digest of the modules that score and load, and of the versions of the numeric libraries."""
    package = Path(__file__).parent.parent
    modules = {name: digest_file(package / name) for name in (*_SCORING, *_LOADING)}
    return digest_json({"modules": modules, "libraries": {name: version(name) for name in _LIBRARIES}})


def score_key(*, adapter: str, holdout: str, base: str, params: str, code: str) -> str:
    """Return the name of a stored score: 16 hexadecimal digits of the digest of all that it depends on."""
    parts = {"adapter": adapter, "holdout": holdout, "base": base, "params": params, "code": code}
    return digest_json(parts)[:16]


def find(layout: Layout, key: str) -> Stored | None:
    """Return a stored score after checking its bytes; None where there is none, or a damaged one."""
    folder = layout.scores / key
    try:
        verify_dir(folder)
    except MissingInput:
        return None
    except DamagedArtifact as damage:
        log.warning("a stored score is made again: %s", damage)
        return None
    return _stored(folder)


def keep(layout: Layout, evaluated: Path, name: str) -> Stored:
    """Store one adapter's score of an evaluation, so that it need not be made again when that adapter is champion.

    Raises:
        MissingInput, DamagedArtifact: the evaluation is not whole, or has no such adapter.
    """
    verify_dir(evaluated)
    report = EvaluateReport.load(evaluated / "report.json")
    if name not in report.adapters:
        raise MissingInput(f"{evaluated} has no score of an adapter `{name}`", fix="regraft evaluate")
    key = score_key(
        adapter=report.adapters[name],
        holdout=report.holdout_digest,
        base=report.base_digest,
        params=report.params_digest,
        code=report.code_digest,
    )
    if (found := find(layout, key)) is not None:
        return found
    with commit_dir(layout.scores / key) as folder:
        shutil.copyfile(evaluated / f"answers-{name}.parquet", folder / "answers-adapter.parquet")
        alone: dict[str, Any] = {"adapters": {"adapter": report.adapters[name]}}
        alone["scores"] = {"adapter": report.scores[name]}
        if report.preferences is not None:
            alone["preferences"] = {"adapter": report.preferences[name]}
        report.model_copy(update=alone).save(folder / "report.json")
    return _stored(layout.scores / key)


def scores(
    layout: Layout,
    params: EvaluateParams,
    quantization: Quantization,
    adapter: Path,
    *,
    echo: Callable[[str], None] | None = None,
) -> Stored:
    """Return an adapter's score on the present holdout and base: the stored one, or one made in a process of its own.

    Args:
        layout: the clone, with the stages `model` and `preprocess` up to date; its `params.yaml` holds `params`.
        params: the section `evaluate`.
        quantization: `model.quantization`.
        adapter: the adapter's folder.
        echo: gets each line that the process prints.

    Raises:
        StageFailed: scoring ended with an error; it carries the process's own message.
        MissingInput, DamagedArtifact: inputs are missing or damaged.
    """
    from regraft.evaluate.holdout import holdout_digest
    from regraft.model.adapter import adapter_digest
    from regraft.model.report import BaseReport

    key = score_key(
        adapter=adapter_digest(adapter),
        holdout=holdout_digest(layout.stage("preprocess")),
        base=BaseReport.load(layout.stage("model") / "report.json").digest,
        params=params_digest(params, quantization),
        code=code_digest(),
    )
    if (found := find(layout, key)) is not None:
        return found
    _run_score(layout, adapter.absolute(), layout.scores.absolute() / key, echo)
    if (made := find(layout, key)) is None:
        raise StageFailed(f"scoring left nothing at {layout.scores / key}", fix="run the same command again")
    return made


def _stored(folder: Path) -> Stored:
    return Stored(folder / "report.json", folder / "answers-adapter.parquet")


def _run_score(layout: Layout, adapter: Path, out: Path, echo: Callable[[str], None] | None) -> None:
    command = [sys.executable, "-m", "regraft.evaluate", "score", "--adapter", str(adapter), "--out", str(out)]
    process = subprocess.Popen(
        command,
        cwd=layout.root,
        env={**os.environ, "REGRAFT_CALLER": str(os.getpid()), "REGRAFT_RUN": out.name, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    last = ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.rstrip("\n") or last
            if echo is not None:
                echo(line.rstrip("\n"))
        code = process.wait()
    finally:
        _end(process)
    if code:
        raise _failure(layout, out.name, code, last)


def _end(process: "subprocess.Popen[str]") -> None:
    """Leave no process behind, whatever stopped the wait."""
    deadline = time.monotonic() + _GRACE
    if process.poll() is None:
        process.terminate()
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if process.poll() is None:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _failure(layout: Layout, run: str, code: int, last: str) -> RegraftError:
    try:
        outcome = read_json(layout.outcome("score"))
    except RegraftError:
        outcome = {}
    if outcome.get("run") == run and outcome.get("error"):
        error = outcome["error"]
        return StageFailed(error["message"], fix=error["fix"], stage="score", code=code)
    return StageFailed(
        f"scoring the champion ended with code {code}: {last}",
        fix="run the same command again; if memory was short, `dmesg` says so",
        stage="score",
        code=max(code, 1),
    )
