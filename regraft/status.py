"""How a clone is: stages, champion, challenger, last verdict, export; and what made a version. Nothing is changed."""

import re
from typing import Any

from regraft import pipeline, retrain
from regraft.artifacts import read_json
from regraft.errors import Exit, RegraftError
from regraft.gates.verdict import explain, load_verdict
from regraft.layout import STAGES, Layout
from regraft.register.lookup import ledger, versions
from regraft.register.lookup import version as find_version
from regraft.register.version import CHALLENGER, CHAMPION, FORGET_TAG, Version
from regraft.settings import Settings


def status(layout: Layout, settings: Settings) -> dict[str, Any]:
    """Say how everything is.

    Returns:
        stages: for each stage `state` (up to date, changed, failed, never ran), `reasons` and the last `error`.
        champion, challenger: version or null. versions: how many there are. ledger: its last entry or null.
        verdict: `passed`, `lines` and whether it is about the present champion; null where there is none.
        export: folder of the champion's export or null. last: how the last retraining ended or null.

    Raises:
        RegraftError: DVC cannot say what changed, or the registry does not answer.
    """
    changed = pipeline.changed(layout)
    known = versions(settings.register_, layout)
    champion = next((each for each in known if CHAMPION in each.aliases), None)
    challenger = next((each for each in known if CHALLENGER in each.aliases), None)
    entries = ledger(settings.register_, layout)
    last = retrain.last_outcome(layout)
    exported = champion is not None and retrain.is_exported(layout, champion)
    return {
        "stages": {name: _stage(layout, name, changed.get(name)) for name in STAGES},
        "champion": champion and _short(champion),
        "challenger": challenger and _short(challenger),
        "versions": len(known),
        "ledger": entries[-1].to_dict() if entries else None,
        "verdict": _verdict(layout, champion),
        "export": str(layout.exports / champion.identity[:16]) if champion is not None and exported else None,
        "last": last and last.to_dict(),
    }


def status_lines(found: dict[str, Any]) -> list[str]:
    """Return `status` in words."""
    lines = ["Stages"]
    for name, stage in found["stages"].items():
        lines.append(f"  {name:<12} {stage['state']}")
        lines += [f"  {'':<12}   {reason}" for reason in [*stage["reasons"][:5], *filter(None, [stage["error"]])]]
    for name in (CHAMPION, CHALLENGER):
        version = found[name]
        lines.append(f"{name.capitalize():<14} {_words(version) if version else 'none yet'}")
    entry = found["ledger"]
    if entry is not None:
        lines.append(
            f"{'Last change':<14} {entry['action']} to version {entry['version']} at {entry['at']}: {entry['reason']}"
        )
    lines.append(f"{'Export':<14} {found['export'] or 'none of the champion'}")
    verdict = found["verdict"]
    if verdict is None:
        return [*lines, f"{'Last verdict':<14} none yet"]
    stale = "" if verdict["current"] else " (made against another champion than the present one)"
    return [*lines, f"Last verdict{stale}", *(f"  {line}" for line in verdict["lines"])]


def lineage_of(layout: Layout, settings: Settings, which: str) -> dict[str, Any]:
    """Return what made a version, checked against its digests, with the version itself under `version`.

    Raises:
        MissingInput: there is no such version, or the registry has lost its files.
        DamagedArtifact: its files are not those that were registered.
        ServiceUnavailable: the registry does not answer.
    """
    from regraft.lineage import lineage

    version = find_version(settings.register_, layout, which)
    return {"version": version.to_dict(), **lineage(version)}


def lineage_lines(found: dict[str, Any]) -> list[str]:
    """Return a lineage in words: two levels, long texts cut (`--json` has all of it)."""
    lines = []
    for section, content in found.items():
        if not isinstance(content, dict):
            lines.append(f"{section}: {_cut(content)}")
            continue
        lines.append(section)
        for name, value in content.items():
            if isinstance(value, dict) and value:
                lines.append(f"  {name}")
                lines += [f"    {inner}: {_cut(each)}" for inner, each in value.items()]
            else:
                lines.append(f"  {name}: {_cut(value)}")
    return lines


