"""Methods of training on Banking77 at tiny scale: what each trains, what it reaches, what it costs.

    .venv/bin/python bench/methods.py --data PATH/banking77 [--json bench/results/methods.json] [--steps 200] [--only NAME]

About ten minutes of one core. The file is written after every row, and rows that it has already (of the same steps and
versions) are not measured again, so that a stopped run goes on. Every row trains the stand-in's shape (pretrained for a few steps only, so that there is much to learn) for the same steps
on the same conversations, and measures the loss of the answers' tokens on 400 rows of the test file. Rates are common
ones for each kind, not tuned. Time is the processor's, of one thread: cores may be shared. Figures of a model of 0.8 M weights say what works, and hardly what works best on a real one.
"""

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from job import cpu
from train_cpu import LIBRARIES, Material, held_out_loss, quiet, write_blocks

ROOT = Path(__file__).parent.parent
THREADS = 1
LORA = {"rank": 8, "alpha": 16, "learning_rate": 5e-3}
METHODS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("full fine-tuning", {"bits": 32}, {"method": "full", "learning_rate": 1e-3}),
    ("prompt tuning, 16 vectors", {"bits": 32}, {"method": "prompt", "learning_rate": 5e-2}),
    ("LoRA, 32 bits", {"bits": 32}, {}),
    ("LoRA, 16 bits (bf16)", {"bits": 16, "compute_dtype": "bf16"}, {}),
    ("LoRA, int8", {"bits": 8}, {}),
    ("QLoRA, nf4 double", {}, {}),
    ("QLoRA, nf4", {"double_quant": False}, {}),
    ("QLoRA, fp4 double", {"type": "fp4"}, {}),
    ("LoRA, q+v", {"bits": 32}, {"target_modules": "q+v"}),
    ("LoRA, attention", {"bits": 32}, {"target_modules": "attention"}),
    ("LoRA, mlp", {"bits": 32}, {"target_modules": "mlp"}),
    ("LoRA, rank 64, alpha 16", {"bits": 32}, {"rank": 64}),
    ("rsLoRA, rank 64, alpha 16", {"bits": 32}, {"rank": 64, "rslora": True}),
    ("DoRA", {"bits": 32}, {"dora": True}),
    ("LoRA+, 16 times", {"bits": 32}, {"lora_plus": 16.0, "learning_rate": 1e-3}),
    ("PiSSA", {"bits": 32}, {"init": "pissa"}),
    ("OLoRA", {"bits": 32}, {"init": "olora", "learning_rate": 2e-3}),
    ("EVA", {"bits": 32}, {"init": "eva"}),
    ("LoftQ, nf4", {}, {"init": "loftq"}),
    ("QLoRA, adamw_8bit", {}, {"optimizer": "adamw_8bit"}),
    ("QLoRA, lion_8bit", {}, {"optimizer": "lion_8bit", "learning_rate": 5e-4}),
    ("QLoRA, fused kernels", {}, {"kernels": "fused"}),
]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with Banking77's train.csv and test.csv")
    parser.add_argument("--json", type=Path, help="write the figures there, after every row")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", action="append", help="rows whose name contains this; may be repeated")
    arguments = parser.parse_args()
    quiet()
    result = begin(arguments.steps, arguments.json)
    measured = result["figures"]["methods"]
    missing = [
        row
        for row in METHODS
        if row[0] not in measured and (not arguments.only or any(part in row[0] for part in arguments.only))
    ]
    with tempfile.TemporaryDirectory(prefix="regraft-bench-") as scratch:
        packed, single, result["figures"]["loss of the base"] = make_material(Path(scratch), arguments.data)
        for name, quantization, changes in missing:
            material = single if changes.get("method") == "prompt" else packed
            measured[name] = row = run(material, quantization, changes, arguments.steps)
            print(f"{name:<28} {row['trained']:>9,} trained   loss {row['held_out_loss']:.3f}   "
                  f"{row['cpu_seconds']:>6.1f} s of a core", flush=True)  # fmt: skip
            if arguments.json:
                result["figures"]["methods"] = {each: measured[each] for each, *_ in METHODS if each in measured}
                arguments.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def begin(steps: int, file: Path | None) -> dict[str, Any]:
    """Return what an earlier run of the same steps and versions left, or an empty table."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES if name != "trl"}
    if file is not None and file.is_file():
        found: dict[str, Any] = json.loads(file.read_text())
        if (found["figures"]["steps"], found["versions"]) == (steps, versions):
            return found
    return {
        "figures": {"loss of the base": None, "steps": steps, "methods": {}},
        "hardware": {"cpu": cpu(), "cores": os.cpu_count(), "threads": THREADS, "python": platform.python_version()},
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
    }


def make_material(folder: Path, data: Path) -> tuple[Material, Material, float]:
    """Return packed and single conversations on one base, and that base's held-out loss."""
    import torch

    from regraft.chat import open_chat
    from regraft.model.load import load_model, open_base
    from regraft.model.params import ModelParams
    from regraft.model.pin import pin
    from regraft.model.standin import StandinParams, make_standin, train_tokenizer

    torch.set_num_threads(THREADS)
    corpus = ROOT / "data/shipped/corpus.txt"
    params = StandinParams(steps=60, threads=THREADS)
    make_standin(corpus, folder / "base", params)
    pin(ModelParams(base=str(folder / "base")), corpus=corpus, out=folder / "model")
    chat = open_chat(train_tokenizer(corpus.read_text(encoding="utf-8").strip().split("\n\n"), params))
    sides = []
    for file, step in (("train.csv", 2), ("test.csv", 7)):
        with (data / file).open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))[::step]
        conversations = [
            [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["category"]}]
            for row in rows
        ]
        encoded = chat.encode(conversations, "assistant")
        sides.append([(list(e.input_ids), [-100, *e.labels[1:]]) for e in encoded if len(e.input_ids) <= 128])
    packed = Material(folder, sides[0], sides[1][:400])
    write_blocks(packed)
    single = Material(folder / "single", sides[0], packed.held_out)
    single.folder.mkdir()
    write_blocks(single, packing=False)
    before = held_out_loss(load_model(open_base(folder / "model"), None, training=False), packed)
    return packed, single, round(before, 4)


