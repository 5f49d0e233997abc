"""Intervals against scipy and numpy by hand, and their coverage by simulation."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import reference
import torch
from scipy import stats

from reconkit import statistics
from reconkit.config import ConfigError
from reconkit.statistics import Interval, Measured, Ratio

NOTHING = (-math.inf, math.inf)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings(action="error"):
        yield


def ends(found: Interval) -> tuple[float, float, float]:
    return found.value, found.low, found.high


def covered(truth: float, draws: Any) -> float:
    """Share of the intervals that hold the truth."""
    found = list(draws)
    return float(np.mean([interval.low <= truth <= interval.high for interval in found]))


def test_a_mean_of_few_values_has_students_interval() -> None:
    values = [1.0, 2.0, 4.0]
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / 3**0.5
    assert ends(statistics.mean(values)) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half)) and statistics.mean(values).n == 3
    assert statistics.mean(torch.tensor(values)) == statistics.mean(values)


@pytest.mark.parametrize("n", [29, 30])
def test_many_values_have_a_bca_interval_and_few_have_students(n: int) -> None:
    values = np.random.default_rng(1).exponential(size=n)
    found = statistics.mean(values)
    bca = stats.bootstrap((values,), np.mean, n_resamples=9_999, method="BCa", random_state=np.random.default_rng(7)).confidence_interval
    student = stats.ttest_1samp(values, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(student if n == 29 else bca), rel=1e-9 if n == 29 else 0.02)
    assert abs(student.high - bca.high) > 0.03 * bca.high, "the two differ on skewed values"
    assert statistics.mean(values) == found, "resamples are seeded"


def test_the_intervals_of_eight_values_cover_95_percent() -> None:
    draw = np.random.default_rng(0)
    assert 0.93 <= covered(3.0, (statistics.mean(draw.normal(3, 1, 8)) for _ in range(1000))) <= 0.97


@pytest.mark.parametrize("clusters", [8, 40])
def test_windows_of_one_article_are_no_units_of_their_own(clusters: int) -> None:
    """Paired differences with a part that an article's windows share: only the interval over articles covers the truth."""
    draw = np.random.default_rng(0)
    article = np.repeat(np.arange(clusters), draw.integers(1, 9, clusters))
    by_article, by_window = [], []
    for _ in range(200):
        own = draw.normal(3, 1, len(article))
        other = own - 0.5 - draw.normal(0, 1, clusters)[article] + draw.normal(0, 0.2, len(article))
        by_article.append(statistics.difference(own, other, article))
        by_window.append(statistics.difference(own, other))
    assert {found.n for found in by_article} == {clusters} and {found.n for found in by_window} == {len(article)}
    assert 0.88 <= covered(0.5, by_article) <= 0.98 and covered(0.5, by_window) < 0.8
    assert [found.value for found in by_article] == pytest.approx([found.value for found in by_window]), "the mean of all windows either way"


def test_clusters_have_the_ratio_estimators_error() -> None:
    values, article = [1, 1, 0, 1, 0, 0, 1, 1], [0, 0, 0, 1, 1, 2, 2, 3]
    error = reference.clustered_error(values, article)
    half = stats.t.ppf(0.975, 3) * error
    assert statistics.standard_error(values, article) == pytest.approx(error)
    assert ends(statistics.mean(values, article)) == pytest.approx((5 / 8, 5 / 8 - half, 5 / 8 + half))
    assert statistics.mean(values, list("aaabbccd")) == statistics.mean(values, article), "any ids"
    assert ends(statistics.mean(values, range(8))) == pytest.approx(ends(statistics.mean(values)))


def test_many_clusters_are_resampled_whole() -> None:
    draw = np.random.default_rng(0)
    article = np.repeat(np.arange(40), draw.integers(1, 6, 40))
    values = draw.normal(0, 1, 40)[article] + draw.normal(0, 0.1, len(article))
    means = []
    for _ in range(4000):
        chosen = draw.integers(0, 40, 40)
        means.append(np.concatenate([values[article == i] for i in chosen]).mean())
    found = statistics.mean(values, article)
    assert found.n == 40 and (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.06)


