"""The commands `regraft data ...`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from regraft.command import Json, Root, answer, clone

HERE = Path()
commands = typer.Typer()
data = typer.Typer(help="Look at the data.", no_args_is_help=True)
commands.add_typer(data, name="data", rich_help_panel="The whole job")


@data.callback()
def group() -> None:
    """Look at the data."""


@data.command()
def show(
    rows: Annotated[int, typer.Option("--rows", min=1, max=1000, help="Rows of each file.")] = 3,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Show what was understood of each file's first rows, with what is learned coloured (personal data is masked)."""
    layout = clone(root)
    from regraft import settings
    from regraft.preprocess.show import show_rows

    parameters = settings.load(layout)
    found = show_rows(
        parameters.data,
        parameters.validate_,
        root=layout.root,
        count=rows,
        chat=_chat(layout.stage("model")),
        supervise=parameters.preprocess.supervise,
    )
    if as_json:
        answer([each.as_json() for each in found], [], as_json=True)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for each in found:
        verdict = "accepted" if not each.reasons else "quarantined: " + ", ".join(each.reasons)
        tokens = f", {each.learned} of {each.tokens} tokens learned" if each.tokens else ""
        console.print(Text(f"{each.place}  {each.layout}, {verdict}{tokens}", style="bold"))
        console.print(Text.assemble(*((text, "green" if learned else "") for text, learned in each.pieces)))
        if each.problem:
            console.print(Text(each.problem, style="red"))


@data.command()
def diff(
    before: Annotated[
        str, typer.Argument(help="A version (`champion`, 3), an output of `validate`, or its rows.parquet.")
    ],
    after: Annotated[
        str | None, typer.Argument(help="A newer one likewise; the clone's present rows where it is left out.")
    ] = None,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Show what differs between two versions of the accepted rows: new, changed and removed ones, words, slices."""
    given = [before] if after is None else [before, after]
    files = [Path(each).absolute() if Path(each).exists() or "/" in each else None for each in given]
    if None in files or after is None:
        layout = clone(root)
        from regraft import settings
        from regraft.decision import rows_of

        parameters = settings.load(layout)
        files = [file or rows_of(layout, parameters, each) for each, file in zip(given, files, strict=True)]
        files += [layout.stage("validate").absolute()] if after is None else []
    from regraft.preprocess.difference import diff_rows, lines

    older, newer = (file / "rows.parquet" if file.is_dir() else file for file in files if file is not None)
    found = diff_rows(older, newer)
    answer(found.model_dump(), lines(found), as_json=as_json)


@data.command()
def page(
    out: Annotated[Path | None, typer.Option("--out", help="The HTML file; data/work/summary.html otherwise.")] = None,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Write one page with pictures: where every row went, lengths, slices, and drift against the champion's data."""
    out = None if out is None else out.absolute()
    layout = clone(root)
    from regraft import settings
    from regraft.summary import NAME, write_summary

    target = out or layout.work / NAME
    said = write_summary(layout, settings.load(layout), target)
    answer({"page": str(target), "said": said}, [*said, f"page: {target}"], as_json=as_json)


@data.command()
def forget(
    match: Annotated[
        str | None, typer.Option("--match", help="A regular expression, looked for in all that is said in a row.")
    ] = None,
    ids: Annotated[
        list[str] | None, typer.Option("--id", help="A row's own name (column data.id); may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look only; change nothing.")] = False,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Leave rows out of all future versions, tag the versions that were trained on them, and say how to make a clean one."""
    layout = clone(root)
    from regraft import settings
    from regraft.forget import forget as forget_rows

    found = forget_rows(layout, settings.load(layout), match=match, ids=ids or (), dry_run=dry_run)
    answer(found.to_dict(), found.lines(), as_json=as_json)


def _chat(base: Path) -> Any:
    """Return how the base model renders; None before the stage `model` has run."""
    if not (base / "report.json").is_file():
        return None
    from regraft.chat import open_chat
    from regraft.model.load import load_tokenizer, open_base

    return open_chat(load_tokenizer(open_base(base, weights=False)))
