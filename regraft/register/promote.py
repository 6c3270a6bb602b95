"""`promote` and `rollback`: which version is the champion, decided by a ledger that nobody can overtake.

The ledger is kept as tags of the registered model, one for each change (`regraft.ledger.000001`); there is no second
copy that could differ. The alias `champion` is what its last entry says. MLflow's aliases are last-writer-wins, so
an entry is claimed first: `NAME--promotion-000007` is created as a registered model of its own, with the entry in its
tags, and MLflow creates a name once, whoever asks and from wherever. Then

    1. the claim is made     2. the entry is written     3. the alias is moved and read back     4. the claim is removed

Killed in between, the claim stays; whoever comes next finishes it, from its tags, before anything else. A promoter
that comes second therefore sees the new champion, and its verdict, made against the old one, is refused.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from regraft.artifacts import canonical_json
from regraft.errors import DamagedArtifact, GateRefused, MissingInput
from regraft.failpoints import failpoint
from regraft.gates.verdict import Verdict
from regraft.layout import Layout
from regraft.register import lookup
from regraft.register.clean import taint
from regraft.register.evidence import NO_CHAMPION, RUN
from regraft.register.fetch import files_of, read_verdict
from regraft.register.params import RegisterParams
from regraft.register.service import Answer, Service
from regraft.register.version import (
    CHALLENGER,
    CHAMPION,
    Entry,
    Version,
    champions,
    shorten,
    was_champion,
)
from regraft.snapshot import git_user

_ENTRY = "regraft.entry"
_ROUNDS = 20  # looks at a state that others are changing
_EXISTS, _MISSING = "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"


@dataclass(frozen=True)
class Promotion:
    """What a promotion or rollback did."""

    version: Version
    """The champion now."""
    previous: int | None
    """Version number of the champion before; its own where nothing changed."""
    changed: bool
    """False where it was the champion already."""
    entry: Entry | None
    """The ledger's last entry; None where the ledger is empty."""


@dataclass(frozen=True)
class _State:
    """The registered model at one moment."""

    versions: list[Version]
    entries: list[Entry]
    champion: Version | None


def promote(
    params: RegisterParams, layout: Layout, which: str | int = CHALLENGER, *, reason: str | None = None
) -> Promotion:
    """Make a version the champion.

    Args:
        params: the section `register`.
        layout: the clone.
        which: a version number, an alias or the beginning of an identity.
        reason: kept in the ledger; the verdict's summary unless given.

    Raises:
        GateRefused: its verdict is missing, against it, or was not made against the present champion; or the alias
            was moved by something else than Regraft; or it learnt, or may have learnt, what is to be forgotten.
        DamagedArtifact: its files are not those that were registered.
        MissingInput: there is no such version.
        ServiceUnavailable: MLflow does not answer; the same command can be repeated.
    """
    service = Service.of(params, layout, again=f"regraft promote {which}")

    def attempt() -> Promotion | None:
        state, finished = _settled(service, params)
        version = lookup.pick(state.versions, which, params.model_name)
        if state.champion is not None and state.champion.number == version.number:
            return _nothing_to_do(state, version, finished)
        _agrees(state)
        _remembers_nothing(version, taint(version, state.versions, layout))
        verdict = _allowed(version, state.champion)
        with files_of(version):
            pass  # every byte was hashed
        why = reason or f"verdict passed against {state.champion.label() if state.champion else 'no champion'}"
        return _change(service, params, layout, state, version, "promote", why, verdict)

    return _until_done(service, attempt)


