"""Tokens a second at Llama-3.1-8B's shape, rank 16 on all linear layers, 2,048 tokens: ours and TRL's, alternating.

    python bench/gpu/throughput.py [--shape 8b] [--steps 12] [--rounds 2] [--out FOLDER] [--tiny]

QLoRA (NF4, double quantisation) and LoRA on a 16-bit base. TRL with its best: bf16, SDPA, no checkpointing where ours
has none, with Liger's kernels and without, where they are installed. Each run is a process of its own: Liger replaces
classes of transformers for a whole process, so that whoever comes next in it would be measured with them. Unsloth needs
a model of its own making and is not compared here.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import SHAPES, goal, is_out_of_memory, make_rows, ours, report, trl

METHODS = {"qlora": 4, "lora": 16}
CONTESTANTS = ("ours", "trl", "trl, liger")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=2, help="blocks at once")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kernels", choices=["plain", "fused"], default="fused")
    parser.add_argument("--one", choices=CONTESTANTS, help="this one alone, in this process; --out is its file")
    parser.add_argument("--method", choices=METHODS, default="qlora", help="of --one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds, on a CPU too")
    given = parser.parse_args(arguments)
    if given.tiny:
        given.shape, given.length, given.batch, given.steps, given.rounds = "tiny", 64, 1, 5, 1
    if given.one:
        told = attempt(runs(given, METHODS[given.method])[given.one])
        given.out.write_text(json.dumps(told))
        return {}
    figures: dict[str, Any] = {}
    for method in METHODS:
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(given.rounds):
            for name in CONTESTANTS:
                figure = apart(given, method, name)
                if figure is not None:
                    found.setdefault(name, []).append(figure)
        figures[method] = {name: summary(own) for name, own in found.items()}
    return report("throughput", figures, goals(figures), tiny=given.tiny, out=given.out)


def apart(given: argparse.Namespace, method: str, name: str) -> dict[str, Any] | None:
    """Run one contestant in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="regraft-bench-") as scratch:
        out = Path(scratch) / "figures.json"
        command = [sys.executable, __file__, "--one", name, "--method", method, "--out", str(out)]
        for option in ("shape", "length", "batch", "steps", "kernels"):
            command += [f"--{option}", str(getattr(given, option))]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, env=environment())
        if ended.returncode:
            raise RuntimeError(f"{method}, {name} ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
        told: dict[str, Any] | None = json.loads(out.read_text())
        return told


def environment() -> dict[str, str]:
    """Let the processes find Regraft, installed or not."""
    path = [str(Path(__file__).parent.parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def runs(given: argparse.Namespace, bits: int) -> dict[str, Any]:
    """The contestants by name; the one that is called has the process for itself."""
    from regraft.model.params import ModelParams
    from regraft.train.params import TrainParams

    shape = SHAPES[given.shape]
    quantization = {"bits": bits, "compute_dtype": "bf16"}
    model = ModelParams.model_validate({"quantization": quantization, "attention": "auto"})
    common = {"max_steps": given.steps, "batch_size": given.batch, "rank": 16, "optimizer": "adamw_torch_fused"}
    params = TrainParams.model_validate({**common, "kernels": given.kernels})
    rows = make_rows(shape["vocab_size"], given.length, given.batch * given.steps)
    made = (
        lambda: ours(shape, model, params, rows),
        lambda: trl(shape, bits, params, rows, liger=False),
        lambda: trl(shape, bits, params, rows, liger=True),
    )
    return dict(zip(CONTESTANTS, made, strict=True))


def attempt(run: Any) -> dict[str, Any] | None:
    """Run one; where memory ends, say so instead."""
    try:
        return run()  # type: ignore[no-any-return]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"tokens_per_second": None, "out_of_memory": True, "allocated_mib": None, "losses": []}


def summary(own: list[dict[str, Any]]) -> dict[str, Any]:
    """The median over the rounds."""
    speeds = [each["tokens_per_second"] for each in own if each["tokens_per_second"]]
    return {
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "all": speeds,
        "allocated_mib": own[-1]["allocated_mib"],
        "loss_last": own[-1]["losses"][-1] if own[-1]["losses"] else None,
    }


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What the table has to show."""
    own, peers = figures["qlora"]["ours"], [v for k, v in figures["qlora"].items() if k != "ours"]
    best = max((p for p in peers if p["tokens_per_second"]), key=lambda p: p["tokens_per_second"], default=None)
    speed = own["tokens_per_second"]
    ratio = round(speed / best["tokens_per_second"], 3) if best and speed else None
    more = own["allocated_mib"] / best["allocated_mib"] if best and own["allocated_mib"] else None
    return [
        goal("QLoRA, tokens/s", "at least", 12_000, speed),
        goal("QLoRA, over TRL's best", "at least", 1.3, ratio),
        goal("QLoRA, memory over TRL's best", "at most", 1.0, more),
        goal("LoRA, tokens/s", "at least", 14_000, figures["lora"]["ours"]["tokens_per_second"]),
    ]


if __name__ == "__main__":
    main()
