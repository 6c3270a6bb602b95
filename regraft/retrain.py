"""The whole job, apart from who runs it: what would run and why, how it ended, and one at a time.

`flows/retrain.py` gives the order of the steps to Prefect; the steps themselves are in `regraft.steps`. A run with
nothing to do never gets as far as Prefect or MLflow: `plan` asks DVC, the registry's database and the last outcome.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from regraft import pipeline, steps, watch
from regraft.artifacts import digest_json, dir_digest, hold, read_json
from regraft.decision import Decision
from regraft.errors import Busy, Exit, RegraftError
from regraft.gates.verdict import Verdict, explain
from regraft.layout import STAGES, Layout
from regraft.register.lookup import champion as find_champion
from regraft.register.lookup import ledger, versions
from regraft.register.version import Version
from regraft.report import Report
from regraft.settings import Settings

EFFECTS = ("verdict", "register", "promote", "export")
State = Literal["promoted", "rejected", "waiting", "skipped", "nothing to do"]
_held: set[Path] = set()


class Outcome(Report):
    """How a retraining ended; `data/work/retrain.json` keeps the last one that did not fail."""

    state: State
    """`waiting`: the verdict passed, and a person has to promote it. `skipped`: the change of the data is not worth a
    training yet."""
    lines: list[str]
    """The outcome in words."""
    ran: list[str] = Field(default_factory=list)
    """Steps that did something."""
    version: int | None = None
    """The version that was registered; null for a rejected challenger, which has none."""
    champion: int | None = None
    """The version in use afterwards."""
    export: str | None = None
    """Folder of the champion's export."""
    fingerprint: str | None = None
    """The raw data that it began with; see `regraft.watch`."""
    key: str = ""
    """Digest of everything that decides whether there is anything to do; see `standing_key`."""

    @property
    def exit_code(self) -> int:
        """Exit code of the command that ended so."""
        return Exit.REFUSED if self.state == "rejected" else Exit.DONE


