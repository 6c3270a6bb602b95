"""QLoRA with the base shared out over several GPUs (FSDP2): losses against one process, and memory of each.

    python bench/gpu/sharded.py [--shape 8b] [--processes 2] [--steps 5] [--out FOLDER] [--tiny]

**Unproved on GPUs**: it needs two cards at least, and only its dry run was run. It runs the stage `train` itself under torchrun: once in one process (where `--alone` says that the base fits one card), then in all of them with
`sharding: full`. `--tiny` is the dry run, two processes on a CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import SHAPES, goal, make_model, make_rows, report

ROOT = Path(__file__).parent.parent.parent


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--alone", action="store_true", help="train in one process, too, and compare the losses")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    given = parser.parse_args(arguments)
    if given.tiny:
        given.shape, given.length, given.steps, given.alone = "tiny", 32, 3, True
    elif torch.cuda.device_count() < given.processes:
        raise SystemExit(f"found {torch.cuda.device_count()} GPUs, expected {given.processes}; --tiny is a dry run")
    figures: dict[str, Any] = {"shape": given.shape, "processes": given.processes, "length": given.length}
    with tempfile.TemporaryDirectory(prefix="regraft-bench-") as scratch:
        inputs = make_inputs(Path(scratch), given.shape, given.length, given.processes)
        runs = {"shared": given.processes, **({"alone": 1} if given.alone else {})}
        for name, processes in runs.items():
            figures[name] = train(Path(scratch) / name, inputs, processes, given.processes // processes, given.steps)
    pairs = zip(figures["shared"]["losses"], figures.get("alone", figures["shared"])["losses"], strict=True)
    figures["largest_difference"] = max(abs(one / other - 1) for one, other in pairs)
    goals = (
        [goal("loss against one process, share", "at most", 0.01, figures["largest_difference"])] if given.alone else []
    )
    return report("sharded", figures, goals, tiny=given.tiny, out=given.out)


def make_inputs(folder: Path, shape: str, length: int, processes: int) -> Path:
    """Write a base of random weights, pinned, and blocks of random tokens, as the stages before `train` leave them."""
    import pyarrow as pa
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from regraft.artifacts import commit_dir, digest_file
    from regraft.model.params import ModelParams
    from regraft.model.pin import pin

    make_model(SHAPES[shape], 16, attention="sdpa").save_pretrained(folder / "base")
    words = Tokenizer(models.BPE(vocab={"<e>": 0}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", pad_token="<e>").save_pretrained(folder / "base")
    pin(ModelParams(base=str(folder / "base")), corpus=folder, out=folder / "work/model")
    rows = make_rows(SHAPES[shape]["vocab_size"], length, 4 * processes)
    kinds = pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "labels", "position_ids")])
    with commit_dir(folder / "work/preprocess") as out:
        path = out / "train-00000.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, kinds) as writer:
            writer.write_table(pa.Table.from_pylist(rows.to_list(), kinds))
        (out / "report.json").write_text(json.dumps({"schema_version": 1, "train_digest": digest_file(path)}))
    return folder / "work"


def train(folder: Path, inputs: Path, processes: int, batch: int, steps: int) -> dict[str, Any]:
    """Run the stage in a clone of its own and return its losses and what the first process used."""
    from regraft.model.params import ModelParams
    from regraft.train.params import TrainParams

    folder.mkdir()
    (folder / "data").mkdir()
    (folder / "data/work").mkdir()
    for name in ("model", "preprocess"):
        (folder / "data/work" / name).symlink_to(inputs / name)
    params = TrainParams(
        max_steps=steps,
        batch_size=batch,
        rank=16,
        gradient_checkpointing=True,
        logging_every=1,
        optimizer="adamw_torch",
        processes=processes,
        sharding="full" if processes > 1 else "none",
    )
    sections = {"model": ModelParams().model_dump(mode="json"), "train": params.model_dump(mode="json")}
    (folder / "params.yaml").write_text(json.dumps(sections))  # JSON is YAML
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "regraft.train"], cwd=folder, env=environment, check=True)
    lines = (folder / "data/work/train/metrics.jsonl").read_text().splitlines()
    measured = json.loads((folder / "data/work/measurements/train.json").read_text())
    keys = ("peak_gpu_memory_mb", "peak_memory_mb", "useful_tokens_per_second")
    return {"losses": [json.loads(line)["loss"] for line in lines], **{key: measured[key] for key in keys}}


if __name__ == "__main__":
    main()
