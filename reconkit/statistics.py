"""95 % intervals of means, ratios and proportions, paired and clustered.

Every interval of the package is made here. Values of one article or text belong together, so that the independent units are the articles,
not the windows that were cut from one of them. Few units get Student's t, many the bias-corrected and accelerated bootstrap (Efron, 1987).
An interval over test text is about the models that read it; a claim about a technique needs one over calibration seeds (`ratio`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from scipy import stats

from .config import require

LEVEL = 0.95
MANY = 30
"Units from which the interval is a bootstrap one; below, Student's t."
RESAMPLES = 9_999
CELLS = 2**20  # resampled values held at once
SAME = 1e-12  # relative spread below which values differ by rounding only


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval. One unit has no bounds: low and high are infinite."""

    null: ClassVar[float] = 0.0
    "The value of no effect."
    value: float
    low: float
    high: float
    n: int
    "Independent units: sequences, articles, items or seeds."

    @property
    def resolved(self) -> bool:
        """Whether the bounds are finite and exclude no effect: 0, or 1 for a ratio."""
        return math.isfinite(self.low) and math.isfinite(self.high) and not self.low <= self.null <= self.high


class Ratio(Interval):
    """A ratio with its 95 % interval; no effect is 1."""

    null: ClassVar[float] = 1.0


class Measured(NamedTuple):
    """A value of which only a summary is known."""

    value: float
    stderr: float
    n: int | None = None
    "Independent units; None: unknown, taken for many."


def mean(values: Sequence[float], clusters: Sequence[Any] | None = None) -> Interval:
    """Mean of `values` (N,) with its 95 % interval.

    With clusters the value is the ratio estimator Σ sums / Σ sizes over them, which is the mean of all values, and its spread is that
    of the clusters (Cochran, Sampling Techniques, 1977, section 6.3).

    Args:
        values: a value that is not finite leaves the interval without bounds.
        clusters: an id per value, of the article it comes from say; None: every value is a unit of its own.

    Raises:
        ConfigError: not one id per value.
    """
    sums, sizes = _by_cluster(values, clusters)
    n = len(sums)
    if not n:
        return Interval(math.nan, -math.inf, math.inf, 0)
    value, units = _linearised(sums, sizes)
    if n == 1 or not np.isfinite(units).all():
        return Interval(value, -math.inf, math.inf, n)
    if np.ptp(units) <= SAME * np.abs(units).max():
        return Interval(value, value, value, n)
    bounds = _bca(sums, sizes) if n >= MANY else None
    low, high = bounds or stats.ttest_1samp(units, 0).confidence_interval(LEVEL)
    return Interval(value, float(low), float(high), n)


def difference(own: Sequence[float], other: Sequence[float], clusters: Sequence[Any] | None = None) -> Interval:
    """Mean of the paired differences own − other (N,), of answers to the same items say; arguments and errors as `mean`."""
    return mean(_paired(own, other), clusters)


def perplexity(nll: Sequence[float], clusters: Sequence[Any] | None = None) -> Interval:
    """exp of the mean −log p of sequences (N,), and of its bounds; infinite for a broken model. Arguments and errors as `mean`."""
    return _exp(mean(nll, clusters), Interval)


def perplexity_ratio(nll: Sequence[float], other: Sequence[float], clusters: Sequence[Any] | None = None) -> Ratio:
    """A model's perplexity over another's on the same sequences: exp of `mean(nll − other)`, paired; arguments and errors as `mean`."""
    return _exp(mean(_paired(nll, other), clusters), Ratio)


def ratio(own: Sequence[float], other: Sequence[float]) -> Ratio:
    """Paired ratio of non-negative values, of errors or perplexities over the same seeds: exp of the mean of log(own / other).

    Raises:
        ConfigError: a negative value, or not as many values on both sides.
    """
    a, b = (np.asarray(values, dtype=float) for values in (own, other))
    for name, values in (("own", a), ("other", b)):
        require(not (values < 0).any(), name, values.tolist(), "without negative values")
    require(a.shape == b.shape, "other", b.tolist(), f"as many values as own, {a.size}")
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where((a == b) & np.isfinite(a), 0.0, np.log(a) - np.log(b))
    return _exp(mean(logs), Ratio)


def proportion(right: Sequence[float], clusters: Sequence[Any] | None = None) -> Interval:
    """Share of right answers (N,), each 0 or 1, with its 95 % interval: Wilson's (1927), or that of `mean` over clusters.

    Where all answers are the same, nothing is known of the spread of the clusters, and the interval is Wilson's with a cluster as an item.

    Raises:
        ConfigError: a value other than 0 and 1, or not one cluster per value.
    """
    found = np.asarray(right, dtype=float)
    require(bool(np.isin(found, (0, 1)).all()), "right", sorted(set(found.tolist())), "0 or 1 for each item")
    if not found.size:
        return Interval(math.nan, -math.inf, math.inf, 0)
    units = mean(found, clusters)
    if clusters is None or found.min() == found.max():
        low, high = stats.binomtest(round(units.value * units.n), units.n).proportion_ci(LEVEL, method="wilson")
        return Interval(units.value, float(low), float(high), units.n)
    return Interval(units.value, max(units.low, 0.0), min(units.high, 1.0), units.n)


