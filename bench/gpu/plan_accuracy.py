"""The plan's peak against the measured one: methods, sizes, lengths, checkpointing, batches.

    python bench/gpu/plan_accuracy.py [--out FOLDER] [--tiny]

Compared are the bytes that torch holds (without the CUDA context, which is measured beside it once).
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from harness import SHAPES, free, goal, is_out_of_memory, make_rows, ours, report

CASES: list[tuple[str, int, int, int, bool]] = [
    ("1b", 16, 2, 1024, False), ("1b", 16, 4, 1024, True), ("1b", 4, 2, 1024, False), ("1b", 4, 4, 1024, True),
    ("exaone-2.4b", 16, 1, 1024, False), ("exaone-2.4b", 16, 4, 2048, True), ("exaone-2.4b", 4, 1, 1024, False),
    ("exaone-2.4b", 4, 2, 2048, True), ("8b", 16, 1, 1024, False), ("8b", 16, 2, 2048, True), ("8b", 4, 1, 1024, False),
    ("8b", 4, 1, 2048, False), ("8b", 4, 2, 2048, True), ("8b", 4, 1, 4096, True), ("8b", 16, 1, 4096, True),
]  # fmt: skip
"""(shape, bits, blocks at once, length, checkpointing)."""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attention", choices=["auto", "sdpa"], default="sdpa")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds, on a CPU too")
    given = parser.parse_args(arguments)
    cases = [("tiny", 4, 2, 64, False), ("tiny", 16, 1, 32, True)] if given.tiny else CASES
    figures: dict[str, Any] = {"context_mib": context(), "cases": []}
    for case in cases:
        figures["cases"].append(measure(case, given.attention, given.steps))
        print(figures["cases"][-1])
    errors = [abs(each["ratio"] - 1) for each in figures["cases"] if each["ratio"]]
    figures["median_error"] = statistics.median(errors) if errors else None
    figures["worst_error"] = max(errors, default=None)
    goals = [
        goal("configurations", "at least", 12, len(errors)),
        goal("median error", "at most", 0.05, figures["median_error"]),
        goal("worst error", "at most", 0.10, figures["worst_error"]),
    ]
    return report("plan_accuracy", figures, goals, tiny=given.tiny, out=given.out)


def measure(case: tuple[str, int, int, int, bool], attention: str, steps: int) -> dict[str, Any]:
    """Plan one configuration, run it, compare."""
    from regraft.model.params import ModelParams
    from regraft.plan.architecture import architecture
    from regraft.plan.memory import predict
    from regraft.plan.setup import setup_from
    from regraft.train.params import TrainParams

    shape, bits, batch, length, checkpointing = case
    quantization = {"bits": bits, "compute_dtype": "bf16"}
    model = ModelParams.model_validate({"quantization": quantization, "attention": attention})
    params = TrainParams(
        max_steps=steps,
        batch_size=batch,
        rank=16,
        gradient_checkpointing=checkpointing,
        optimizer="adamw_torch_fused",
    )
    plan = predict(architecture(SHAPES[shape]), setup_from(params, model, length=length))
    rows = make_rows(SHAPES[shape]["vocab_size"], length, batch * steps, documents=4)
    planned = round(plan.tensors / 2**20, 1)
    told = {"shape": shape, "bits": bits, "batch": batch, "length": length, "checkpointing": checkpointing}
    try:
        found = ours(SHAPES[shape], model, params, rows, warmup=1)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {**told, "planned_mib": planned, "used_mib": None, "ratio": None, "out_of_memory": True}
    used = found["allocated_mib"]
    ratio = round(planned / used, 4) if used else None
    return {**told, "planned_mib": planned, "used_mib": used, "reserved_mib": found["reserved_mib"], "ratio": ratio}


def context() -> float | None:
    """What the process holds on the card beside torch's own memory, in MiB; None on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.ones(1024, device="cuda") @ torch.ones(1024, device="cuda")
    free()
    left, total = torch.cuda.mem_get_info()
    return round((total - left - torch.cuda.memory_reserved()) / 2**20, 1)


if __name__ == "__main__":
    main()
