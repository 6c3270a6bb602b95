"""The whole job on the shipped data, timed: the first run, the second, a second batch, and what costs nothing.

    .venv/bin/python bench/job.py [--json bench/results/job.json]

Works in a temporary clone; about eight minutes on two idle cores. Times are wall seconds of whole commands, imports
included; commands that do nothing are run five times and the median is given.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "prefect", "mlflow", "dvc", "great-expectations")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="regraft-bench-") as scratch:
        clone = Path(scratch) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        figures = measure(clone)
    goals = [
        goal("first run, nothing cached, s", "at most", 300, figures["first_run_s"]),
        goal("second run, s", "at most", 4, figures["second_run_s"]),
        goal("dvc repro with nothing to do, s", "at most", 2, figures["dvc_nothing_s"]),
        goal("regraft --help, s", "at most", 0.5, figures["help_s"]),
        goal("stand-in base model, s", "at most", 60, figures["stages_s"]["model"]),
        goal("exact match of the base", "under", 0.05, figures["base"]["exact_match"]),
        goal("exact match of the adapter", "at least", 0.9, figures["first"]["exact_match"]),
        goal("exact match on unseen phrasings", "at least", 0.7, figures["first"]["unseen"]),
    ]
    result = {
        "figures": figures,
        "goals": goals,
        "hardware": {
            "cpu": cpu(),
            "cores": os.cpu_count(),
            "load_before": round(load, 2),
            "python": platform.python_version(),
        },
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "date": datetime.now(UTC).date().isoformat(),
    }
    for each in goals:
        print(f"{'ok ' if each['met'] else 'NO '} {each['name']:<36} {each['measured']:>8} ({each['wanted']})")
    for line in figures["second_batch"]["lines"]:
        print(f"    {line}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def measure(clone: Path) -> dict[str, Any]:
    """Run everything in a fresh clone."""
    figures: dict[str, Any] = {"first_run_s": timed(clone, "retrain")[0]}
    stages = sorted((clone / "data/work/outcomes").glob("*.json"))
    figures["stages_s"] = {path.stem: json.loads(path.read_text())["seconds"] for path in stages}
    report = json.loads((clone / "data/work/evaluate/report.json").read_text())["scores"]
    figures["base"] = scores(report["base"])
    figures["first"] = scores(report["challenger"])
    certificate = json.loads((clone / "data/exports/latest/certificate.json").read_text())
    figures["export"] = {check["name"]: check["measured"] for check in certificate["verdict"]["checks"]}
    figures["second_run_s"] = median(clone, "retrain")
    figures["help_s"] = median(clone, "--help")
    figures["status_s"] = median(clone, "status")
    figures["explain_s"] = median(clone, "retrain", "--explain")
    figures["dvc_nothing_s"] = statistics.median(timed(clone, "repro", program="dvc")[0] for _ in range(5))
    shutil.copyfile(clone / "data/later/2026-10.jsonl", clone / "data/raw/2026-10.jsonl")
    seconds, printed = timed(clone, "retrain", "--json")
    outcome = json.loads(printed)
    report = json.loads((clone / "data/work/evaluate/report.json").read_text())["scores"]
    figures["second_batch"] = {"seconds": seconds, "state": outcome["state"], "lines": outcome["lines"]} | scores(
        report["challenger"]
    )
    return figures


def scores(of: dict[str, Any]) -> dict[str, Any]:
    """Exact match overall, on seen and unseen phrasings, and by action."""
    phrasing = of["slices"]["phrasing"]
    return {
        "rows": of["overall"]["rows"],
        "exact_match": round(of["overall"]["exact_match"], 4),
        **{name: round(phrasing[name]["exact_match"], 4) for name in phrasing},
        "by_action": {name: round(one["exact_match"], 4) for name, one in of["slices"]["action"].items()},
    }


def timed(clone: Path, *arguments: str, program: str = "regraft") -> tuple[float, str]:
    """Run a command in the clone, with the clone's own code; wall seconds and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(clone), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    began = time.monotonic()
    done = subprocess.run(
        [BIN / program, *arguments], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    seconds = round(time.monotonic() - began, 2)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{program} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return seconds, done.stdout


def median(clone: Path, *arguments: str) -> float:
    """The median of five runs."""
    return statistics.median(timed(clone, *arguments)[0] for _ in range(5))


def goal(name: str, relation: str, limit: float, measured: float) -> dict[str, Any]:
    """A goal of issue 2 and whether it is met."""
    met = {"at most": measured <= limit, "under": measured < limit, "at least": measured >= limit}[relation]
    return {"name": name, "wanted": f"{relation} {limit}", "measured": measured, "met": met}


def cpu() -> str:
    """The processor's name, as far as the system tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
