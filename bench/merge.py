"""A LoRA merge by Regraft, by PEFT, and a bare copy of the same files: seconds and peak memory.

    .venv/bin/python bench/merge.py [--shape 1b|8b] [--runs 3] [--json bench/results/merge.json]

The model is made on the spot (random bf16 weights in a Llama's shape) with a rank 16 adapter on all linear layers. Each
run is a fresh process; the three alternate; every time ends with the bytes on disk (`sync`), and the files are in the
page cache for all. PEFT is left out where the machine has not the memory for it (`--without-peft`).
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
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 256, "layers": 2, "heads": 8, "kv": 2, "intermediate": 704, "vocab": 4000, "shard": 10**7},
    "1b": {
        "hidden": 2048,
        "layers": 22,
        "heads": 32,
        "kv": 4,
        "intermediate": 5632,
        "vocab": 32000,
        "shard": 5 * 10**9,
    },
    "8b": {
        "hidden": 4096,
        "layers": 32,
        "heads": 32,
        "kv": 8,
        "intermediate": 14336,
        "vocab": 128256,
        "shard": 5 * 10**9,
    },
}
RANK = 16
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the medians are reported")
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="regraft-bench-", dir=given.scratch) as scratch:
        figures = measure(Path(scratch), given.shape, given.runs, peft=not given.without_peft)
    ours, copy = figures["regraft"], figures["cp"]
    ratios = {"time, regraft / cp": round(ours["seconds"] / copy["seconds"], 2)}
    if "peft" in figures:
        ratios["time, peft / cp"] = round(figures["peft"]["seconds"] / copy["seconds"], 2)
        ratios["time, regraft / peft"] = round(ours["seconds"] / figures["peft"]["seconds"], 2)
        ratios["memory, regraft / peft"] = round(ours["peak_gb"] / figures["peft"]["peak_gb"], 2)
    goals = [
        goal("peak memory, GB", 0.75, ours["peak_gb"]),
        goal("time, times cp + sync", 2.0, ratios["time, regraft / cp"]),
    ]
    if "peft" in figures:
        goals.append(goal("tensors that differ from PEFT's", 0, figures["different_tensors"]))
    result = {
        "shape": given.shape,
        "figures": figures,
        "ratios": ratios,
        "goals": goals,
        "hardware": {"cores": os.cpu_count(), "load_before": round(load, 2), "python": platform.python_version()},
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "safetensors")
        },
        "date": datetime.now(UTC).date().isoformat(),
    }
    for each in goals:
        print(f"{'ok ' if each['met'] else 'NO '} {each['name']:<34} {each['measured']:>7} ({each['wanted']})")
    print(json.dumps(figures))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(scratch: Path, shape: str, runs: int, *, peft: bool) -> dict[str, Any]:
    """Alternate the contestants and return medians."""
    base, adapter = scratch / "base", scratch / "adapter"
    subprocess.run([sys.executable, __file__, "make", shape, str(base), str(adapter)], check=True)
    size = sum(path.stat().st_size for path in base.iterdir())
    commands = {
        "cp": ["cp", "-r", str(base), "OUT"],
        "regraft": [sys.executable, "-m", "regraft", "merge", str(base), str(adapter), "--out", "OUT"],
        "peft": [sys.executable, "-c", PEFT, str(base), str(adapter), "OUT"],
    }
    if not peft:
        commands.pop("peft")
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    different = None
    for run in range(runs):
        for name, command in commands.items():
            out = scratch / name
            seen[name].append(timed([str(out) if word == "OUT" else word for word in command]))
            if name == "peft" and run == 0:
                different = differing(scratch / "regraft", out)
            if name != "regraft":
                shutil.rmtree(out)  # room for the next: an 8B model is 16 GB
        shutil.rmtree(scratch / "regraft")
        os.sync()
    figures: dict[str, Any] = {"gigabytes": round(size / 1e9, 3)}
    for name, values in seen.items():
        figures[name] = {
            "seconds": round(statistics.median(seconds for seconds, _, _ in values), 2),
            "cpu_seconds": round(statistics.median(cpu for _, cpu, _ in values), 2),
            "peak_gb": round(max(peak for _, _, peak in values), 3),
            "all_seconds": [round(seconds, 2) for seconds, _, _ in values],
        }
    return figures | ({"different_tensors": different} if different is not None else {})


def timed(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds until everything is on disk, CPU seconds and the peak resident memory in GB of the process."""
    os.sync()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[:4]} ended with {process.returncode}:\n{said.decode()[-3000:]}")
    os.sync()
    scale = 1 if sys.platform == "darwin" else 1024
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale / 1e9


def differing(mine: Path, other: Path) -> int:
    """Count tensors that are not the same bytes in two folders."""
    from regraft.export.tensors import catalogue

    found, expected = catalogue(mine), catalogue(other)
    different = len(set(found) ^ set(expected))
    for name in set(found) & set(expected):
        data = []
        for folder, (file, tensor) in ((mine, found[name]), (other, expected[name])):
            with (folder / file).open("rb") as stream:
                stream.seek(tensor.start)
                data.append(stream.read(tensor.end - tensor.start))
        different += data[0] != data[1]
    return different


def make(shape: str, base: Path, adapter: Path) -> None:
    """Write a random Llama and an adapter on all of its linear layers, shard by shard, without much memory."""
    import torch
    from safetensors.torch import save_file

    size = SHAPES[shape]
    hidden, width = size["hidden"], size["intermediate"]
    kv = hidden // size["heads"] * size["kv"]
    linear = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size["vocab"], hidden)}
    factors = {}
    for layer in range(size["layers"]):
        for name, (rows, columns) in linear.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = (rows, columns)
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            factors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns) / columns**0.5
            factors[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK) * 1e-3
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (size["vocab"], hidden)}
    base.mkdir(parents=True)
    adapter.mkdir(parents=True)
    groups: list[list[str]] = [[]]
    filled = 0
    for name, dimensions in shapes.items():
        count = 2 * torch.Size(dimensions).numel()
        if groups[-1] and filled + count > size["shard"]:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += count
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else "model.safetensors"
        save_file(
            {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02) for name in group},
            base / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(group, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size["vocab"],
        "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"], "num_key_value_heads": size["kv"], "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    save_file(factors, adapter / "adapter_model.safetensors")
    names = sorted({name.rpartition(".")[2] for name in linear})
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": names}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))


def goal(name: str, limit: float, measured: float) -> dict[str, Any]:
    """A goal of issue 5 and whether it is met."""
    return {"name": name, "wanted": f"at most {limit}", "measured": measured, "met": measured <= limit}


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
