"""Drift and freshness: what chance gives is not cried, what was planted is found."""

import io
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import clones
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from regraft.errors import DamagedArtifact, MissingInput
from regraft.gates.drift import divergence, judge_drift, judge_freshness, stability_index
from regraft.gates.params import DriftGate, FreshnessGate
from regraft.gates.profile import Profile, profile
from regraft.gates.verdict import Verdict

NOW = datetime(2026, 10, 1, tzinfo=UTC)


def made(**parts: dict[str, int]) -> Profile:
    rows = sum(next(iter(parts.values())).values())
    return Profile(rows=rows, sampled=rows, newest=None, parts=parts)


def drawn(random: np.random.Generator, rows: int) -> Profile:
    """Rows of one unchanging source: six labels, and words over many buckets."""
    labels = random.multinomial(rows, [0.3, 0.25, 0.2, 0.15, 0.08, 0.02])
    words = random.multinomial(rows, np.full(256, 1 / 256))
    return made(
        label={str(at): int(count) for at, count in enumerate(labels)},
        words={f"{at:03d}": int(count) for at, count in enumerate(words) if count},
    )


def drift(present: Profile, champion: Profile | None) -> Verdict:
    return judge_drift(DriftGate(), present, champion, judged={"rows": "r"})


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, *parts: bytes) -> Path:
        tables = [pq.read_table(io.BytesIO(part)) for part in parts]
        pq.write_table(pa.concat_tables(tables), tmp_path / name)
        return tmp_path / name

    return write


def test_of_a_hundred_resamples_of_unchanged_data_none_is_called_changed() -> None:
    random = np.random.default_rng(1)
    sizes = [(150, 400), (1000, 1200), (5000, 20_000), (20_000, 20_000)]
    verdicts = [drift(drawn(random, new), drawn(random, old)) for new, old in sizes * 25]
    assert [verdict.reasons for verdict in verdicts if not verdict.passed] == []


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("label", {"a": 500, "b": 300, "new": 200}),  # a label that was not there
        ("label", {"a": 850, "b": 150}),  # one that took over
        ("prompt length", {"16": 100, "64": 900}),
    ],
)
def test_a_planted_change_is_found_and_named(part: str, changed: dict[str, int]) -> None:
    old = made(**{"label": {"a": 600, "b": 400}, "prompt length": {"16": 700, "64": 300}})
    verdict = drift(made(**{**old.parts, part: changed}), old)
    assert not verdict.passed
    assert [reason.split(":")[0] for reason in verdict.reasons] == [part]
    assert "changed" in verdict.reasons[0]


def test_few_rows_say_nothing_and_a_gate_that_checked_nothing_says_no() -> None:
    verdict = drift(made(label={"a": 50}), made(label={"b": 500}))
    assert [(check.name, check.decisive) for check in verdict.checks] == [("label", False), ("evidence", True)]
    assert not verdict.passed


def test_without_a_champion_there_is_nothing_to_drift_from() -> None:
    assert drift(made(label={"a": 500}), None).passed


def test_the_measures_are_those_of_their_definitions() -> None:
    new, old = np.array([29.5, 69.5]), np.array([49.5, 49.5])  # half a count is added to each
    assert stability_index(new, old) == pytest.approx(-0.2 * np.log(0.6) + 0.2 * np.log(1.4))
    entropy = lambda p: -(p * np.log2(p)).sum()  # noqa: E731
    p, q = np.array([0.3, 0.7]), np.array([0.5, 0.5])
    assert divergence(new, old) == pytest.approx(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)
    assert divergence(np.array([1e9, 0]), np.array([0, 1e9])) == pytest.approx(1, abs=1e-6)


def test_a_profile_counts_each_row_once_in_each_part_and_knows_the_newest(rows: Callable[..., Path]) -> None:
    found = profile(rows("a", clones.accepted(60, month=8), clones.accepted(40)))
    assert (found.rows, found.sampled, found.newest) == (100, 100, "2026-09-28")
    assert set(found.parts) == {"prompt length", "answer length", "source", "slice action", "words"}
    assert {sum(part.values()) for part in found.parts.values()} == {100}
    assert found.parts["slice action"] == {"cancel": 50, "track": 50}
    assert found.parts["source"] == {"data/raw": 100}
    assert found.parts["answer length"] == {"16": 100}
    assert found.parts["prompt length"] == {"23": 100}


def test_the_sample_is_chosen_by_the_rows_own_content(rows: Callable[..., Path]) -> None:
    first = profile(rows("a", clones.accepted(3000)), sample=1000)
    again = profile(rows("b", clones.accepted(3000)), sample=1000)
    assert first == again
    assert 850 < first.sampled < 1150


def test_what_is_not_there_or_not_rows_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no accepted rows"):
        profile(tmp_path / "none")
    (tmp_path / "other").write_bytes(b"PAR1 no")
    with pytest.raises(DamagedArtifact, match="does not hold accepted rows"):
        profile(tmp_path / "other")


def at(newest: str | None) -> Profile:
    return Profile(rows=1, sampled=1, newest=newest, parts={})


@pytest.mark.parametrize(
    ("present", "champion", "days", "passed", "words"),
    [
        ("2026-09-28", None, 7, True, "3.0 days old, and at most 7 are allowed"),
        ("2026-09-28", None, 2, False, "3.0 days old, but at most 2 are allowed"),
        ("2026-09-28", "2026-09-29", None, False, "learnt from of 2026-09-29"),
        ("2026-09-28", "2026-09-28", None, True, "learnt from of 2026-09-28"),
        (None, None, 7, False, "no row says when it is from"),
        (None, None, None, True, "no row says when it is from"),
        ("soon", None, 7, False, "the newest row's time is 'soon'"),
    ],
)
def test_freshness_is_the_age_of_the_newest_row_and_never_goes_back(
    present: str | None, champion: str | None, days: float | None, passed: bool, words: str
) -> None:
    before = None if champion is None else at(champion)
    verdict = judge_freshness(FreshnessGate(max_age_days=days), at(present), before, now=NOW, judged={})
    assert verdict.passed is passed
    assert words in " ".join(check.detail for check in verdict.checks)
