"""How large a model trains under a cap: a 65B Llama shape under 48 GB, EXAONE-2.4B's shape under 6 GB.

    python bench/gpu/memory.py [--out FOLDER] [--tiny]

The cap is `torch.cuda.set_per_process_memory_fraction`: torch refuses to allocate more. NF4 with double quantisation,
rank 16 on all linear layers, checkpointed activations, logits of 256 tokens at once, `paged_adamw_8bit`, one block at a time, the same batch at every
step so that a falling loss shows that it learns. Lengths are tried from the longest on.
"""

import argparse
from pathlib import Path
from typing import Any

from harness import SHAPES, capped, goal, is_out_of_memory, make_rows, ours, report

CAPS: dict[str, tuple[str, float, tuple[int, ...]]] = {
    "65b under 48 GB": ("65b", 48e9 / 2**30, (4096, 2048, 1024, 512)),
    "exaone-2.4b under 6 GB": ("exaone-2.4b", 6e9 / 2**30, (4096, 2048, 1024, 512)),
}
TINY: dict[str, tuple[str, float, tuple[int, ...]]] = {"tiny": ("tiny", 1.0, (64, 32))}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=CAPS, help="one of the two")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds, on a CPU too")
    given = parser.parse_args(arguments)
    cases = TINY if given.tiny else {given.only: CAPS[given.only]} if given.only else CAPS
    steps = 3 if given.tiny else given.steps
    figures = {name: longest(*case, steps=steps) for name, case in cases.items()}
    if "exaone-2.4b under 6 GB" in figures:
        figures["exaone-2.4b at 1024"] = longest("exaone-2.4b", 6e9 / 2**30, (1024,), steps=steps)
    return report("memory", figures, goals(figures), tiny=given.tiny, out=given.out)


def longest(shape: str, cap: float, lengths: tuple[int, ...], *, steps: int) -> dict[str, Any]:
    """Train at the longest of some lengths that fits under a cap."""
    from regraft.model.params import ModelParams
    from regraft.plan.architecture import architecture
    from regraft.plan.memory import predict
    from regraft.plan.setup import setup_from
    from regraft.train.params import TrainParams

    quantization = {"bits": 4, "compute_dtype": "bf16"}
    model = ModelParams.model_validate({"quantization": quantization, "attention": "auto"})
    params = TrainParams(
        max_steps=steps,
        batch_size=1,
        rank=16,
        gradient_checkpointing=True,
        logits_chunk=256,
        optimizer="paged_adamw_8bit",
        learning_rate=1e-3,
    )
    refused = []
    for length in lengths:
        rows = make_rows(SHAPES[shape]["vocab_size"], length, 1)
        plan = predict(architecture(SHAPES[shape]), setup_from(params, model, length=length))
        try:
            with capped(cap):
                figure = ours(SHAPES[shape], model, params, rows, warmup=1)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            refused.append(length)
            continue
        planned = round(plan.tensors / 2**20, 1)
        return {"cap_gib": round(cap, 2), "length": length, "too_long": refused, "planned_mib": planned, **figure}
    return {"cap_gib": round(cap, 2), "length": None, "too_long": refused, "losses": []}


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What the table has to show."""
    found = []
    for name, own in figures.items():
        fell = own["losses"][0] - own["losses"][-1] if own["losses"] else None
        found.append(goal(f"{name}: length", "at least", 512, own["length"]))
        found.append(goal(f"{name}: fall of the loss", "at least", 0.01, fell))
    small = figures.get("exaone-2.4b at 1024", {}).get("reserved_mib")
    return [*found, goal("exaone-2.4b at 1024: MiB", "at most", 4096, small)]


if __name__ == "__main__":
    main()
