"""A clone of this project with little data and little settings, in which the whole job takes seconds of computing."""

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
VERBS = {"where is": "track", "please cancel": "cancel", "send back": "return", "pay me for": "refund"}
ITEMS = ("lamp", "sofa", "desk", "chair", "kettle", "mirror", "carpet", "clock", "radio", "vase", "shelf", "stool")
SETTINGS: dict[str, Any] = {
    "data": {"slices": ["action"], "time": None},
    "model": {
        "standin": {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 2, "kv_heads": 2, "vocabulary": 400,
                    "steps": 30, "batch_size": 16, "sequence_length": 64}
    },
    "validate": {
        "labels": {"json_field": "action", "allowed": [*VERBS.values(), "repair"]},
        "expectations": {"rows": {"level": "block", "minimum": 50}, "slices": {}},
    },
    "preprocess": {"max_length": 96, "holdout": {"share": 0.25, "always": {}}},
    "train": {"epochs": None, "max_steps": 120, "batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 10, "threads": 1},
    "evaluate": {"max_new_tokens": 16, "threads": 1},
    "gates": {
        "comparison": {"min_rows": 40, "floor": 0.3, "margin": 0.2, "slice_margin": 0.5, "slice_min_rows": 15},
        "data": {"min_rows": 50},
        "supervision": {"min_rows": 50},
    },
    "export": {"rows": 32, "min_top1_agreement": 0.9, "max_mean_kl": 0.2, "max_exact_match_drop": 0.1},
}  # fmt: skip


def rows(verbs: dict[str, str], count: int, seed: int) -> str:
    """Conversations whose answer depends on how they begin, as JSON lines; no two alike."""
    order = random.Random(seed)
    prompts: dict[str, str] = {}
    while len(prompts) < count:
        verb = order.choice(list(verbs))
        prompts[f"{verb} my {order.choice(ITEMS)} and {order.choice(ITEMS)} of day {order.randrange(100)}"] = verbs[
            verb
        ]
    return "".join(
        json.dumps(
            {
                "id": f"{seed}-{number}",
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": json.dumps({"action": action})},
                ],
                "action": action,
            }
        )
        + "\n"
        for number, (prompt, action) in enumerate(prompts.items())
    )


def second_batch(clone: Path) -> None:
    """Drop a second batch in, with an action that the first champion cannot do; written whole or not at all."""
    temporary = clone / "second.tmp"
    temporary.write_text(rows({"mend": "repair", **VERBS}, 240, seed=2))
    temporary.replace(clone / "data/raw/second.jsonl")


def set_params(clone: Path, changes: dict[str, Any]) -> None:
    """Change values of a clone's `params.yaml`; what is not named stays, comments don't."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    content = yaml.load(clone / "params.yaml")

    def merge(into: Any, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if (
                isinstance(value, dict)
                and isinstance(into.get(name), dict)
                and name not in ("labels", "always", "slices")
            ):
                merge(into[name], value)
            else:
                into[name] = value

    merge(content, changes)
    yaml.dump(content, clone / "params.yaml")


def small_clone(folder: Path) -> Path:
    """Copy the project's own files to `folder`, with little data, as a git repository with one commit."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        source = ROOT / name
        if name.startswith(("data/raw/", "data/later/", "tests/", "bench/", "dvc.lock")) or not source.is_file():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, folder / name)
    (folder / "data/raw").mkdir(parents=True)
    (folder / "data/raw/first.jsonl").write_text(rows(VERBS, 320, seed=1))
    corpus = folder / "data/shipped/corpus.txt"
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[:4000]))
    set_params(folder, SETTINGS)
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "clone"],
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder
