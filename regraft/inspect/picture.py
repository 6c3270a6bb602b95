"""An inspection as a picture: where the adapter changed the model, and how many directions it used."""

import re
from io import BytesIO
from pathlib import Path

from regraft.artifacts import write_file
from regraft.inspect.spectrum import ENERGY, Inspection, Layer


def draw(inspection: Inspection, file: Path) -> None:
    """Write a PNG: the change by layer and kind, the rank that is needed there, and the energy in the first k.

    Args:
        inspection: with one layer at least.
        file: is written, or replaced, whole.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds, depths, cells = _grid(inspection.layers)
    figure = Figure(figsize=(15, max(3.5, 1.8 + 0.16 * len(depths))), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)

    relative = any(layer.relative is not None for layer in inspection.layers)
    changes = [[_change(cells.get((depth, kind))) for kind in kinds] for depth in depths]
    needed = [[_needed(cells.get((depth, kind))) for kind in kinds] for depth in depths]
    titles = ("‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖", f"rank for {ENERGY:.0%} of ‖ΔW‖² (of {inspection.rank})")
    for axes, values, title in ((left, changes, titles[0]), (middle, needed, titles[1])):
        image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right", fontsize=8)
        step = max(1, len(depths) // 16)
        axes.set_yticks(range(0, len(depths), step), depths[::step], fontsize=8)
        axes.set_title(title)
        figure.colorbar(image, ax=axes)
    left.set_ylabel("layer")

    for index, kind in enumerate(kinds):
        own = [layer.energy for (_, k), layer in cells.items() if k == kind and not layer.dead]
        longest = max((len(energy) for energy in own), default=0)
        mean = [sum(e[min(i, len(e) - 1)] for e in own) / len(own) for i in range(longest)]
        right.plot(range(1, longest + 1), mean, label=kind, color=f"C{index % 10}", linewidth=1.5)
    right.axhline(ENERGY, color="gray", linewidth=0.8, linestyle=":")
    right.set(title="share of ‖ΔW‖² in the first k directions", xlabel="k", ylim=(0, 1.02))
    right.legend(fontsize=8)
    figure.suptitle(f"{inspection.adapter}: {inspection.why}")

    content = BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    write_file(file, content.getvalue())


def _grid(layers: list[Layer]) -> tuple[list[str], list[int], dict[tuple[int, str], Layer]]:
    cells = {}
    for layer in layers:
        number = re.search(r"\.(\d+)\.", layer.name)
        cells[int(number[1]) if number else 0, layer.name.rpartition(".")[2]] = layer
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    return kinds, sorted({depth for depth, _ in cells}), cells


def _change(layer: Layer | None) -> float:
    if layer is None:
        return float("nan")
    return layer.norm if layer.relative is None else layer.relative


def _needed(layer: Layer | None) -> float:
    return float("nan") if layer is None else float(layer.needed)