def difference(layout: Layout, settings: Settings, first: str, second: str) -> dict[str, Any]:
    """Return what differs between two versions: their numbers under `versions`, the rest as `regraft.lineage.diff`.

    Raises:
        MissingInput, DamagedArtifact, ServiceUnavailable: as in `lineage_of`.
    """
    from regraft.lineage import diff

    one, two = (lineage_of(layout, settings, which) for which in (first, second))
    numbers = [one.pop("version")["number"], two.pop("version")["number"]]
    return {"versions": numbers, "differs": diff(one, two)}


def difference_lines(found: dict[str, Any]) -> list[str]:
    """Return a difference in words: data, parameters and packages by name; digests and lists by section."""
    first, second = found["versions"]
    differs = found["differs"]
    if not differs:
        return [f"Versions {first} and {second} were made from the same."]
    lines = [f"What differs between version {first} and version {second}:"]
    for name, change in differs.get("raw", {}).items():
        rows = " -> ".join("none" if each is None else f"{each} rows" for each in change["rows"])
        lines.append(f"  {name}: {change['changed']} ({rows})")
    followed = []
    for section, changes in differs.items():
        told = (
            {name: pair for name, pair in changes.items() if not _is_digest(pair) and not _is_list(pair)}
            if section != "raw"
            else {}
        )
        lines += [f"  {section}.{name}: {_cut(old)} -> {_cut(new)}" for name, (old, new) in told.items()]
        if section != "raw" and len(told) < len(changes):
            followed.append(f"{section} ({len(changes) - len(told)})")
    if followed:
        lines.append(f"  digests and lists that differ, too: {', '.join(followed)}; `--json` has them")
    return lines


_DIGEST = re.compile(r"(refs/regraft/)?[0-9a-f]{16,}(\.dir)?")


def _is_list(pair: list[Any]) -> bool:
    return any(isinstance(each, list) for each in pair)


def _is_digest(pair: list[Any]) -> bool:
    return all(each is None or (isinstance(each, str) and _DIGEST.fullmatch(each)) for each in pair)


def _stage(layout: Layout, name: str, reasons: list[str] | None) -> dict[str, Any]:
    try:
        outcome = read_json(layout.outcome(name))
    except RegraftError:
        outcome = {}
    failed = outcome.get("exit_code", Exit.DONE) != Exit.DONE
    error = (outcome.get("error") or {}).get("message") if failed and reasons else None
    made = (layout.stage(name) / "manifest.json").is_file()
    state = "up to date" if not reasons else "failed" if error else "changed" if made else "never ran"
    return {
        "state": state,
        "reasons": reasons or [],
        "error": error,
        "seconds": pipeline.expected_seconds(layout, name),
    }


def _verdict(layout: Layout, champion: Version | None) -> dict[str, Any] | None:
    try:
        verdict = load_verdict(layout.verdict)
    except RegraftError:
        return None
    judged = verdict.judged
    against = "none" if champion is None else champion.adapter_digest
    current = judged.get("champion") == against or (champion is not None and judged.get("adapter") == against)
    return {"passed": verdict.passed, "lines": explain(verdict), "current": current, "judged": judged}


def _short(version: Version) -> dict[str, Any]:
    return {
        "number": version.number,
        "name": version.name,
        "identity": version.identity,
        "adapter": version.adapter_digest,
        "verdict": version.verdict,
        "forgets": FORGET_TAG in version.tags,
    }


def _words(version: dict[str, Any]) -> str:
    mark = "; it was trained on rows that are to be forgotten" if version["forgets"] else ""
    return (
        f"{version['name']} version {version['number']}, adapter {version['adapter'][:16]}, {version['verdict']}{mark}"
    )


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."
