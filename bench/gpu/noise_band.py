"""How far equal runs differ on a GPU: the same run again and again, and five seeds.

    python bench/gpu/noise_band.py [--shape 1b] [--steps 40] [--out FOLDER] [--tiny]

Equal bytes are promised on a CPU only. A difference between two trainings that is smaller than the band says nothing.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from harness import SHAPES, goal, make_rows, ours, report


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds, on a CPU too")
    given = parser.parse_args(arguments)
    if given.tiny:
        given.shape, given.length, given.steps, given.runs = "tiny", 32, 3, 2
    again = [once(given, seed=7) for _ in range(given.runs)]
    seeds = [once(given, seed=seed) for seed in range(given.runs)]
    figures = {"same_seed": band(again), "five_seeds": band(seeds), "bits_equal": all(x == again[0] for x in again)}
    spread = figures["same_seed"]["loss_deviation"]
    goals = [goal("deviation of the last loss at one seed", "at most", 0.01, spread)]
    return report("noise_band", figures, goals, tiny=given.tiny, out=given.out)


def once(given: argparse.Namespace, *, seed: int) -> dict[str, Any]:
    """Train once: always the same base and rows; the seed draws A and the order of the rows."""
    from regraft.model.params import ModelParams
    from regraft.train.machine import reproducible
    from regraft.train.params import TrainParams

    shape = SHAPES[given.shape]
    model = ModelParams.model_validate({"quantization": {"bits": 4, "compute_dtype": "bf16"}, "attention": "auto"})
    params = TrainParams(
        max_steps=given.steps, batch_size=2, rank=16, learning_rate=1e-3, seed=seed, optimizer="adamw_torch_fused"
    )
    rows = make_rows(shape["vocab_size"], given.length, 16)  # few rows, many passes: there is something to learn
    with reproducible(params):
        found = ours(shape, model, params, rows)
    return {"losses": found["losses"], "adapter_norm": found["adapter_norm"]}


def band(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Spread of the last loss and of the adapter's norm over some runs."""
    last = [run["losses"][-1] for run in runs]
    return {
        "loss_mean": statistics.fmean(last),
        "loss_deviation": statistics.stdev(last),
        "loss_range": max(last) - min(last),
        "adapter_norm_deviation": statistics.stdev([run["adapter_norm"] for run in runs]),
    }


if __name__ == "__main__":
    main()