@dataclass(frozen=True)
class Plan:
    """What a retraining would do now; without `steps` there is nothing to do, and `standing` says how things are."""

    steps: dict[str, list[str]]
    """The steps in order, each with its reasons."""
    seconds: dict[str, float | None]
    """What each took the last time; None where that is not known."""
    standing: Outcome | None = None
    keep: Outcome | None = None
    """The outcome to remember for the present data; None where the plan did not look at the present data."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        standing = None if self.standing is None else self.standing.to_dict()
        return {"steps": self.steps, "seconds": self.seconds, "standing": standing}

    def lines(self) -> list[str]:
        """The plan in words."""
        if not self.steps:
            return [] if self.standing is None else self.standing.lines
        known = [self.seconds[name] for name in self.steps]
        lines = []
        for name, reasons in self.steps.items():
            lines.append(f"{name:<10} {_duration(self.seconds[name]):>10}  {reasons[0]}")
            lines += [f"{'':<10} {'':>10}  {reason}" for reason in reasons[1:6]]
            if len(reasons) > 6:
                lines.append(f"{'':<10} {'':>10}  and {len(reasons) - 6} more reasons")
        total = sum(each for each in known if each is not None)
        if not total:
            return [*lines, "how long it takes is known once each step has run"]
        more = ", and what is not known yet" if None in known else ""
        return [*lines, f"{_duration(total)} in all, by the last time each ran{more}"]


@contextmanager
def exclusive(layout: Layout, *, patience: float = 0) -> Iterator[None]:
    """Let one retraining at a time into a clone; entering again within the same process is free.

    Args:
        layout: the clone.
        patience: seconds to wait for another one to end.

    Raises:
        Busy: another process retrains, for longer than `patience`.
    """
    lock = layout.lock("retrain").absolute()
    if lock in _held:
        yield
        return
    deadline = time.monotonic() + patience
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold(lock, "retraining"))
                break
            except Busy:
                if time.monotonic() > deadline:
                    raise
                time.sleep(2.0)
        _held.add(lock)
        try:
            yield
        finally:
            _held.discard(lock)


def plan(layout: Layout, settings: Settings, fingerprint: str | None = None) -> Plan:
    """Say what a retraining would do now, and why; nothing is changed.

    Args:
        layout: the clone.
        settings: its parameters.
        fingerprint: the raw data that an event was about; if a retraining has ended with it, there is nothing to do.

    Raises:
        RegraftError: DVC cannot say what changed.
        ServiceUnavailable: the registry does not answer.
    """
    last = last_outcome(layout)
    if fingerprint is not None and last is not None and last.fingerprint == fingerprint:
        return Plan({}, {}, _nothing(last, "a retraining has ended with this data already"))
    if changed := pipeline.changed(layout):
        if last is not None and last.state == "skipped" and last.key == _skipped_key(layout, settings, changed):
            return Plan({}, {}, _nothing(last, "no input changed since this change of the data was left for later"))
        first = next(iter(changed))
        after = {name: [f"`{first}` and what follows it may give another challenger"] for name in EFFECTS}
        return _plan(layout, {**changed, **after})
    if last is not None and last.key == standing_key(layout, settings):
        return Plan({}, {}, _nothing(last, _since(last)), keep=last)
    champion = find_champion(settings.register_, layout)
    identity = steps.present_identity(layout)
    if champion is not None and champion.identity == identity:
        if is_export_current(layout, settings, champion):
            folder = str(layout.exports / champion.identity[:16])
            words = _words_of(layout, champion)
            standing = Outcome(state="promoted", lines=words, champion=champion.number, export=folder)
            return Plan({}, {}, _nothing(standing, "the champion is what the present data gives"), keep=standing)
        lacks = "an export under the present `export` section" if is_exported(layout, champion) else "an export"
        return _plan(layout, {"export": [f"the champion, version {champion.number}, lacks {lacks}"]})
    if (back := rolled_back(layout, settings)) is not None:
        standing = Outcome(
            state="waiting", lines=_decided(back), version=back.number, champion=champion and champion.number
        )
        return Plan({}, {}, _nothing(standing, "the registry is as a person left it"), keep=standing)
    why = "the challenger has not been judged against the present champion under the present rules"
    return _plan(layout, {name: [why] for name in EFFECTS})


def standing_key(layout: Layout, settings: Settings) -> str:
    """Return the digest of all that decides, with the stages unchanged, whether there is anything to do."""
    champion = find_champion(settings.register_, layout)
    try:
        evaluated = dir_digest(layout.stage("evaluate"))
    except RegraftError:
        evaluated = None
    return digest_json(
        {
            "evaluated": evaluated,
            "identity": steps.present_identity(layout),
            "champion": None if champion is None else champion.identity,
            "exported": champion is not None and is_export_current(layout, settings, champion),
            "gates": settings.gates.model_dump(mode="json"),
            "promote": settings.promote.model_dump(mode="json"),
            "export": settings.export.model_dump(mode="json", exclude={"keep"}),
        }
    )


def _skipped_key(layout: Layout, settings: Settings, changed: dict[str, list[str]]) -> str:
    """Return the digest of all that decides whether a change that was left for later is left again."""
    champion = find_champion(settings.register_, layout)
    try:
        rows = dir_digest(layout.stage("validate"))
    except RegraftError:
        rows = None
    return digest_json(
        {
            "changed": changed,
            "rows": rows,
            "champion": None if champion is None else champion.identity,
            "decide": settings.retrain.decide.model_dump(mode="json"),
        }
    )


def is_champion(layout: Layout, settings: Settings) -> Version | None:
    """Return the champion where it is what the present data gives, else None."""
    champion = find_champion(settings.register_, layout)
    return champion if champion is not None and champion.identity == steps.present_identity(layout) else None


def is_exported(layout: Layout, version: Version) -> bool:
    """Say whether a whole export of a version is there (its bytes are checked when it is used)."""
    return (layout.exports / version.identity[:16] / "manifest.json").is_file()


def is_export_current(layout: Layout, settings: Settings, version: Version) -> bool:
    """Say whether a version's export was made under the present parameters: `export` (but `keep`), `model.quantization`.

    Its certificate has the digest of all that it was made from; that digest is made again with the present parameters.
    """
    from regraft.export.export import export_key

    if not is_exported(layout, version):
        return False
    try:
        made = read_json(layout.exports / version.identity[:16] / "certificate.json")
        inputs = [made["identity"], made["adapter_digest"], made["base"]["digest"], made["tokenizer_digest"]]
        key = made["key"]
    except (RegraftError, KeyError, TypeError):
        return False  # damaged: the export finds that out and makes it again
    return bool(key == export_key(settings.export, settings.model.quantization, *inputs))


def rolled_back(layout: Layout, settings: Settings) -> Version | None:
    """Return the version of the present adapter where a person rolled it back and nobody promoted it since."""
    identity = steps.present_identity(layout)
    found = next((each for each in versions(settings.register_, layout) if each.identity == identity), None)
    if found is None:
        return None
    back = False
    for entry in ledger(settings.register_, layout):
        if entry.action == "rollback" and entry.previous == found.number:
            back = True
        elif entry.version == found.number:
            back = False
    return found if back else None


def conclude(
    layout: Layout,
    settings: Settings,
    *,
    ran: list[str],
    fingerprint: str | None,
    verdict: Verdict | None = None,
    version: Version | None = None,
    export: Path | None = None,
    decision: Decision | None = None,
) -> Outcome:
    """Say how a retraining ended, and remember it.

    Args:
        layout: the clone.
        settings: its parameters.
        ran: the steps that did something.
        fingerprint: the raw data that it began with.
        verdict: None where the present adapter is the champion already.
        version: the registered challenger; None for a rejected one, and where nothing was judged.
        export: folder of the export.
        decision: what was made of the change of the data, if it was looked at.
    """
    champion = find_champion(settings.register_, layout)
    state: State = "promoted"
    lines = [*(decision.lines if decision is not None else []), *(explain(verdict) if verdict is not None else [])]
    if decision is not None and decision.action == "skip":
        state = "skipped"
        lines.append(f"Version {decision.champion} stays the champion.")
    elif verdict is not None and not verdict.passed:
        state = "rejected"
        lines.append("The champion stays." if champion is not None else "There is no champion yet.")
    elif version is not None and (champion is None or champion.number != version.number):
        state = "waiting"
        lines.append(f"Version {version.number} is registered; `regraft promote {version.number}` makes it champion.")
    elif champion is not None and champion.identity == steps.present_identity(layout):
        lines.append(f"Version {champion.number} is the champion.")
    elif (back := rolled_back(layout, settings)) is not None:
        state, version = "waiting", back
        lines += _decided(back)
    if export is not None:
        lines.append(f"Its merged and checked export is {export}.")
    outcome = Outcome(
        state=state,
        lines=lines,
        ran=ran,
        version=None if version is None else version.number,
        champion=None if champion is None else champion.number,
        export=None if export is None else str(export),
        fingerprint=fingerprint,
        key=_skipped_key(layout, settings, pipeline.changed(layout))
        if state == "skipped"
        else standing_key(layout, settings),
    )
    outcome.save(_file(layout))
    return outcome


def remember(layout: Layout, settings: Settings, plan: Plan, fingerprint: str | None) -> Outcome:
    """Keep what a plan without steps found out, so that the next one is as quick; returns its outcome.

    Args:
        layout: the clone.
        settings: its parameters.
        plan: a plan without steps; one that ended at the fingerprint of an event has nothing to keep.
        fingerprint: the raw data as it was before the plan was made: data that came since then has not been looked at.
    """
    if plan.keep is not None and fingerprint is not None:
        kept = plan.keep.model_copy(update={"fingerprint": fingerprint, "key": standing_key(layout, settings)})
        if kept != last_outcome(layout):
            kept.save(_file(layout))
    return plan.standing or Outcome(state="nothing to do", lines=["Nothing to do."])


def last_outcome(layout: Layout) -> Outcome | None:
    """Return how the last retraining that did not fail ended; None where none has, or its record is unreadable."""
    try:
        return Outcome.load(_file(layout))
    except RegraftError:
        return None


def last_fingerprint(layout: Layout) -> str | None:
    """Return the raw data that the last retraining ended with."""
    last = last_outcome(layout)
    return None if last is None else last.fingerprint


def fingerprint_now(layout: Layout, settings: Settings) -> str | None:
    """Return the fingerprint of the raw data; None where a file is being written at this moment."""
    try:
        return watch.fingerprint(layout, settings.data.raw).digest
    except RegraftError:
        return None


def _file(layout: Layout) -> Path:
    return layout.work / "retrain.json"


def _nothing(standing: Outcome, why: str) -> Outcome:
    return standing.model_copy(
        update={"state": "nothing to do", "ran": [], "lines": [f"Nothing to do: {why}.", *standing.lines]}
    )


def _since(last: Outcome) -> str:
    if last.state == "rejected":
        return "no input changed since this challenger was refused"
    if last.state == "waiting":
        return "no input changed, and the challenger waits for a person"
    return "no input changed, and the champion is the same"


def _decided(back: Version) -> list[str]:
    return [
        f"The present data gives version {back.number}, which was rolled back.",
        f"`regraft register` judges it against the present champion, `regraft promote {back.number}` brings it back.",
    ]


def _words_of(layout: Layout, champion: Version) -> list[str]:
    lines = [f"Version {champion.number} is the champion."]
    folder = layout.exports / champion.identity[:16]
    return [*lines, f"Its merged and checked export is {folder}."]


def _plan(layout: Layout, todo: dict[str, list[str]]) -> Plan:
    return Plan(todo, {name: _seconds(layout, name) for name in todo})


def _seconds(layout: Layout, step: str) -> float | None:
    if step in STAGES:
        return pipeline.expected_seconds(layout, step)
    try:
        return float(read_json(layout.measurements(step))["seconds"])
    except (RegraftError, KeyError, TypeError, ValueError):
        return None


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 100:
        return f"about {max(seconds, 1):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