def standard_error(values: Sequence[float], clusters: Sequence[Any] | None = None) -> float:
    """Standard error of `mean(values, clusters)`; infinite for one unit and for values that are not finite."""
    _, units = _linearised(*_by_cluster(values, clusters))
    return float(units.std(ddof=1) / len(units) ** 0.5) if len(units) > 1 and np.isfinite(units).all() else math.inf


def student(own: Measured) -> Interval:
    """The interval of a value of which only its standard error is known: value ± t(n − 1) · stderr."""
    return _student(own.value, own.stderr, math.inf if own.n is None else own.n - 1, own.n or 0)


def welch(own: Measured, other: Measured) -> Interval:
    """The difference own − other of values that share no items, with Welch's interval.

    The variance is s² = a² + b² of the standard errors a and b, and the degrees of freedom are s⁴ / (a⁴ / (n − 1) + b⁴ / (m − 1))
    (Satterthwaite, 1946). The interval's n is the smaller one.
    """
    variances = [row.stderr**2 for row in (own, other)]
    known = [row.n for row in (own, other) if row.n is not None]
    terms = [v**2 / (row.n - 1) for v, row in zip(variances, (own, other), strict=True) if row.n is not None and row.n > 1]
    freedom = 0.0 if 1 in known else sum(variances) ** 2 / sum(terms) if sum(terms) else math.inf
    return _student(own.value - other.value, math.sqrt(sum(variances)), freedom, min(known, default=0))


def welch_ratio(own: Measured, other: Measured) -> Ratio:
    """The ratio own / other of positive values that share no items: `welch` of their logs, of which stderr / value is the standard error."""
    logs = [row._replace(value=math.log(row.value), stderr=row.stderr / row.value) for row in (own, other)]
    return _exp(welch(*logs), Ratio)


def _student(value: float, stderr: float, freedom: float, n: int) -> Interval:
    if freedom < 1 or not math.isfinite(stderr):
        return Interval(value, -math.inf, math.inf, n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * stderr
    return Interval(value, value - half, value + half, n)


def _by_cluster(values: Sequence[float], clusters: Sequence[Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of the values of each unit."""
    found = np.asarray(values, dtype=float).ravel()
    if clusters is None:
        return found, np.ones(len(found))
    require(len(clusters) == len(found), "The number of clusters", len(clusters), f"{len(found)}, one for each value")
    names, place = np.unique(np.asarray(clusters), return_inverse=True)
    with np.errstate(invalid="ignore"):
        return np.bincount(place, found, len(names)), np.bincount(place, minlength=len(names)).astype(float)


def _linearised(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, np.ndarray]:
    """The ratio estimate r = Σ sums / Σ sizes, and r + (sums − r · sizes) / mean size of each unit, whose mean is r."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        value = sums.sum() / sizes.sum() if len(sums) else math.nan
        return float(value), value + (sums - value * sizes) / (sizes.mean() if len(sums) else 1.0)


def _bca(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, float] | None:
    """Bounds of the ratio estimate from resampled units, the same at every call; None where the resamples give none."""
    whole = (sizes == 1).all()
    data = (sums,) if whole else (sums, sizes)
    options = {"n_resamples": RESAMPLES, "batch": max(1, CELLS // len(sums)), "confidence_level": LEVEL, "method": "BCa"}
    with warnings.catch_warnings(action="ignore"):  # of resamples without spread, which are answered with None
        found = stats.bootstrap(data, np.mean if whole else _share, paired=not whole, random_state=np.random.default_rng(0), **options)
    low, high = map(float, found.confidence_interval)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _share(sums: np.ndarray, sizes: np.ndarray, axis: int = -1) -> np.ndarray:
    return sums.sum(axis) / sizes.sum(axis)


def _paired(own: Sequence[float], other: Sequence[float]) -> np.ndarray:
    a, b = (np.asarray(values, dtype=float) for values in (own, other))
    require(a.shape == b.shape, "The shape of the other values", b.shape, f"that of the first, {a.shape}")
    with np.errstate(invalid="ignore"):
        return a - b


def _exp(logs: Interval, kind: type[Any]) -> Any:
    with np.errstate(over="ignore"):
        return kind(*(float(np.exp(v)) for v in (logs.value, logs.low, logs.high)), logs.n)
