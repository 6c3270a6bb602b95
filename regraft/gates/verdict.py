"""What a gate says: a verdict with its checks, its reasons, and the digests of what it judged."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from regraft.artifacts import commit_dir, digest_file, verify_dir
from regraft.errors import DamagedArtifact, MissingInput, RegraftError
from regraft.report import Report

VERDICT, SUMMARY = "verdict.json", "summary.txt"


def _finite(value: Any) -> Any:
    """Keep NaN and infinities out of JSON: such a measurement is none."""
    return None if isinstance(value, float) and not isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class Check(BaseModel):
    """One question, with what was measured and what was asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    passed: bool
    detail: str
    """A sentence for people."""
    decisive: bool = True
    """False: reported for people, the verdict does not hang on it."""
    measured: Number = None
    threshold: Number = None
    low: Number = None
    """Lower end of the interval of `measured`."""
    high: Number = None
    rows: int | None = None
    """Rows that it was measured on."""


class Verdict(Report):
    """A gate's answer; it passed exactly when it has a decisive check and all of those passed."""

    gate: str
    passed: bool
    reasons: list[str]
    """Sentences of the decisive checks that did not pass."""
    checks: list[Check]
    judged: dict[str, str]
    """Digests of what was judged, by name; `champion` is `none` where there was none."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        failed = [each.detail for each in self.checks if each.decisive and not each.passed]
        if self.passed != (not failed and any(each.decisive for each in self.checks)) or self.reasons != failed:
            raise ValueError("`passed` and `reasons` that follow from the checks")
        return self


def decide(gate: str, checks: Sequence[Check], judged: Mapping[str, str]) -> Verdict:
    """Make a verdict of its checks; without a decisive check it is a no."""
    if not any(each.decisive for each in checks):
        checks = [*checks, no_evidence("nothing was checked")]
    failed = [each.detail for each in checks if each.decisive and not each.passed]
    return Verdict(gate=gate, passed=not failed, reasons=failed, checks=list(checks), judged=dict(judged))


def no_evidence(why: str) -> Check:
    """Return the check that fails because evidence is missing, unreadable or about something else."""
    return Check(name="evidence", passed=False, detail=f"No evidence: {why}")


def refuse(gate: str, why: str, judged: Mapping[str, str]) -> Verdict:
    """Return the no of a gate that has nothing to judge from."""
    return decide(gate, [no_evidence(why)], judged)


def closed(gate: str, judged: Mapping[str, str], question: Callable[[], Verdict]) -> Verdict:
    """Ask a gate; evidence that is missing or unreadable is a no, with the reason."""
    try:
        return question()
    except (RegraftError, OSError) as error:
        return refuse(gate, error.message if isinstance(error, RegraftError) else str(error), judged)


def same(expected: Mapping[str, str], found: Mapping[str, str], what: str) -> list[Check]:
    """Compare the digests that a report names with those of what is to be judged; a stale report gives a failed check."""
    return [
        no_evidence(f"{what} is about the {name} {found.get(name, 'of no digest')[:16]}, to be judged is {digest[:16]}")
        for name, digest in expected.items()
        if found.get(name) != digest
    ]


def at_least(name: str, measured: float, threshold: float, what: str, *, rows: int | None = None) -> Check:
    """Return the check that `measured` is finite and not under `threshold`; `what` is its name in a sentence."""
    passed = isfinite(measured) and measured >= threshold
    detail = f"{what}: {number(measured)}, {'and' if passed else 'but'} at least {number(threshold)} is asked for."
    return Check(name=name, passed=passed, detail=detail, measured=measured, threshold=threshold, rows=rows)


def at_most(name: str, measured: float, threshold: float, what: str, *, rows: int | None = None) -> Check:
    """Return the check that `measured` is finite and not over `threshold`; `what` is its name in a sentence."""
    passed = isfinite(measured) and measured <= threshold
    detail = f"{what}: {number(measured)}, {'and' if passed else 'but'} at most {number(threshold)} is allowed."
    return Check(name=name, passed=passed, detail=detail, measured=measured, threshold=threshold, rows=rows)


def none_of(name: str, found: Iterable[object], what: str) -> Check:
    """Return the check that there is no such thing; `what` names it in the plural."""
    listed = [str(each) for each in found]
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    detail = f"{what}: {', '.join(listed[:5])}{more}." if listed else f"{what}: none."
    return Check(name=name, passed=not listed, detail=detail, measured=len(listed), threshold=0)


def number(value: float) -> str:
    """Write a number as people do: whole ones whole, others with four digits."""
    return f"{value:.0f}" if isfinite(value) and value == int(value) else f"{value:.4g}"


def explain(verdict: Verdict) -> list[str]:
    """Return the verdict in sentences: the answer first, then what speaks against it, then what was found."""
    failed = [each for each in verdict.checks if each.decisive and not each.passed]
    found = [each for each in verdict.checks if each not in failed and not each.name.startswith("slice[")]
    noted = []
    if verdict.gate == "run":  # of what went well, only the comparison is news
        noted = [each for each in found if not each.passed and each.name.startswith(("drift.", "freshness."))]
        found = [each for each in found if each.name.startswith("comparison.") and ".slice[" not in each.name]
    champion = verdict.judged.get("champion", "none")
    against = "no champion yet" if champion == "none" else f"champion {champion[:8]}"
    answer = "Yes" if verdict.passed else "No"
    first = f"{answer}: challenger {verdict.judged.get('adapter', 'unknown')[:8]}, {against}."
    told = [*(f"against: {each.detail}" for each in failed), *(each.detail for each in found)]
    return [first, *told, *(f"note: {each.name.split('.')[0]}: {each.detail}" for each in noted)]


def save_verdict(verdict: Verdict, folder: Path) -> str:
    """Write `verdict.json` and `summary.txt` into `folder`, whole or not at all; return the sha256 of `verdict.json`."""
    with commit_dir(folder) as temporary:
        verdict.save(temporary / VERDICT)
        (temporary / SUMMARY).write_text("\n".join(explain(verdict)) + "\n", encoding="utf-8")
    return digest_file(folder / VERDICT)


def load_verdict(folder: Path) -> Verdict:
    """Read a verdict after checking its folder's bytes.

    Raises:
        MissingInput: there is none.
        DamagedArtifact: bytes differ from the manifest, or it is no verdict.
    """
    verify_dir(folder)
    if not (folder / VERDICT).is_file():
        raise MissingInput(f"{folder} holds no {VERDICT}", fix="regraft evaluate")
    try:
        return Verdict.load(folder / VERDICT)
    except ValueError as error:
        raise DamagedArtifact(f"{folder / VERDICT} is not a verdict: {error}") from error