def rollback(
    params: RegisterParams, layout: Layout, to: str | int | None = None, *, reason: str | None = None
) -> Promotion:
    """Make the champion before the present one the champion again, or the version `to`.

    Its files are hashed; its verdict was made when it was promoted. Repeated after a kill, it finishes the one that was
    interrupted and goes no further back.

    Raises:
        MissingInput: there is no champion to go back to, or no such version.
        GateRefused: `to` never was the champion; `promote` asks for a verdict against the present one.
        DamagedArtifact: its files are not those that were registered.
        ServiceUnavailable: MLflow does not answer; the same command can be repeated.
    """
    service = Service.of(params, layout, again="regraft rollback")

    left: list[Version | None] = []  # the champion that this call found first: it goes back from there, once

    def attempt() -> Promotion | None:
        state, finished = _settled(service, params)
        last = state.entries[-1] if state.entries else None
        left.append(state.champion)
        if to is None:
            _agrees(state)
            mine = last is not None and left[0] is not None and last.previous == left[0].number
            if state.champion is not None and last is not None and last.action == "rollback" and (finished or mine):
                return Promotion(state.champion, last.previous, True, last)
            stack = champions(state.entries)
            if len(stack) < 2:
                raise MissingInput(
                    f"{params.model_name} has no champion to go back to: the ledger has {len(stack)}",
                    fix="`regraft rollback --to VERSION` names one",
                )
            version = lookup.pick(state.versions, stack[-2], params.model_name)
        else:
            version = lookup.pick(state.versions, to, params.model_name)
        if state.champion is not None and state.champion.number == version.number:
            return _nothing_to_do(state, version, finished)
        if not was_champion(state.entries, version):
            raise GateRefused(
                f"{version.label()} never was the champion: there is nothing to go back to",
                fix=f"`regraft promote {version.number}` makes it the champion if its verdict allows it",
            )
        _remembers_nothing(version, taint(version, state.versions, layout, by_list=False))
        with files_of(version):
            pass  # every byte was hashed
        return _change(
            service, params, layout, state, version, "rollback", reason or "asked for", version.verdict_digest
        )

    return _until_done(service, attempt)


def _until_done(service: Service, attempt: Callable[[], Promotion | None]) -> Promotion:
    """Try again from the beginning while somebody else is faster."""
    while True:
        done = service.repeated(attempt)
        if done is not None:
            return done


def _nothing_to_do(state: _State, version: Version, finished: Entry | None) -> Promotion:
    """It is the champion: since before, or because this call finished what was interrupted."""
    if finished is not None and finished.version == version.number:
        return Promotion(version, finished.previous, True, finished)
    return Promotion(version, version.number, False, state.entries[-1] if state.entries else None)


def _settled(service: Service, params: RegisterParams) -> tuple[_State, Entry | None]:
    """Read the state between two changes, after finishing one that was begun and not ended; returns that one, too.

    MLflow reads a model, its tags and its aliases one after the other, while others write: a state counts once it was
    read twice the same, with no claim in between.
    """
    finished: Entry | None = None
    before = _read(service, params)
    for _ in range(_ROUNDS):
        claim = _pending(service, params, len(before.entries))
        if claim is None:
            state = _read(service, params)
            if state == before:
                return state, next((each for each in state.entries if each == finished), None)
        else:
            finished = _help(service, params, before, claim)
            state = _read(service, params)
        before = state
    raise service.unavailable("the champion is changed by others all the time")


def _pending(service: Service, params: RegisterParams, entries: int) -> Entry | None:
    """Return the entry that is claimed and not done with, where the ledger has so many."""
    for number in (entries + 1, entries):
        for _ in range(_ROUNDS):
            claim = service.model(_claim(params, number))
            if claim is None:
                break
            if _ENTRY in claim.tags:
                return lookup.entry(claim.tags[_ENTRY])
            time.sleep(0.05)  # it is being deleted: its tags are gone already
        else:
            raise DamagedArtifact(
                f"MLflow's registered model {_claim(params, number)} is not a claim of Regraft's", fix="delete it"
            )
    return None


def _help(service: Service, params: RegisterParams, state: _State, entry: Entry) -> Entry | None:
    """Carry out a claimed entry; None where that is not possible any more."""
    if entry.number > len(state.entries) and all(each.number != entry.version for each in state.versions):
        _unclaim(service, params, entry.number)  # its version was deleted in the meantime: it never happened
        return None
    _finish(service, params, entry)
    return entry


def _read(service: Service, params: RegisterParams) -> _State:
    model = service.model(params.model_name)
    versions = [] if model is None else service.versions(params.model_name, model=model)
    champion = next((each for each in versions if CHAMPION in each.aliases), None)
    return _State(versions, [] if model is None else lookup.entries(model.tags), champion)


def _agrees(state: _State) -> None:
    """Refuse to go on when the alias was moved behind the ledger's back: nobody judged that champion's rival."""
    expected = state.entries[-1].version if state.entries else None
    found = state.champion.number if state.champion else None
    if state.entries and found != expected:
        raise GateRefused(
            f"the alias `champion` is on version {found or 'none'}, the ledger says {expected}: it was moved by hand",
            fix=f"`regraft rollback --to {expected}` takes it back",
        )