def run(material: Material, quantization: dict[str, Any], changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train by one method, load what it saved, and measure."""
    from regraft.model.adapter import load_adapter
    from regraft.model.load import load_model, open_base
    from regraft.model.params import ModelParams, Quantization
    from regraft.train.params import TrainParams
    from regraft.train.trainer import train

    model = ModelParams(quantization=Quantization(**quantization))
    base = material.folder.parent / "model" if material.folder.name == "single" else material.folder / "model"
    # A block without packing is one conversation: as many tokens in a step as eight packed blocks have.
    batch = 8 if material.folder.name != "single" else 32
    params = TrainParams.model_validate(
        {"seed": 11, "max_steps": steps, "batch_size": batch, "beta2": 0.99, "warmup": 0.05, "threads": THREADS,
         "optimizer": "adamw_torch_fused", "checkpoint_every": 100_000} | LORA | changes
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=material.folder) as scratch:
        out, began = Path(scratch), time.process_time()
        report = train(params, model, base=base, dataset=material.folder / "data", out=out / "train",
                       checkpoints=out / "checkpoints", measurements=out / "measurements.json")  # fmt: skip
        seconds = time.process_time() - began
        measured = json.loads((out / "measurements.json").read_text())
        if params.method == "lora":
            loaded: Any = load_adapter(
                load_model(open_base(base), model.quantization, training=False), out / "train/adapter"
            )
            loss = held_out_loss(loaded, material)
        elif params.method == "full":
            from transformers import AutoModelForCausalLM

            loss = held_out_loss(AutoModelForCausalLM.from_pretrained(out / "train/model").eval(), material)
        else:
            from peft import PeftModel

            frozen = load_model(open_base(base), model.quantization, training=False)
            loaded = PeftModel.from_pretrained(frozen, out / "train/prompt").eval()
            loss = held_out_loss(loaded, material, prompt_tokens=params.prompt_tokens)
        folder = next((out / "train").glob("[amp]*/"))
        size = sum(file.stat().st_size for file in folder.iterdir())
    return {
        "trained": report.trainable_parameters,
        "held_out_loss": round(loss, 4),
        "train_loss_last": round(report.loss_last, 4),
        "useful_tokens_per_cpu_second": round(report.tokens_seen / measured["training_cpu_seconds"], 1),
        "cpu_seconds": round(seconds, 1),
        "saved_kb": round(size / 1024),
    }


if __name__ == "__main__":
    main()