@pytest.mark.parametrize("clusters", [None, [4, 4, 4]])
def test_one_unit_says_nothing(clusters: list[int] | None) -> None:
    values = [2.0, 3.0, 2.5] if clusters else [2.5]
    assert ends(statistics.mean(values, clusters)) == (2.5, *NOTHING) and statistics.mean(values, clusters).n == 1
    assert ends(statistics.perplexity(values, clusters)) == (math.exp(2.5), 0, math.inf)
    assert not statistics.mean(values, clusters).resolved and not statistics.perplexity_ratio(values, [0.0] * len(values), clusters).resolved
    assert statistics.standard_error(values, clusters) == math.inf


def test_equal_values_have_no_width() -> None:
    for values in ([3.0, 3.0], [0.1 + 0.2, 0.3], [3.0] * 50, [0.0] * 4):
        assert ends(statistics.mean(values)) == (np.mean(values),) * 3
    nll = np.linspace(2, 5, 40)
    assert ends(statistics.perplexity_ratio(nll, nll)) == (1, 1, 1) and not statistics.perplexity_ratio(nll, nll).resolved
    assert ends(statistics.perplexity_ratio(nll + 0.1, nll)) == pytest.approx((math.exp(0.1),) * 3)
    assert ends(statistics.ratio([2.0, 4.0], [1.0, 2.0])) == (2, 2, 2)


def test_values_that_are_not_finite_leave_no_bounds() -> None:
    for values in ([1.0, math.inf], [math.inf] * 3, [1.0] * 50 + [math.inf]):
        assert ends(statistics.mean(values)) == (math.inf, *NOTHING) and statistics.perplexity(values).value == math.inf
    for values in ([1.0, math.nan], [math.inf, -math.inf], []):
        assert math.isnan(statistics.mean(values).value) and ends(statistics.mean(values))[1:] == NOTHING
        assert math.isnan(statistics.mean(values, list(range(len(values)))).value) and statistics.standard_error(values) == math.inf
    broken = statistics.perplexity_ratio([math.inf, 3.0], [2.0, 3.0])
    assert ends(broken) == (math.inf, 0, math.inf) and not broken.resolved
    assert math.isnan(statistics.perplexity_ratio([math.inf], [math.inf]).value) and math.isnan(statistics.ratio([math.inf], [math.inf]).value)
    assert ends(statistics.perplexity([10.0, 2000.0])) == (math.inf, 0, math.inf), "a mean beyond the largest float"
    assert math.isnan(statistics.difference([math.nan, 1.0], [0.0, 1.0]).value)


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    nll, other = [3.0, 3.4, 2.9, 3.1], [2.9, 3.2, 2.9, 3.0]
    low, high = stats.ttest_1samp(nll, 0).confidence_interval()
    assert ends(statistics.perplexity(nll)) == pytest.approx((math.exp(3.1), math.exp(low), math.exp(high)))
    low, high = stats.ttest_rel(nll, other).confidence_interval()
    found = statistics.perplexity_ratio(nll, other)
    assert ends(found) == pytest.approx((math.exp(0.1), math.exp(low), math.exp(high))) and isinstance(found, Ratio)


def test_ratios_of_errors_over_seeds() -> None:
    own, other = [0.2, 0.3, 0.25], [0.1, 0.12, 0.14]
    logs = np.log(np.array(own) / np.array(other))
    low, high = stats.ttest_1samp(logs, 0).confidence_interval()
    found = statistics.ratio(own, other)
    assert ends(found) == pytest.approx((math.exp(logs.mean()), math.exp(low), math.exp(high))) and found.n == 3 and found.resolved
    assert ends(statistics.ratio(other, own)) == pytest.approx(tuple(1 / v for v in (found.value, found.high, found.low)))
    assert ends(statistics.ratio([0.0, 0.0], [0.0, 0.0])) == (1, 1, 1), "two errors of zero are the same"
    assert ends(statistics.ratio([0.0, 1.0], [1.0, 1.0])) == (0, 0, math.inf)
    assert not statistics.ratio([1.0, 2.0], [1.1, 1.9]).resolved


def test_a_share_alone_has_wilsons_interval() -> None:
    z = stats.norm.ppf(0.975)
    for right, n in ((30, 100), (5, 5), (0, 7), (1, 1)):
        p = right / n
        centre, half = (p + z * z / 2 / n) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n**2)
        found = statistics.proportion([1] * right + [0] * (n - right))
        assert ends(found) == pytest.approx((p, centre - half, centre + half), abs=1e-12) and found.n == n


