"""The command `regraft inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from regraft.command import Json, Root, answer, clone, progress
from regraft.errors import DamagedArtifact, MissingInput

HERE = Path()
commands = typer.Typer()


@commands.command(rich_help_panel="Look before and after")
def inspect(
    adapter: Annotated[str, typer.Argument(help="A PEFT adapter's folder, or a version of this clone's registry.")],
    base: Annotated[
        Path | None, typer.Option("--base", help="The base model's folder, for ‖ΔW‖/‖W‖; the clone's own otherwise.")
    ] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Write a PNG there.")] = None,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Show what an adapter learnt: size of the change, singular values, rank used and needed, dead layers."""
    from regraft.inspect.spectrum import inspect as measure

    folder = Path(adapter).absolute()
    own_base = base.absolute() if base else None
    if picture is not None:
        picture = picture.absolute()
    if not folder.is_dir():
        folder, clones_base = _version(adapter, root)
        own_base = own_base or clones_base
    elif own_base is None:
        own_base = _base_of(root.absolute())
    try:
        found = measure(folder, own_base)
    except DamagedArtifact:
        if base is not None or own_base is None:
            raise
        progress("note: the clone's base is not this adapter's; --base names another")
        found = measure(folder)

    lines = [f"{'layer':<44} {'rank':>4} {'‖ΔW‖/‖W‖' if own_base else '‖ΔW‖':>10} {'effective':>9} {'needed':>6}"]
    for layer in found.layers:
        change = f"{layer.norm:>10.4g}" if layer.relative is None else f"{layer.relative:>10.3%}"
        mark = "  dead" if layer.dead else ""
        lines.append(
            f"{layer.name[-44:]:<44} {layer.rank:>4} {change} {layer.effective_rank:>9.1f} {layer.needed:>6}{mark}"
        )
    lines += [f"not looked at: {name}" for name in found.skipped]
    lines.append(f"suggested rank: {found.suggested_rank}; {found.why}")
    told = found.to_dict()
    if picture is not None and found.layers:
        from regraft.inspect.picture import draw

        draw(found, picture)
        lines.append(f"picture: {picture}")
        told["picture"] = str(picture)
    answer(told, lines, as_json=as_json)


def _version(which: str, root: Path) -> tuple[Path, Path | None]:
    """Return the folder of a registered version's adapter, and the clone's base."""
    if "/" in which:
        raise MissingInput(f"the adapter {which} is missing", fix="name an adapter's folder, or a version")
    layout = clone(root)
    from regraft import settings
    from regraft.register.fetch import fetch
    from regraft.register.lookup import version

    found = version(settings.load(layout).register_, layout, which)
    files = fetch(found, layout.work / "versions" / found.identity[:16])
    return files / "adapter", _base_of(Path())


def _base_of(root: Path) -> Path | None:
    """The folder of the clone's pinned base, where it lies here."""
    from regraft.artifacts import read_json
    from regraft.layout import Layout
    from regraft.model.pin import WEIGHTS

    stage = Layout(root).stage("model")
    if (stage / WEIGHTS / "config.json").is_file():
        return stage / WEIGHTS
    try:
        path = read_json(stage / "report.json")["path"]
    except (MissingInput, DamagedArtifact, KeyError, TypeError):
        return None
    return root / path if path and (root / path).is_dir() else None
