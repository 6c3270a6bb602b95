"""Held-out preferences: which answers an adapter made likelier than the base does.

The reward of an answer is log pi(answer) - log pi_base(answer), in nats, over the whole answer: DPO's implicit reward
without its beta (arXiv:2305.18290, section 4), whatever the adapter was trained with.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import DamagedArtifact
from regraft.evaluate.params import EvaluateParams
from regraft.evaluate.report import PreferenceScore, PreferenceScores

_COLUMNS = ("row_id", "slices", "prompt_ids", "chosen_ids", "rejected_ids")
_IGNORED = -100


@dataclass(frozen=True)
class HeldOutPair:
    """A prompt with the answer that is wanted, the one that is not, or both (the other is empty)."""

    row_id: str
    slices: dict[str, str]
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class Likelihood:
    """Of one row's answers: log likelihood in nats, and tokens; None where there is no such answer."""

    chosen: tuple[float, int] | None
    rejected: tuple[float, int] | None


def read_pairs(dataset: Path, max_rows: int | None = None) -> list[HeldOutPair]:
    """Read the held-out preferences, or those `max_rows` of them that have the lowest ids; none where there are none.

    `holdout_digest` has compared their bytes with the manifest.
    """
    import pyarrow as pa

    rows: list[HeldOutPair] = []
    for path in sorted(dataset.glob("holdout_pairs-*.arrow")):
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
                table = reader.read_all().select(_COLUMNS)
                rows += [HeldOutPair(**{**row, "slices": dict(row["slices"] or {})}) for row in table.to_pylist()]
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DamagedArtifact(f"{path} holds no preferences: {error}", fix="regraft preprocess") from error
    return sorted(rows, key=lambda row: row.row_id)[:max_rows]


def likelihoods(model: Any, pairs: Sequence[HeldOutPair], params: EvaluateParams) -> list[Likelihood]:
    """Return the likelihood of every answer under a model in inference mode."""
    from regraft.evaluate.score import row_losses

    answers = [(i, ids) for i, pair in enumerate(pairs) for ids in (pair.chosen_ids, pair.rejected_ids)]
    given = [
        ([*pairs[i].prompt_ids, *ids], [*[_IGNORED] * len(pairs[i].prompt_ids), *ids]) for i, ids in answers if ids
    ]
    found = iter(row_losses(model, given, params))
    values: list[tuple[float, int] | None] = []
    for _, ids in answers:
        if not ids:
            values.append(None)
            continue
        loss, tokens = next(found)
        values.append((-loss, tokens))
    return [Likelihood(*both) for both in zip(values[::2], values[1::2], strict=True)]


def summarise_pairs(
    pairs: Sequence[HeldOutPair], own: Sequence[Likelihood], base: Sequence[Likelihood] | None, slices: Sequence[str]
) -> PreferenceScores:
    """Compare the answers' likelihoods over all rows, and over the rows of each value of each of `slices`.

    Args:
        pairs: at least one.
        own: under the model that is judged, in their order.
        base: under the base; None where that is what is judged, since all rewards are 0 then.
        slices: names.
    """
    rows = list(range(len(pairs)))

    def score(some: Sequence[int]) -> PreferenceScore:
        return _score([own[i] for i in some], None if base is None else [base[i] for i in some])

    groups: dict[str, dict[str, list[int]]] = {name: {} for name in slices}
    for i in rows:
        for name in slices:
            if name in pairs[i].slices:
                groups[name].setdefault(pairs[i].slices[name], []).append(i)
    by_slice: Mapping[str, Mapping[str, list[int]]] = groups
    return PreferenceScores(
        overall=score(rows),
        slices={name: {value: score(some) for value, some in sorted(by_slice[name].items())} for name in slices},
    )


def _score(own: Sequence[Likelihood], base: Sequence[Likelihood] | None) -> PreferenceScore:
    both = [i for i, each in enumerate(own) if each.chosen is not None and each.rejected is not None]
    likelier = [_mean(own[i].chosen) > _mean(own[i].rejected) for i in both]
    report: dict[str, Any] = {
        "rows": len(own),
        "pairs": len(both),
        "likelihood_accuracy": sum(likelier) / len(both) if both else None,
        "reward_accuracy": None,
        "reward_margin": None,
        "single_accuracy": None,
        "single_margin": None,
    }
    if base is None:
        return PreferenceScore(**report)
    chosen, rejected = ([_reward(own[i], base[i], name) for i in range(len(own))] for name in ("chosen", "rejected"))
    if both:
        margins = [chosen[i] - rejected[i] for i in both]
        report["reward_accuracy"] = sum(margin > 0 for margin in margins) / len(both)  # NaN is not above 0
        report["reward_margin"] = (
            _finite(math.fsum(margins) / len(margins)) if all(map(math.isfinite, margins)) else None
        )
    alone = set(range(len(own))) - set(both)
    wanted = [chosen[i] for i in sorted(alone) if own[i].chosen is not None]
    unwanted = [rejected[i] for i in sorted(alone) if own[i].rejected is not None]
    if wanted and unwanted and all(map(math.isfinite, (*wanted, *unwanted))):
        report["single_accuracy"] = _ranked(wanted, sorted(unwanted))
        report["single_margin"] = math.fsum(wanted) / len(wanted) - math.fsum(unwanted) / len(unwanted)
    return PreferenceScore(**report)


def _mean(answer: tuple[float, int] | None) -> float:
    assert answer is not None
    return answer[0] / answer[1]


def _reward(own: Likelihood, base: Likelihood, name: str) -> float:
    mine: tuple[float, int] | None = getattr(own, name)
    its: tuple[float, int] | None = getattr(base, name)
    return math.nan if mine is None or its is None else mine[0] - its[0]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ranked(wanted: Sequence[float], unwanted: Sequence[float]) -> float:
    """Return how often a wanted answer's reward is above an unwanted one's, ties half; `unwanted` in order."""
    above = sum(bisect_left(unwanted, each) + bisect_right(unwanted, each) for each in wanted)
    return above / (2 * len(wanted) * len(unwanted))