def test_a_share_over_texts() -> None:
    right, text = torch.tensor([1, 1, 0, 0, 1, 1]).bool(), [0, 0, 1, 1, 2, 2]
    half = stats.t.ppf(0.975, 2) * np.std([1, 0, 1], ddof=1) / 3**0.5
    found = statistics.proportion(right, text)
    assert ends(found) == pytest.approx((2 / 3, 0, 1)) and 2 / 3 - half < 0 and 2 / 3 + half > 1, "no share lies outside 0 to 1"
    assert ends(statistics.proportion([1] * 6, text)) == ends(statistics.proportion([1] * 3)), "three texts without a wrong answer"
    right, text = [1, 1, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0], [0] * 4 + [1] * 4 + [2] * 4
    half = stats.t.ppf(0.975, 2) * reference.clustered_error(right, text)
    assert ends(statistics.proportion(right, text)) == pytest.approx((5 / 12, 5 / 12 - half, 5 / 12 + half))


def test_welch_is_scipys() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(3, 1, 6), draw.normal(2, 3, 11)
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    own, other = (Measured(float(x.mean()), float(stats.sem(x)), len(x)) for x in (a, b))
    found = statistics.welch(own, other)
    assert ends(found) == pytest.approx((a.mean() - b.mean(), *expected)) and found.n == 6
    assert ends(statistics.welch(own, other._replace(n=1)))[1:] == NOTHING, "one unit has no error"
    half = stats.norm.ppf(0.975) * math.hypot(own.stderr, other.stderr)
    assert statistics.welch(own._replace(n=None), other._replace(n=None)).high == pytest.approx(a.mean() - b.mean() + half)
    assert ends(statistics.welch(own._replace(stderr=math.inf), other))[1:] == NOTHING
    assert ends(statistics.welch(own._replace(stderr=0.0), own._replace(stderr=0.0))) == (0, 0, 0)


def test_a_ratio_of_summaries_is_welchs_on_logs() -> None:
    half = stats.norm.ppf(0.975) * math.hypot(1 / 20, 2 / 25)
    found = statistics.welch_ratio(Measured(20.0, 1.0), Measured(25.0, 2.0))
    assert ends(found) == pytest.approx((0.8, 0.8 * math.exp(-half), 0.8 * math.exp(half)))


def test_a_summary_alone_has_students_interval() -> None:
    assert statistics.student(Measured(3.0, 0.5, 8)).high == pytest.approx(3 + 0.5 * stats.t.ppf(0.975, 7))
    assert statistics.student(Measured(3.0, 0.5)).low == pytest.approx(3 - 0.5 * stats.norm.ppf(0.975))


def test_what_excludes_no_effect() -> None:
    assert Interval(2, 1, 3, 5).resolved and Interval(-2, -3, -1, 5).resolved and not Interval(2, -1, 3, 5).resolved
    assert not Interval(2, 0, 3, 5).resolved and not Interval(2, 1, math.inf, 5).resolved and not Interval(2, math.nan, math.nan, 5).resolved
    assert Ratio(2, 1.5, 3, 5).resolved and not Ratio(2, 0.9, 3, 5).resolved and Ratio(0.5, 0.4, 0.9, 5).resolved


def test_wrong_arguments_are_refused() -> None:
    for call, says in (
        (lambda: statistics.mean([1.0, 2.0], [0]), "number of clusters is 1; it must be 2, one for each"),
        (lambda: statistics.difference([1.0], [1.0, 2.0]), "shape of the other"),
        (lambda: statistics.ratio([1.0], [1.0, 2.0]), "as many values as own, 1"),
        (lambda: statistics.ratio([1.0], [-1.0]), "without negative values"),
        (lambda: statistics.proportion([0.5, 1.0]), "0 or 1"),
        (lambda: statistics.proportion([1.0, math.nan]), "0 or 1"),
    ):
        with pytest.raises(ConfigError, match=says):
            call()


def test_intervals_need_no_torch() -> None:
    code = "import sys; from reconkit import statistics; statistics.mean([1.0, 2.0]); raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
