"""Tokens a second at Llama-3.1-8B's shape, rank 16 on all linear layers, 2,048 tokens: ours and TRL's, alternating.

    python bench/gpu/throughput.py [--shape 8b] [--steps 12] [--rounds 2] [--out FOLDER] [--tiny]

QLoRA (NF4, double quantisation) and LoRA on a 16-bit base. TRL with its best: bf16, SDPA, no checkpointing where ours
has none, with Liger's kernels and without, where they are installed. Unsloth needs a model of its own making and is not
compared here.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from harness import SHAPES, goal, is_out_of_memory, make_rows, ours, report, trl


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=2, help="blocks at once")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kernels", choices=["plain", "fused"], default="fused")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds, on a CPU too")
    given = parser.parse_args(arguments)
    if given.tiny:
        given.shape, given.length, given.batch, given.steps, given.rounds = "tiny", 64, 1, 5, 1
    figures: dict[str, Any] = {}
    for method, bits in (("qlora", 4), ("lora", 16)):
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(given.rounds):
            for name, run in runs(given, bits).items():
                figure = attempt(run)
                if figure is not None:
                    found.setdefault(name, []).append(figure)
        figures[method] = {name: summary(own) for name, own in found.items()}
    return report("throughput", figures, goals(figures), tiny=given.tiny, out=given.out)


def runs(given: argparse.Namespace, bits: int) -> dict[str, Any]:
    """The runs of one round, by name; each is called in turn."""
    from regraft.model.params import ModelParams
    from regraft.train.params import TrainParams

    shape = SHAPES[given.shape]
    quantization = {"bits": bits, "compute_dtype": "bf16"}
    model = ModelParams.model_validate({"quantization": quantization, "attention": "auto"})
    common = {"max_steps": given.steps, "batch_size": given.batch, "rank": 16, "optimizer": "adamw_torch_fused"}
    params = TrainParams.model_validate({**common, "kernels": given.kernels})
    rows = make_rows(shape["vocab_size"], given.length, given.batch * given.steps)
    return {
        "ours": lambda: ours(shape, model, params, rows),
        "trl": lambda: trl(shape, bits, params, rows, liger=False),
        "trl, liger": lambda: trl(shape, bits, params, rows, liger=True),
    }


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
