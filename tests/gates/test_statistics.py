import numpy as np
import pytest

from regraft.gates.statistics import mean_interval, paired_difference, proportion

_MONTE_CARLO = 3.5  # standard errors


def _paired(random: np.random.Generator, gain: float, loss: float, rows: int, times: int) -> list[tuple[int, int]]:
    """Draw rows gained and lost by a challenger, `times` over."""
    drawn = random.multinomial(rows, [gain, loss, 1 - gain - loss], size=times)
    return [(int(gained), int(lost)) for gained, lost, _ in drawn]


@pytest.mark.parametrize(("gained", "lost", "rows"), [(0, 1, 44), (9, 3, 80), (0, 0, 25), (40, 2, 300)])
def test_the_interval_ends_where_the_score_test_of_the_likelihood_rejects(gained: int, lost: int, rows: int) -> None:
    found = paired_difference(gained, lost, rows, 0.95)
    for bound, sign in ((found.low, 1), (found.high, -1)):
        share = np.linspace(max(0.0, -bound) + 1e-9, (1 - bound) / 2 - 1e-9, 400_001)  # of rows lost, given the bound
        likelihood = (rows - gained - lost) * np.log1p(-2 * share - bound)
        likelihood += (gained * np.log(share + bound) if gained else 0) + (lost * np.log(share) if lost else 0)
        best = share[likelihood.argmax()]
        deviation = np.sqrt(rows * (2 * best + bound - bound**2))
        assert (gained - lost - rows * bound) / deviation == pytest.approx(sign * 1.959964, abs=2e-3)


def test_rows_without_any_difference_still_leave_a_difference_possible() -> None:
    z = 1.959964
    found = paired_difference(0, 0, 10, 0.95)
    assert (found.value, found.high) == (0.0, pytest.approx(z * z / (10 + z * z), rel=1e-6))
    assert found.low == pytest.approx(-found.high)


def test_the_difference_changes_sign_when_the_models_change_places() -> None:
    one, other = paired_difference(9, 3, 80, 0.9), paired_difference(3, 9, 80, 0.9)
    assert one.value == -other.value
    assert (one.low, one.high) == (pytest.approx(-other.high), pytest.approx(-other.low))


@pytest.mark.parametrize(
    ("gained", "lost", "rows"), [(50, 0, 50), (0, 50, 50), (0, 0, 1), (1, 0, 1), (0, 0, 5000), (25, 25, 50)]
)
def test_the_interval_holds_the_measured_difference_and_stays_between_minus_one_and_one(
    gained: int, lost: int, rows: int
) -> None:
    found = paired_difference(gained, lost, rows, 0.95)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


@pytest.mark.parametrize(
    ("gain", "loss", "rows"), [(0.04, 0.04, 300), (0.02, 0.06, 60), (0.3, 0.0, 40), (0.1, 0.1, 30)]
)
def test_tangos_interval_covers_the_true_difference_as_often_as_it_says(gain: float, loss: float, rows: int) -> None:
    times = 2000
    draws = _paired(np.random.default_rng(1), gain, loss, rows, times)
    bounds = {draw: paired_difference(*draw, rows, 0.95) for draw in set(draws)}
    covered = sum(bounds[draw].low <= gain - loss <= bounds[draw].high for draw in draws) / times
    assert covered >= 0.945 - _MONTE_CARLO * (0.95 * 0.05 / times) ** 0.5


@pytest.mark.parametrize(("share", "rows"), [(0.5, 40), (0.95, 100), (0.9, 600)])
def test_wilsons_interval_covers_the_true_share_as_often_as_it_says(share: float, rows: int) -> None:
    times = 4000
    draws = np.random.default_rng(2).binomial(rows, share, size=times)
    bounds = {int(draw): proportion(int(draw), rows, 0.95) for draw in set(draws)}
    covered = sum(bounds[int(draw)].low <= share <= bounds[int(draw)].high for draw in draws) / times
    assert covered >= 0.935 - _MONTE_CARLO * (0.95 * 0.05 / times) ** 0.5


def test_wilsons_interval_reaches_zero_and_one_only_where_no_row_speaks_against_it() -> None:
    assert proportion(0, 20, 0.95).low == 0.0
    assert 0 < proportion(0, 20, 0.95).high < 0.2
    assert proportion(20, 20, 0.95).high == 1.0
    assert 0.8 < proportion(20, 20, 0.95).low < 1


def test_the_bootstrap_covers_the_true_mean_of_skewed_losses_nearly_as_often_as_it_says() -> None:
    times, rows = 400, 120
    random = np.random.default_rng(3)
    samples = random.exponential(size=(times, rows)) ** 1.5  # more skewed than losses are; its mean is Gamma(2.5)
    intervals = [mean_interval(sample, 0.95, seed=index) for index, sample in enumerate(samples)]
    covered = sum(each.low <= 1.3293403881791370 <= each.high for each in intervals) / times
    assert covered >= 0.93 - _MONTE_CARLO * (0.95 * 0.05 / times) ** 0.5


def test_the_bootstrap_gives_the_same_interval_for_the_same_seed_and_another_for_another() -> None:
    values = np.random.default_rng(4).normal(size=50).tolist()
    assert mean_interval(values, 0.9, seed=1) == mean_interval(values, 0.9, seed=1)
    assert mean_interval(values, 0.9, seed=1) != mean_interval(values, 0.9, seed=2)


def test_equal_values_have_an_interval_without_width() -> None:
    found = mean_interval([0.25] * 10, 0.95)
    assert (found.value, found.low, found.high, found.rows) == (0.25, 0.25, 0.25, 10)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_values_that_are_too_few_or_not_finite_have_no_interval(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two finite values"):
        mean_interval(values, 0.95)


@pytest.mark.parametrize(("gained", "lost", "rows"), [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_counts_that_cannot_be_are_refused(gained: int, lost: int, rows: int) -> None:
    with pytest.raises(ValueError, match="no comparison"):
        paired_difference(gained, lost, rows, 0.95)
