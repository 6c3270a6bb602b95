"""The command `regraft`: each command calls one function of the library and shows what it returned.

Other packages add commands through the entry point group `regraft.commands` (each a `typer.Typer`).
"""

import gc
import os
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer

from regraft import signals
from regraft.command import Json, Remembering, Root, answer, clone, crashed, interrupted, progress, refused
from regraft.errors import Exit, RegraftError
from regraft.export.cli import commands as merge_commands
from regraft.inspect.cli import commands as inspect_commands
from regraft.plan.cli import commands as plan_commands
from regraft.preprocess.cli import commands as data_commands

HERE = Path()
app = typer.Typer(
    name="regraft",
    help="Keep a fine-tuned language model fresh: validate, fine-tune, prove, register, promote, export.",
    epilog="Exit codes: 0 done or nothing to do, 1 failed, 2 bad parameters or usage, 3 a gate said no, 4 busy, "
    "5 preempted after a checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(merge_commands)
app.add_typer(plan_commands)
app.add_typer(inspect_commands)
app.add_typer(data_commands)
STAGES, EFFECTS, WHOLE = "One stage, through DVC", "Judge, register, promote, export", "The whole job"
Upstream = Annotated[bool, typer.Option("--with-upstream", help="Bring up to date what this stage reads, too.")]
WHICH = "A number, an alias (champion, challenger), or the first 8 or more characters of an identity."
Version = Annotated[str, typer.Argument(help=WHICH)]
Reason = Annotated[str | None, typer.Option("--reason", help="Why; the ledger keeps it.")]


def main() -> None:
    """Run the command line and exit with its code."""
    merging = sys.argv[1:2] == ["merge"]
    if merging:
        gc.disable()  # torch makes 300,000 objects when it is imported; to look through them again and again took 0.2 s
    code = run(sys.argv[1:])
    if merging:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # all that it opened is closed; to take torch's modules apart took 0.5 s
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; no exception leaves, and no traceback is printed.

    Args:
        arguments: what follows `regraft` on the command line.
    """
    as_json = "--json" in arguments
    try:
        with signals.stop_on_signals():
            command_line()(arguments, prog_name="regraft")
    except SystemExit as end:
        if end.code == 130:  # how typer reports KeyboardInterrupt
            return interrupted(as_json=as_json)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except RegraftError as error:
        return refused(error, as_json=as_json)
    except KeyboardInterrupt:
        return interrupted(as_json=as_json)
    except Exception as error:  # noqa: BLE001 - the process boundary: the trace goes to a file, not to a person
        return crashed(error, as_json=as_json)
    return 0


@cache
def command_line() -> typer.Typer:
    """Return the command line with the commands of every installed package."""
    for entry in sorted(entry_points(group="regraft.commands"), key=lambda each: each.name):
        app.add_typer(entry.load())
    return app


@app.command(name="status", rich_help_panel=WHOLE)
def show_status(root: Root = HERE, as_json: Json = False) -> None:
    """Show the stages, the champion, the challenger, the last verdict and the export."""
    layout = clone(root)
    from regraft import settings, status

    found = status.status(layout, settings.load(layout))
    answer(found, status.status_lines(found), as_json=as_json)


@app.command(rich_help_panel=WHOLE)
def lineage(version: Version = "champion", root: Root = HERE, as_json: Json = False) -> None:
    """Show what made a version: data, code, parameters, base, reports and verdict."""
    layout = clone(root)
    from regraft import settings, status

    found = status.lineage_of(layout, settings.load(layout), version)
    answer(found, status.lineage_lines(found), as_json=as_json)


@app.command(rich_help_panel=WHOLE)
def diff(
    first: Annotated[str, typer.Argument(help=WHICH)],
    second: Version = "champion",
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Show what differs between two versions: data, code, parameters, packages, reports."""
    layout = clone(root)
    from regraft import settings, status

    found = status.difference(layout, settings.load(layout), first, second)
    answer(found, status.difference_lines(found), as_json=as_json)


@app.command(rich_help_panel=WHOLE)
def reproduce(
    version: Annotated[str, typer.Argument(help=WHICH)],
    out: Annotated[Path, typer.Option("--out", help="A new folder outside the clone: the checkout to make it in.")],
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Make a version again from its lineage in a clean checkout, and say: bit-equal, metric-equal or drifted, and where."""
    layout = clone(root)
    from regraft import settings
    from regraft.reproduce import reproduce as rebuild

    found = rebuild(layout, settings.load(layout), version, out)
    answer(found.to_dict(), found.lines(), as_json=as_json)
    if found.state == "drifted":
        raise typer.Exit(Exit.FAILED)


@app.command(rich_help_panel=STAGES)
def model(with_upstream: Upstream = False, root: Root = HERE, as_json: Json = False) -> None:
    """Make the base model ready: train the stand-in, or check the pinned weights."""
    _stage("model", with_upstream, root, as_json)


@app.command(rich_help_panel=STAGES)
def validate(with_upstream: Upstream = False, root: Root = HERE, as_json: Json = False) -> None:
    """Check the raw data against its contract; bad rows go to quarantine, each with its reasons."""
    _stage("validate", with_upstream, root, as_json)


@app.command(rich_help_panel=STAGES)
def preprocess(with_upstream: Upstream = False, root: Root = HERE, as_json: Json = False) -> None:
    """Render the accepted rows, split off the holdout, deduplicate, tokenise and pack."""
    _stage("preprocess", with_upstream, root, as_json)


@app.command(rich_help_panel=STAGES)
def train(with_upstream: Upstream = False, root: Root = HERE, as_json: Json = False) -> None:
    """Train an adapter; an interrupted training goes on from its newest whole checkpoint."""
    _stage("train", with_upstream, root, as_json)


@app.command(rich_help_panel=STAGES)
def evaluate(with_upstream: Upstream = False, root: Root = HERE, as_json: Json = False) -> None:
    """Let the base and the new adapter answer the holdout, and score every answer."""
    _stage("evaluate", with_upstream, root, as_json)


@app.command(rich_help_panel=EFFECTS)
def register(root: Root = HERE, as_json: Json = False) -> None:
    """Judge the trained adapter against the champion, and register it with its evidence as `challenger`."""
    layout = clone(root)
    from regraft import retrain, settings, steps
    from regraft.gates.verdict import explain

    parameters = settings.load(layout)
    if (champion := retrain.is_champion(layout, parameters)) is not None:  # nobody is judged against himself
        line = f"The present adapter is version {champion.number}, the champion."
        answer({"version": champion.to_dict(), "verdict": None}, [line], as_json=as_json)
        return
    verdict = steps.judge_and_save(layout, parameters)
    version = steps.register_challenger(layout, parameters)
    lines = [*explain(verdict), f"Registered as version {version.number}." if version else "It was not registered."]
    found = {"version": version and version.to_dict(), "verdict": verdict.to_dict()}
    answer(found, lines, as_json=as_json)
    if version is None:
        raise typer.Exit(Exit.REFUSED)


@app.command(rich_help_panel=EFFECTS)
def promote(version: Version = "challenger", reason: Reason = None, root: Root = HERE, as_json: Json = False) -> None:
    """Make a version the champion, if its verdict passed and was made against the present champion."""
    layout = clone(root)
    from regraft import settings, steps

    done = steps.promote_if_passed(layout, settings.load(layout), version, reason)
    _champion(done.version.number, done.previous, done.changed, as_json)


@app.command(rich_help_panel=EFFECTS)
def rollback(
    to: Annotated[str | None, typer.Option("--to", help=f"Go back to this version. {WHICH}")] = None,
    reason: Reason = None,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Make the champion before the present one the champion again; `retrain` will not undo it."""
    layout = clone(root)
    from regraft import settings
    from regraft.register.promote import rollback as roll_back

    done = roll_back(settings.load(layout).register_, layout, to, reason=reason)
    _champion(done.version.number, done.previous, done.changed, as_json)


@app.command(rich_help_panel=EFFECTS)
def export(
    version: Version = "champion", remembering: Remembering = False, root: Root = HERE, as_json: Json = False
) -> None:
    """Merge a version into its base, prove the merged files on disk, and publish them."""
    layout = clone(root)
    from regraft import settings, steps

    done = steps.export_version(layout, settings.load(layout), version, remembering=remembering)
    lines = [f"Version {done.version} is exported{'' if done.new else ' already'}: {done.folder}"]
    answer({"version": done.version, "folder": str(done.folder), "new": done.new}, lines, as_json=as_json)


@app.command(rich_help_panel=STAGES)
def parent(
    version: Version = "champion",
    none: Annotated[bool, typer.Option("--none", help="Start the next training afresh.")] = False,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Fetch a version's adapter and let the next training go on from it: writes train.parent in params.yaml."""
    layout = clone(root)
    from regraft import settings
    from regraft.parent import set_parent

    done = set_parent(layout, settings.load(layout), None if none else version)
    line = f"The next training goes on from version {done.number}: {done.adapter}"
    answer(vars(done), ["The next training starts afresh." if done.number is None else line], as_json=as_json)


def _champion(number: int, previous: int | None, changed: bool, as_json: bool) -> None:
    before = "there was none before" if previous is None else f"before it was version {previous}"
    line = f"Version {number} is the champion; {before}." if changed else f"Version {number} was the champion already."
    answer({"champion": number, "previous": previous, "changed": changed}, [line], as_json=as_json)


def _stage(name: str, with_upstream: bool, root: Path, as_json: bool) -> None:
    """Bring one stage up to date, or it and all that it reads, and say what was done."""
    layout = clone(root)
    from regraft import pipeline, settings, steps

    parameters = settings.load(layout)
    names = [*(pipeline.UPSTREAM[name] if with_upstream else ()), name]
    if not with_upstream and pipeline.UPSTREAM[name]:
        stale = [each for each in pipeline.changed(layout) if each in pipeline.UPSTREAM[name]]
        if stale:
            progress(f"note: {', '.join(stale)} would run first; `regraft {name} --with-upstream` runs it too")
    done = [steps.bring_up(layout, parameters, each) for each in names]
    report = layout.stage(name) / "report.json"
    found = {"stages": [vars(each) for each in done], "report": str(report)}
    answer(found, [f"report: {report}"], as_json=as_json)
