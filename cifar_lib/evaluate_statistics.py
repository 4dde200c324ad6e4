"""Runs and seeds: what overfits, intervals of differences, their spread, how many seeds it takes.

Student's t throughout: a bootstrap of three seeds has but ten different resamples, and its
intervals come out too narrow.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, stats

from cifar_lib.evaluate import Interval, mean_interval

_OF, _WORTH = ("mean", "low", "high"), ("worth", "worth_low", "worth_high")
_HOW = ("worth_n", "method", "verdict")
_POOLED = ("pooled_low", "pooled_high")
FEWEST_FOR_A_VERDICT = 3
"""Two pairs agree by chance to one image now and then: an interval as narrow shows nothing."""


@dataclass(frozen=True)
class Difference(Interval):
    """The mean difference of two recipes with its interval; n is the pairs, or the fewer runs."""

    method: str

    @property
    def verdict(self) -> str:
        """What the interval allows to say: higher, lower, or that nothing was shown."""
        if math.isnan(self.mean):
            return "not measured"
        if self.low is None or self.high is None:
            return "one run on a side: no interval"
        if self.n < FEWEST_FOR_A_VERDICT:
            return "two runs on a side: too few for a verdict"
        if self.low <= 0 <= self.high:
            return "nothing was shown"
        return "higher" if self.low > 0 else "lower"


def difference_interval(
    values: Mapping[int, float], reference: Mapping[int, float], level: float = 0.95
) -> Difference:
    """Interval for what one recipe is worth against another, from a few runs of each.

    Args:
        values: seed → number of the recipe in question, at least one.
        reference: seed → number of the recipe that it is compared with, at least one.
        level: confidence level of this one comparison, 0..1.

    Returns:
        Student's interval of the paired differences at the seeds that both have, since a seed
        decides the initial weights and the order of the images of both; what one side has beyond
        them does not count. Where they share fewer than two, Welch's of the difference of the
        means. Where a side has one run there is no interval, and the difference is that at its
        seed if the other has it.

    Raises:
        ValueError: a side has no values.

    Source: Student (1908) and Welch (1947), both Biometrika, the second as in scipy.
    """
    if not values or not reference:
        raise ValueError("values, reference: got none; allowed is at least one run each")
    shared = values.keys() & reference.keys()
    if len(shared) > 1 or (shared and 1 in (len(values), len(reference))):
        pairs = mean_interval([values[seed] - reference[seed] for seed in sorted(shared)], level)
        return Difference(pairs.mean, pairs.low, pairs.high, pairs.n, "paired by seed")
    a, b = (np.array(list(side.values())) for side in (values, reference))
    mean, n = float(a.mean() - b.mean()), min(len(a), len(b))
    if n == 1:
        return Difference(mean, None, None, n, "means of different seeds")
    low = high = mean
    if a.std() or b.std():  # without any spread the interval is a point, and scipy's is NaN
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(level)
        low, high = float(interval.low), float(interval.high)
    return Difference(mean, low, high, n, "Welch")


def compare_recipes(
    frame: pd.DataFrame,
    reference: Mapping[str, str],
    value: str = "val_accuracy",
    level: float = 0.95,
) -> pd.DataFrame:
    """What each recipe reaches, and what it is worth against its reference, in one table.

    Args:
        frame: a row a run: variant, seed and the value.
        reference: variant → the variant that it is compared with; itself, or left out: with none.
        value: the column compared.
        level: confidence level of each interval alone; nothing is corrected for their number.

    Returns:
        A row a variant, in the order of the frame: n, sd (over seeds), mean, low, high; against,
        worth, worth_low, worth_high, worth_n (`Difference.n`), method and verdict, empty for a
        reference. Last pooled_low and pooled_high, a second interval for the difference of the
        means of all runs, from the standard deviation within recipes, pooled over the frame: three
        differences alone say little of their own scatter. It holds as far as recipes scatter alike,
        so no verdict rests on it; NaN where no recipe has two runs.

    Source of the second: Fisher's least significant difference, The Design of Experiments (1935).
    """
    runs = {
        str(name): dict(zip(part["seed"], part[value].astype(float), strict=True))
        for name, part in frame.groupby("variant", sort=False)
    }
    df = sum(len(values) - 1 for values in runs.values())
    within = [float(np.var(list(values.values())) * len(values)) for values in runs.values()]
    pooled = stats.t.ppf((1 + level) / 2, df) * math.sqrt(sum(within) / df) if df else math.nan
    rows: dict[str, dict[str, object]] = {}
    for name, values in runs.items():
        of = mean_interval(list(values.values()), level)
        rows[name] = {"n": of.n} | dict(zip(_OF, (of.mean, of.low, of.high), strict=True))
        rows[name]["sd"] = np.std(list(values.values()), ddof=1) if of.n > 1 else math.nan
        against = reference.get(name, name)
        if against != name:
            d = difference_interval(values, runs[against], level)
            rows[name] |= dict(zip(_WORTH, (d.mean, d.low, d.high), strict=True))
            rows[name] |= dict(zip(_HOW, (d.n, d.method, d.verdict), strict=True))
            rows[name]["against"] = against
            between = of.mean - fmean(runs[against].values())
            half = pooled * math.sqrt(1 / of.n + 1 / len(runs[against]))
            rows[name] |= dict(zip(_POOLED, (between - half, between + half), strict=True))
    table = pd.DataFrame.from_dict(rows, orient="index")
    table = table.reindex(columns=["n", "sd", *_OF, "against", *_WORTH, *_HOW, *_POOLED])
    types = dict.fromkeys([*_OF, *_WORTH, *_POOLED], float) | {"worth_n": "Int64"}
    return table.astype(types).rename_axis("variant")


def verdict_lines(table: pd.DataFrame, unit: str = "points", scale: float = 100) -> list[str]:
    """Says in words what `compare_recipes` found, a line for each variant with a reference.

    Args:
        table: as `compare_recipes` returns it.
        unit: of the number times `scale`.
        scale: 100 makes points of accuracies in 0..1.
    """
    lines = []
    for name, row in table[table["worth"].notna()].iterrows():
        worth, low, high = (scale * row[column] for column in _WORTH)
        interval = "" if pd.isna(low) else f" [{low:+.2f}, {high:+.2f}]"
        how = f"n = {row['worth_n']}, {row['method']}"
        text = f"{worth:+.2f} {unit}{interval} against {row['against']} ({how})"
        lines.append(f"{name}: {text}: {row['verdict']}")
    return lines


def overfitting(train: pd.Series, val: pd.Series) -> dict[str, Any]:
    """Whether a run overfits from the epoch of its lowest validation loss to its last.

    It does if validation loss rose by more than twice what it usually moves between two epochs
    (`usual`, the median) while training loss fell. A rise alone says nothing: a lowest point always
    exists, and of many noisy epochs it lies deep. So the means of three epochs are compared, the
    last and those around the lowest. Of plateaus of 20 epochs of normal noise 1 in 17 passes, of
    noise with heavy tails (Student's t, three degrees of freedom) 1 in 8.

    Args:
        train: training loss by epoch, nats; the index is the epoch.
        val: validation loss, likewise.

    Returns:
        lowest_at, the epoch; rise between those means, and usual, nats; shown, whether it overfits.
    """
    lowest = int(val.to_numpy().argmin())
    start = max(0, min(lowest - 1, len(val) - 3))  # of three epochs, the lowest among them
    rise = float(val.iloc[-3:].mean() - val.iloc[start : start + 3].mean())
    usual = float(val.diff().abs().median())
    shown = bool(rise > 2 * usual and train.iloc[-1] < train.iloc[lowest])
    return {"lowest_at": val.index[lowest], "rise": rise, "usual": usual, "shown": shown}


@dataclass(frozen=True)
class Spread:
    """A standard deviation with its interval and the degrees of freedom it rests on."""

    sd: float
    low: float
    high: float
    df: int


def pooled_spread(table: pd.DataFrame, *, paired: bool = False, level: float = 0.95) -> Spread:
    """How much seeds alone move a number, from all recipes together.

    Three seeds tell next to nothing of a standard deviation; pooled over recipes they do, as far
    as the recipes scatter alike.

    Args:
        table: a row a recipe, a column a seed, no value missing.
        paired: whether what all recipes share by seed is taken out first.
        level: confidence level, 0..1.

    Returns:
        The standard deviation of one run about its recipe's mean; if `paired`, that of the
        difference of two recipes at one seed (the residual of recipe + seed, times √2).

    Raises:
        ValueError: there are fewer than two seeds, or, if `paired`, than two recipes.

    Source: residual mean squares of the one- and two-way layouts, Scheffé, The Analysis of
    Variance (1959), chapters 3 and 4; the interval is that of chi-squared.
    """
    recipes, seeds = table.shape
    if seeds < 2 or recipes < 1 + paired:
        raise ValueError(
            f"table: got {recipes} recipes and {seeds} seeds; allowed are at least "
            f"{1 + paired} and 2"
        )
    x = table.to_numpy(float)
    residual = x - x.mean(axis=1, keepdims=True)
    df = recipes * (seeds - 1)
    if paired:
        residual = residual - residual.mean(axis=0)
        df = (recipes - 1) * (seeds - 1)
    sd = math.sqrt((1 + paired) * float((residual**2).sum()) / df)
    low, high = (sd * math.sqrt(df / stats.chi2.ppf((1 + s * level) / 2, df)) for s in (1, -1))
    return Spread(sd, low, high, df)


def seeds_needed(
    difference: float, sd: float, *, paired: bool = False, power: float = 0.8, level: float = 0.05
) -> int:
    """How many seeds each of two recipes needs for a true difference to be found.

    Args:
        difference: the true difference, above 0, in the unit of `sd`.
        sd: standard deviation of one run, or if `paired` of the difference at one seed; ≥ 0.
        paired: whether Student's paired test is planned, else his test of two samples.
        power: probability of finding it, 0..1.
        level: two-sided significance level, 0..1.

    Returns:
        Seeds a recipe, at least 2.

    Raises:
        ValueError: `difference` or `sd` is out of range.

    Source: Cohen, Statistical Power Analysis for the Behavioral Sciences (1988), chapter 2; from
    the noncentral t distribution.
    """
    if difference <= 0 or sd < 0:
        raise ValueError(f"difference, sd: got {difference}, {sd}; allowed are above 0, 0 or more")

    def missing_power(n: float) -> float:
        df = n - 1 if paired else 2 * (n - 1)
        shift = difference / sd * math.sqrt(n if paired else n / 2)
        limit = stats.t.ppf(1 - level / 2, df)
        # The far tail is NaN where it is as good as nothing.
        far = np.nan_to_num(stats.nct.cdf(-limit, df, shift))
        return power - float(stats.nct.sf(limit, df, shift) + far)

    # Equal differences leave a spread of rounding alone, beyond what the distribution can take.
    if sd <= 1e-6 * difference or missing_power(2) <= 0:
        return 2
    enough = 2.0
    while missing_power(enough) > 0:
        enough *= 2
    return math.ceil(optimize.brentq(missing_power, enough / 2, enough))
