"""Champion against challenger, on the same held-out rows.

The default policy. A challenger becomes champion if
  1. it is not worse where the champion was judged: on those rows together, and on each slice of them that has enough
     rows, the interval of the difference in exact answers stays above minus the margin (non-inferiority);
  2. it keeps what the champion could do: of the champion's right answers there, enough stay right;
  3. it is better: on the rows that are new since then, or on all rows, the interval stays above zero;
  4. it answers a floor of all rows exactly.
Without a champion the base takes its place, and only 3 (on all rows) and 4 are asked for.

How many questions are asked matters in two ways. Conditions that must all hold need no correction: something bad gets
through only if it passes the very test that it should fail (intersection-union test, R. L. Berger, Technometrics 24,
1982, 295-300). The two ways of being better are alternatives, so each is tested at half the error (Bonferroni). Not
corrected is repetition: each new challenger that is no better has its own chance of half of (1 - confidence).
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from regraft.evaluate.answers import Answer
from regraft.gates.params import ComparisonGate
from regraft.gates.statistics import Estimate, mean_interval, paired_difference, proportion
from regraft.gates.verdict import Check, Verdict, decide, no_evidence

GATE = "comparison"
Pairs = Sequence[tuple[Answer, Answer]]
"""(challenger's, opponent's) answer to the same row."""


def compare(
    params: ComparisonGate,
    challenger: Sequence[Answer],
    opponent: Sequence[Answer],
    *,
    known_rows: Collection[str] | None,
    judged: Mapping[str, str],
    forgets: bool = False,
) -> Verdict:
    """Decide whether a challenger should replace its opponent.

    Args:
        params: margins and confidences.
        challenger: its answers to the whole holdout.
        opponent: the champion's answers to the same rows, or the base's where there is no champion.
        known_rows: ids of the rows that the champion was judged on when it became champion; None where there is none,
            and the opponent is the base.
        judged: digests for the verdict; `adapter` and `champion` are compared with each other.
        forgets: the champion was trained on rows that are to be forgotten: one that is not worse replaces it.
    """
    name = "the base" if known_rows is None else "the champion"
    if known_rows is not None and judged.get("adapter") == judged.get("champion"):
        return decide(GATE, [Check(name="same", passed=False, detail="The challenger is the same adapter.")], judged)
    if problems := _problems(params, challenger, opponent, name):
        return decide(GATE, problems, judged)

    others = {row.row_id: row for row in opponent}
    pairs = [(row, others[row.row_id]) for row in challenger]
    if known_rows is None:
        return decide(
            GATE, [_better(params, pairs, [], name)[0], _floor(params, pairs), _loss(params, pairs, name)], judged
        )

    known = [pair for pair in pairs if pair[0].row_id in known_rows]
    new = [pair for pair in pairs if pair[0].row_id not in known_rows]
    stand_in = len(known) < params.min_rows
    judged_on = pairs if stand_in else known
    rows = f"the {len(known)} rows that the champion was judged on"
    if stand_in:
        rows = f"all {len(pairs)} rows (the champion was judged on only {len(known)} of them)"
    better = _better(params, pairs, new, name)
    if forgets:
        detail = "The champion was trained on rows that are to be forgotten: not to be worse is enough."
        better = [each.model_copy(update={"decisive": False}) for each in better]
        better.append(Check(name="forgets", passed=True, decisive=False, detail=detail))
    return decide(
        GATE,
        [
            *better,
            _not_worse(params, judged_on, rows),
            *_slices(params, judged_on),
            _retention(params, judged_on),
            _floor(params, pairs),
            _loss(params, judged_on, name),
        ],
        judged,
    )


def _problems(
    params: ComparisonGate, challenger: Sequence[Answer], opponent: Sequence[Answer], name: str
) -> list[Check]:
    """Find what makes the two tables unfit to be compared: other rows, too few of them, losses that are not finite."""
    mine, others = {row.row_id: row for row in challenger}, {row.row_id: row for row in opponent}
    problems = []
    if mine.keys() != others.keys():
        missing, foreign = len(mine.keys() - others.keys()), len(others.keys() - mine.keys())
        problems.append(f"of the challenger's rows, {name} did not answer {missing}, and it answered {foreign} others")
    elif changed := sum(mine[row_id].answer != others[row_id].answer for row_id in mine):
        problems.append(f"{changed} rows have another expected answer for {name} than for the challenger")
    if min(len(mine), len(others)) < params.min_rows:
        problems.append(f"{min(len(mine), len(others))} held-out rows; at least {params.min_rows} are asked for")
    for who, table in (("the challenger", challenger), (name, opponent)):
        if broken := sum(not math.isfinite(row.loss) for row in table):
            problems.append(f"the loss of {who} is not finite on {broken} of {len(table)} rows")
    return [no_evidence(problem) for problem in problems]


def _better(params: ComparisonGate, pairs: Pairs, new: Pairs, name: str) -> list[Check]:
    """Ask for an improvement on the new rows or on all; the check that decides comes first, the other is reported."""
    enough = len(new) >= params.min_new_rows
    confidence = 1 - (1 - params.confidence) / 2 if enough else params.confidence
    checks = []
    if enough:
        checks.append(
            _superior("better_new", new, f"the {len(new)} new rows{_what_is_new(pairs, new)}", confidence, name)
        )
    checks.append(_superior("better_overall", pairs, f"all {len(pairs)} rows", confidence, name))
    checks.sort(key=lambda check: not check.passed)
    best = checks[0]
    others = [check.model_copy(update={"decisive": False}) for check in checks[1:]]
    if not best.passed and others:
        best = best.model_copy(update={"detail": f"{best.detail} {others[0].detail}"})
        others = []
    if 0 < len(new) < params.min_new_rows:
        detail = f"{len(new)} rows are new, too few to count on their own (at least {params.min_new_rows})."
        others.append(Check(name="new_rows", passed=True, decisive=False, detail=detail, measured=len(new)))
    return [best, *others]


def _superior(check: str, pairs: Pairs, rows: str, confidence: float, name: str) -> Check:
    found = _difference(pairs, confidence)
    passed = found.low > 0
    judgement = "better" if passed else "worse" if found.high < 0 else "not shown to be better"
    if not passed and _right(pairs, 1) == len(pairs):
        judgement += f" ({name} leaves nothing to gain)"
    return _compared(
        check, passed, found, 0.0, f"On {rows} {_shares(pairs, name)} {_interval(found, confidence)}: {judgement}."
    )


def _not_worse(params: ComparisonGate, pairs: Pairs, rows: str) -> Check:
    found = _difference(pairs, params.confidence)
    passed, judgement = _non_inferior(found, params.margin)
    detail = f"On {rows} {_shares(pairs, 'the champion')} {_interval(found, params.confidence)}: {judgement}."
    return _compared("not_worse", passed, found, -params.margin, detail)


def _slices(params: ComparisonGate, pairs: Pairs) -> list[Check]:
    """Judge every slice that has enough rows: one check that decides, and one for each slice."""
    groups: dict[tuple[str, str], list[tuple[Answer, Answer]]] = {}
    for pair in pairs:
        for item in pair[0].slices.items():
            groups.setdefault(item, []).append(pair)
    each, small = [], []
    for (name, value), rows in sorted(groups.items()):
        if len(rows) < params.slice_min_rows:
            small.append(f"{name}={value} ({len(rows)})")
            continue
        found = _difference(rows, params.slice_confidence)
        passed, judgement = _non_inferior(found, params.slice_margin)
        detail = (
            f"{name}={value}, {len(rows)} rows: {_shares(rows, 'the champion')} "
            f"{_interval(found, params.slice_confidence)}: {judgement}."
        )
        check = _compared(f"slice[{name}={value}]", passed, found, -params.slice_margin, detail)
        each.append(check.model_copy(update={"decisive": False}))
    failed = [check.detail for check in each if not check.passed]
    if failed:
        detail = f"In {len(failed)} of {len(each)} slices it is not shown to be no worse. " + " ".join(failed)
    elif each:
        worst = min(each, key=lambda check: (check.measured or 0.0, check.name))
        detail = (
            f"In each of the {len(each)} slices with {params.slice_min_rows} rows or more it is not worse by more than "
            f"{params.slice_margin:g} (the largest change for the worse or least gain: {worst.name[6:-1]}, "
            f"{worst.measured:+.3f})."
        )
    else:
        detail = "No slice has enough rows to be judged on its own."
    if small:
        shown = ", ".join(small[:8]) + (f" and {len(small) - 8} more" if len(small) > 8 else "")
        detail += f" Too small to judge (under {params.slice_min_rows} rows): {shown}."
    decision = Check(
        name="slices", passed=not failed, detail=detail, measured=len(failed), threshold=0, rows=len(pairs)
    )
    return [decision, *each]


def _retention(params: ComparisonGate, pairs: Pairs) -> Check:
    right = [mine for mine, theirs in pairs if theirs.exact]
    if not right:
        detail = "The champion answered none of these rows right, so there is nothing to keep."
        return Check(name="retention", passed=True, detail=detail, threshold=params.retention, rows=0)
    kept = proportion(sum(row.exact for row in right), len(right), params.confidence)
    passed = kept.low >= params.retention
    detail = (
        f"Of the {len(right)} rows that the champion answered right, the challenger answers {_percent(kept.value)} right "
        f"({_level(params.confidence)} interval {kept.low:.3f} to {kept.high:.3f}): "
        f"{'at least' if passed else 'not shown to be at least'} {_percent(params.retention)}."
    )
    return _compared("retention", passed, kept, params.retention, detail)


def _floor(params: ComparisonGate, pairs: Pairs) -> Check:
    share = proportion(_right(pairs, 0), len(pairs), params.confidence)
    passed = share.low >= params.floor
    detail = (
        f"The challenger answers {_percent(share.value)} of {len(pairs)} rows exactly "
        f"({_level(params.confidence)} interval {share.low:.3f} to {share.high:.3f}): "
        f"{'at least' if passed else 'not shown to be at least'} the floor of {_percent(params.floor)}."
    )
    return _compared("floor", passed, share, params.floor, detail)


def _loss(params: ComparisonGate, pairs: Pairs, name: str) -> Check:
    """Compare the mean loss of a trained token, row by row; it decides only against a champion and with a margin."""
    rises = [
        mine.loss / mine.tokens - theirs.loss / theirs.tokens for mine, theirs in pairs if mine.tokens and theirs.tokens
    ]
    decisive = params.loss_margin is not None and name != "the base"
    if len(rises) < 2:
        why = "Too few rows have trained tokens to compare losses."
        return Check(name="loss", passed=not decisive, decisive=decisive, detail=why, rows=len(rises))
    found = mean_interval(rises, params.confidence, seed=params.seed)
    passed = params.loss_margin is None or found.high < params.loss_margin
    direction = "lower" if found.value < 0 else "higher"
    detail = (
        f"The challenger's loss of a trained token is {direction} than that of {name} by {abs(found.value):.4f} nats on "
        f"{len(rises)} rows ({_level(params.confidence)} interval of the change {found.low:.4f} to {found.high:.4f})"
    )
    if decisive:
        detail += f": {'not higher' if passed else 'may be higher'} by more than {params.loss_margin:g}"
    check = _compared("loss", passed or not decisive, found, params.loss_margin, f"{detail}.")
    return check.model_copy(update={"decisive": decisive})


def _compared(name: str, passed: bool, found: Estimate, threshold: float | None, detail: str) -> Check:
    return Check(
        name=name,
        passed=passed,
        detail=detail,
        measured=found.value,
        threshold=threshold,
        low=found.low,
        high=found.high,
        rows=found.rows,
    )


def _difference(pairs: Pairs, confidence: float) -> Estimate:
    gained = sum(mine.exact and not theirs.exact for mine, theirs in pairs)
    lost = sum(theirs.exact and not mine.exact for mine, theirs in pairs)
    return paired_difference(gained, lost, len(pairs), confidence)


def _non_inferior(found: Estimate, margin: float) -> tuple[bool, str]:
    if found.low > -margin:
        return True, f"not worse by more than {margin:g}"
    if found.high < 0:
        return False, f"worse, and perhaps by more than {margin:g}"
    return False, f"a drop of {margin:g} cannot be ruled out"


def _right(pairs: Pairs, side: int) -> int:
    return sum(pair[side].exact for pair in pairs)


def _what_is_new(pairs: Pairs, new: Pairs) -> str:
    """Name the slice values that occur on new rows only, such as an action that came with the new data."""
    everywhere = Counter(item for mine, _ in pairs for item in mine.slices.items())
    found = Counter(item for mine, _ in new for item in mine.slices.items())
    only = [(count, name, value) for (name, value), count in found.items() if count == everywhere[name, value]]
    named = [
        f"{name}={value}" if count == len(new) else f"{count} of them {name}={value}"
        for count, name, value in sorted(only, key=lambda each: (-each[0], each[1:]))[:3]
    ]
    return f" ({', '.join(named)})" if named else ""


def _shares(pairs: Pairs, name: str) -> str:
    mine, theirs = (_right(pairs, side) / len(pairs) for side in (0, 1))
    return f"the challenger answers {_percent(mine)} exactly, {name} {_percent(theirs)}"


def _interval(found: Estimate, confidence: float) -> str:
    return f"(difference {found.value:+.3f}, {_level(confidence)} interval {found.low:.3f} to {found.high:.3f})"


def _level(confidence: float) -> str:
    return f"{100 * confidence:.4g} %"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"
