"""A clone whose stages have run: small files with the real reports' fields, for the registry, lineage and tracking."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from regraft.artifacts import commit_dir, digest_bytes, digest_json, write_json
from regraft.gates.verdict import Check, decide, save_verdict
from regraft.layout import Layout
from regraft.model.adapter import adapter_digest
from regraft.register.params import RegisterParams
from regraft.validate.quarantine import ROWS

PARAMS = RegisterParams(timeout=5, patience=5)
RESOLVED: dict[str, Any] = {"train": {"rank": 4}, "model": {"base": "standin", "quantization": {"bits": 4}}}
STEPS = [{"step": n, "epoch": n / 10, "loss": 3.0 / n, "grad_norm": 1.0, "learning_rate": 1e-3} for n in range(1, 6)]


def make(root: Path, *, adapter: str = "one", champion: str = "none", passed: bool = True, rows: int = 20) -> Layout:
    """Write every stage's output and a verdict; equal arguments give equal bytes."""
    layout = Layout(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text("train:\n  rank: 4\nmodel:\n  base: standin\n")
    (root / "requirements.lock").write_text("torch==1\n")
    base, tokenizer = digest_json("base"), digest_json("tokenizer")
    stage(layout, "model", {"digest": base, "tokenizer_digest": tokenizer, "base": "standin", "source": "standin"})
    raw = {"data/raw/a.jsonl": {"sha256": digest_json(["a", rows]), "rows": rows}}
    stage(
        layout,
        "validate",
        {"data_digest": digest_json(rows), "rows_in": rows + 1, "rows_out": rows, "rows_quarantined": 1, "files": raw},
        {"rows.parquet": accepted(rows)},
    )
    stage(
        layout,
        "preprocess",
        {
            "train_digest": digest_json(["train", rows]),
            "holdout_digest": digest_json("holdout"),
            "tokenizer_digest": tokenizer,
            "rows_digest": digest_json(["rows", rows]),
            "counts": {"train": rows - 2, "holdout": 2},
        },
    )
    files = {
        "adapter/adapter_config.json": b'{"r": 4}',
        "adapter/adapter_model.safetensors": adapter.encode(),
        "metrics.jsonl": b"".join(json.dumps(step).encode() + b"\n" for step in STEPS),
    }
    config = digest_bytes(files["adapter/adapter_config.json"])
    weights = digest_bytes(files["adapter/adapter_model.safetensors"])
    digest = digest_json({"adapter_config.json": config, "adapter_model.safetensors": weights})
    train = {"adapter_digest": digest, "base_digest": base, "tokenizer_digest": tokenizer, "seed": 7, "steps": 5}
    train |= {"dataset_digest": digest_json(["train", rows]), "params_digest": digest_json(4), "loss_last": 0.6}
    stage(layout, "train", train, files)
    scores = {name: {"overall": {"rows": 2, "exact_match": 0.5, "loss": 1.0}, "slices": {}} for name in ("challenger",)}
    evaluated = {"adapters": {"challenger": digest}, "holdout_digest": digest_json("holdout"), "base_digest": base}
    stage(
        layout,
        "evaluate",
        evaluated | {"scores": scores},
        {"answers-challenger.parquet": f"answers {adapter}".encode()},
    )
    judge(layout, champion, passed=passed)
    return layout


def accepted(rows: int, *, action: str = "track", month: int = 9) -> bytes:
    """Rows that `validate` accepted, as the bytes of `rows.parquet`; equal arguments give equal bytes."""
    made = [
        {
            "row_id": digest_json([number, month])[:32],
            "source": f"data/raw/2026-{month:02d}.jsonl",
            "line": number,
            "messages": [
                {"role": "user", "content": f"where is my parcel number {number}"},
                {"role": "assistant", "content": "It is on its way."},
            ],
            "slices": [("action", action if number % 2 else "cancel")],
            "at": f"2026-{month:02d}-{1 + number % 28:02d}",
            "id": str(number),
        }
        for number in range(rows)
    ]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(made, ROWS), buffer)
    return bytes(buffer.getvalue())


def stage(layout: Layout, name: str, report: dict[str, Any], files: dict[str, bytes] | None = None) -> None:
    with commit_dir(layout.stage(name)) as folder:
        for path, content in (files or {}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        write_json(folder / "report.json", {"schema_version": 1, **report})


def judge(layout: Layout, champion: str, *, passed: bool = True, gate: str = "run") -> str:
    """Write the verdict on the clone's adapter against the champion with this adapter digest."""
    model, data = report(layout, "model"), report(layout, "preprocess")
    judged = {
        "adapter": adapter_digest(layout.stage("train") / "adapter"),
        "base": model["digest"],
        "tokenizer": model["tokenizer_digest"],
        "data": data["train_digest"],
        "rows": data["rows_digest"],
        "holdout": data["holdout_digest"],
        "champion": champion,
    }
    check = Check(name="comparison.better", passed=passed, detail=f"Better: {'yes' if passed else 'no'}.")
    return save_verdict(decide(gate, [check], judged), layout.verdict)


def report(layout: Layout, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((layout.stage(name) / "report.json").read_bytes())
    return content


def live(layout: Layout, key: str, steps: list[dict[str, float]]) -> Path:
    """Write the live metrics of a training under way."""
    folder = layout.checkpoints / key[:16]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(step) + "\n" for step in steps))
    write_json(layout.checkpoints / "current.json", {"key": key, "metrics": str(path)})
    return path


def copy_store(template: Path, root: Path) -> None:
    """Give a clone an empty MLflow store; migrating one takes more than a second."""
    root.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(template, root / "mlflow.db")
