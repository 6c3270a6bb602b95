"""The command `regraft plan`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from regraft.command import Json, Root, answer, clone
from regraft.errors import Exit, ParamsError

HERE = Path()
commands = typer.Typer()


@commands.command(rich_help_panel="Look before and after")
def plan(
    model: Annotated[
        Path | None, typer.Option("--model", help="A config.json, or its folder, instead of the clone's base.")
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Find what fits this card, such as rtx3050.")] = None,
    vram: Annotated[str | None, typer.Option("--vram", help="Find what fits this memory, such as 6GiB.")] = None,
    length: Annotated[int | None, typer.Option("--length", min=16, help="Tokens of a packed block.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Tables of methods, and of ranks and target modules.")
    ] = False,
    write: Annotated[bool, typer.Option("--apply", help="Write what fits into params.yaml.")] = False,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Predict the memory that training takes, and find the fastest configuration that fits a card."""
    layout = clone(root)
    from regraft import settings
    from regraft.plan import compare as tables
    from regraft.plan.apply import apply
    from regraft.plan.architecture import read_architecture
    from regraft.plan.cards import card_named, card_of_size, present_card
    from regraft.plan.check import observations_file
    from regraft.plan.fit import expected_bytes, fit, settings_of
    from regraft.plan.memory import predict
    from regraft.plan.observations import correction
    from regraft.plan.setup import setup_from
    from regraft.plan.source import blocks_of, shapes_of

    if gpu and vram:
        raise ParamsError("--gpu and --vram both name a card", fix="give one of them")
    parameters = settings.load(layout)
    architecture = read_architecture(model) if model else shapes_of(parameters.model, layout)
    tokens, trained = blocks_of(layout, parameters.preprocess.max_length, parameters.preprocess.block_length)
    if model or length:
        tokens, trained = length or tokens, 1.0
    card = card_named(gpu) if gpu else card_of_size(vram) if vram else present_card()
    bf16 = card is None or card.bf16
    setup = setup_from(parameters.train, parameters.model, length=tokens, trained=trained, bf16=bf16)
    prediction = predict(architecture, setup)
    learnt = correction(observations_file(layout), card.name, bits=setup.bits) if card else None
    total = expected_bytes(prediction, learnt)

    described = f"{architecture.family}, {architecture.parameters:,} parameters"
    lines = [
        f"{described}; {setup.batch} blocks of {setup.length} tokens at once",
        *(f"  {name:<12} {tables.mib(getattr(prediction, name)):>9} MiB" for name in prediction.PARTS),
        f"  {'total':<12} {tables.mib(total):>9} MiB" + (f", corrected by {learnt.observations}" if learnt else ""),
        f"  {prediction.trainable:,} trained parameters",
    ]
    found: dict[str, Any] = {
        "model": {"family": architecture.family, "parameters": architecture.parameters, "layers": architecture.layers},
        "setup": vars(setup),
        "predicted": prediction.to_dict(),
        "expected": total,
    }
    chosen = None
    if card is not None:
        chosen = fit(architecture, setup, card.bytes, learnt)
        changes = settings_of(
            setup, chosen.setup, alpha=parameters.train.alpha, max_length=parameters.preprocess.max_length
        )
        found["card"] = {**vars(card), "limit": chosen.limit}
        found["fit"] = {
            "fits": chosen.fits,
            "steps": [vars(step) for step in chosen.steps],
            "settings": changes,
            "predicted": chosen.prediction.to_dict(),
            "expected": chosen.total,
        }
        lines += ["", f"On {card.name} ({tables.mib(chosen.limit)} MiB to use):"]
        for step in chosen.steps:
            mark = "fits" if step.fits else "too large"
            lines.append(f"  {step.change:<46} {tables.mib(step.total):>9} MiB  {mark}; gives up {step.gives_up}")
        lines += [f"  {key}: {value}" for key, value in changes.items()]
        if not chosen.fits:
            lines.append("  Nothing fits: take a larger card or a smaller base.")
    if compare:
        by_method, by_rank = tables.methods(architecture, setup), tables.grid(architecture, setup)
        found["methods"] = [{"method": name, **each.to_dict()} for name, each in by_method]
        found["ranks"] = [{"targets": t, "rank": r, **each.to_dict()} for t, r, each in by_rank]
        lines += ["", *tables.method_lines(by_method), "", "trained parameters / MiB", *tables.grid_lines(by_rank)]
    if write:
        if chosen is None:
            raise ParamsError("--apply needs a card, and there is none here", fix="name one with --gpu or --vram")
        if chosen.fits:
            apply(layout.params, found["fit"]["settings"])
            settings.load(layout)
            lines.append(f"  written to {layout.params}")
    answer(found, lines, as_json=as_json)
    if chosen is not None and not chosen.fits:
        raise typer.Exit(Exit.FAILED)
