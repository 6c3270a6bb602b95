"""Is the data still like what the champion learnt from, and at least as new?

Two measures of how two distributions differ: the population stability index (Lewis, An Introduction to Credit Scoring,
1994; over 0.25 is commonly called a shift) and the Jensen-Shannon divergence in bits (Lin, IEEE Trans. Inf. Theory 37,
1991; at most 1). Both are above zero by chance, the more so the more values there are and the fewer rows: what a
bootstrap of the pooled counts reaches by chance is taken off before the threshold is asked.
"""

from collections.abc import Mapping
from datetime import UTC, datetime

import numpy as np

from regraft.gates.params import DriftGate, FreshnessGate
from regraft.gates.profile import Profile
from regraft.gates.verdict import Check, Verdict, decide, number

DRIFT, FRESHNESS = "drift", "freshness"


def judge_drift(params: DriftGate, present: Profile, champion: Profile | None, *, judged: Mapping[str, str]) -> Verdict:
    """Compare the present rows with those that the champion learnt from, part by part.

    Args:
        params: thresholds.
        present: of the accepted rows.
        champion: that was registered with the champion; None where there is none.
        judged: digests of what is judged.
    """
    if champion is None:
        detail = "There is no champion whose data could be compared with."
        return decide(DRIFT, [Check(name="champion", passed=True, detail=detail)], judged)
    random = np.random.default_rng(params.seed)
    checks = []
    for part in sorted(set(present.parts) | set(champion.parts)):
        new, old = _aligned(present.parts.get(part, {}), champion.parts.get(part, {}))
        if min(new.sum(), old.sum()) < params.min_rows:
            detail = f"{part}: {new.sum()} and {old.sum()} rows are too few to compare."
            checks.append(Check(name=part, passed=True, decisive=False, detail=detail))
        else:
            checks.append(_compare(params, part, new, old, random))
    return decide(DRIFT, checks, judged)


def judge_freshness(
    params: FreshnessGate, present: Profile, champion: Profile | None, *, now: datetime, judged: Mapping[str, str]
) -> Verdict:
    """Ask whether the newest row is recent, and not older than what the champion learnt from.

    Args:
        params: ages.
        present: of the accepted rows.
        champion: that was registered with the champion; None where there is none.
        now: the present time, with its zone.
        judged: digests of what is judged.
    """
    newest = _time(present.newest)
    checks = []
    if newest is None:
        told = (
            "no row says when it is from" if present.newest is None else f"the newest row's time is {present.newest!r}"
        )
        asked = params.max_age_days is not None
        detail = f"Freshness cannot be judged: {told}."
        checks.append(Check(name="time", passed=not asked, detail=detail))
    else:
        age = (now - newest).total_seconds() / 86_400
        limit = params.max_age_days
        asked_for = "" if limit is None else f", {'and' if age <= limit else 'but'} at most {number(limit)} are allowed"
        detail = f"The newest row is of {present.newest}, {age:.1f} days old{asked_for}."
        checks.append(
            Check(name="age", passed=limit is None or age <= limit, detail=detail, measured=age, threshold=limit)
        )
        known = None if champion is None else _time(champion.newest)
        if champion is not None and known is not None:
            detail = (
                f"The newest row is of {present.newest}, the newest that the champion learnt from of {champion.newest}."
            )
            checks.append(Check(name="champion", passed=newest >= known, detail=detail))
    return decide(FRESHNESS, checks, judged)


def stability_index(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Return the population stability index of counts along the last axis, half a count added to each."""
    p, q = _shares(new), _shares(old)
    index: np.ndarray = ((p - q) * np.log(p / q)).sum(axis=-1)
    return index


def divergence(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Return the Jensen-Shannon divergence of counts along the last axis, in bits; 0 to 1."""
    p, q = _shares(new), _shares(old)
    middle = (p + q) / 2
    bits: np.ndarray = ((p * np.log2(p / middle)).sum(axis=-1) + (q * np.log2(q / middle)).sum(axis=-1)) / 2
    return bits


def _compare(params: DriftGate, part: str, new: np.ndarray, old: np.ndarray, random: np.random.Generator) -> Check:
    pooled = (new + old) / (new + old).sum()
    by_chance = [random.multinomial(int(each.sum()), pooled, size=params.resamples) for each in (new, old)]
    told, over = [], False
    for name, measure, threshold in (
        ("stability index", stability_index, params.max_index),
        ("divergence", divergence, params.max_divergence),
    ):
        found = float(measure(new, old))
        chance = float(np.quantile(measure(*by_chance), params.confidence))
        over |= found - chance > threshold
        told.append(f"{name} {found:.3f}, {chance:.3f} by chance, {number(threshold)} allowed beyond it")
        if name == "stability index":
            measured, low = found, found - chance
    shares = _shares(new) - _shares(old)
    detail = f"{part}: {'changed' if over else 'as before'} ({'; '.join(told)}; largest change of a share {np.abs(shares).max():.3f})."
    return Check(
        name=part, passed=not over, detail=detail, measured=measured, low=low, threshold=params.max_index,
        rows=int(new.sum()),
    )  # fmt: skip


def _aligned(new: Mapping[str, int], old: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    values = sorted(set(new) | set(old))
    return np.array([new.get(v, 0) for v in values]), np.array([old.get(v, 0) for v in values])


def _shares(counts: np.ndarray) -> np.ndarray:
    padded = counts + 0.5
    shares: np.ndarray = padded / padded.sum(axis=-1, keepdims=True)
    return shares


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