def _remembers_nothing(version: Version, why: str | None) -> None:
    """Refuse a version that was, or may have been, trained on rows which are to be forgotten."""
    if why is not None:
        ancestor = "`regraft parent --none`, then " if "went on from" in why else ""
        raise GateRefused(f"{version.label()} {why}", fix=f"{ancestor}`regraft retrain` makes a version without them")


def _allowed(version: Version, champion: Version | None) -> str:
    """Check that a version's verdict lets it replace this champion; returns the verdict's digest."""
    verdict, problems = judged(version)
    present = NO_CHAMPION if champion is None else champion.adapter_digest
    if verdict.judged.get("champion") != present:
        against = verdict.judged.get("champion", "nothing")
        now = "there is none" if champion is None else f"it is {champion.label()} ({present[:8]})"
        problems.append(f"its verdict was made against the champion {against[:8]}, and now {now}")
    if problems:
        raise GateRefused(
            f"{version.label()} cannot be promoted: " + "; ".join(problems),
            fix="`regraft retrain` judges the challenger against the present champion",
        )
    return version.verdict_digest


def judged(version: Version) -> tuple[Verdict, list[str]]:
    """Read a version's last verdict; returns it with what speaks against the version, whoever is the champion."""
    if not version.complete:
        raise GateRefused(f"{version.label()} was not registered by Regraft: there is no evidence for it")
    verdict = read_verdict(version)
    problems = []
    if not verdict.passed or version.verdict != "passed":
        problems.append("it was refused: " + ("; ".join(verdict.reasons) or "no reason given"))
    if verdict.gate != RUN:
        problems.append(f"its verdict is of the gate {verdict.gate}, not of all gates")
    if verdict.judged.get("adapter") != version.adapter_digest:
        problems.append("its verdict is about another adapter")
    return verdict, problems


def _change(
    service: Service,
    params: RegisterParams,
    layout: Layout,
    state: _State,
    version: Version,
    action: Literal["promote", "rollback"],
    reason: str,
    verdict: str,
) -> Promotion | None:
    """Claim the ledger's next entry and carry it out; None where somebody else was faster."""
    entry = Entry(
        number=len(state.entries) + 1,
        action=action,
        previous=state.champion.number if state.champion else None,
        version=version.number,
        adapter=version.adapter_digest,
        verdict=verdict,
        reason=shorten(reason),
        who=git_user(layout.root),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    failpoint("promote.claim")
    try:
        service.ask("create_registered_model", _claim(params, entry.number), tags={_ENTRY: _json(entry)})
    except Answer as answer:
        if answer.code != _EXISTS:
            raise
        return None
    failpoint("promote.claimed")
    model = service.model(params.model_name)
    if model is None or entry.tag in model.tags:  # the number was taken and done with while we looked
        _unclaim(service, params, entry.number)
        return None
    _finish(service, params, entry)
    present = _read(service, params).champion
    if present is None or present.number != version.number:
        return None  # overtaken by a later change: look again
    return Promotion(present, entry.previous, True, entry)


def _finish(service: Service, params: RegisterParams, entry: Entry) -> None:
    """Write a claimed entry, move the alias, read it back, and give the claim up; may be done twice.

    The tags are read after the claim was: a claim that came too late, for a number that is done with, writes nothing.
    """
    failpoint("promote.ledger")
    model = service.model(params.model_name)
    if model is not None and entry.tag not in model.tags:
        service.ask("set_registered_model_tag", params.model_name, entry.tag, _json(entry))
    while True:
        failpoint("promote.alias")
        model = service.model(params.model_name)
        if model is None:
            raise MissingInput(f"the registered model {params.model_name} was deleted")
        last = lookup.entries(model.tags)[-1]
        if int(model.aliases.get(CHAMPION, 0)) == last.version:
            break
        service.ask("set_registered_model_alias", params.model_name, CHAMPION, str(last.version))
    failpoint("promote.done")
    _unclaim(service, params, entry.number)


def _claim(params: RegisterParams, number: int) -> str:
    return f"{params.model_name}--promotion-{number:06d}"


def _unclaim(service: Service, params: RegisterParams, number: int) -> None:
    try:
        service.ask("delete_registered_model", _claim(params, number))
    except Answer as answer:
        if answer.code != _MISSING:  # somebody else has finished it
            raise


def _json(entry: Entry) -> str:
    return canonical_json(entry.to_dict()).decode()
