"""Statistics over seeds against numbers by hand, published tables, scipy and simulation."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cifar_lib.evaluate import mean_interval
from cifar_lib.evaluate_statistics import (
    Difference,
    compare_recipes,
    difference_interval,
    overfitting,
    pooled_spread,
    seeds_needed,
    verdict_lines,
)


def test_shared_seeds_are_paired() -> None:
    plain, remedy = {0: 0.70, 1: 0.74, 2: 0.72}, {2: 0.75, 0: 0.71, 1: 0.76}
    difference = difference_interval(remedy, plain)
    # Differences 0.01, 0.02, 0.03: mean 0.02, sd 0.01, t of 2 degrees of freedom 4.302653.
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert difference.mean == pytest.approx(0.02)
    assert difference.low == pytest.approx(0.02 - half, abs=1e-7)
    assert difference.high == pytest.approx(0.02 + half, abs=1e-7)
    assert (difference.n, difference.method) == (3, "paired by seed")


def test_a_run_overfits_where_validation_loss_rises_more_than_it_wavers() -> None:
    falls = pd.Series([2.0, 1.0, 0.5, 0.4, 0.3, 0.2], index=range(1, 7))
    rises = pd.Series([1.5, 1.0, 1.1, 1.3, 1.5, 1.6], index=falls.index)
    found = overfitting(falls, rises)
    # The last three are 1.467 on average, those around the lowest 1.2: 0.267 apart, of 0.2 usual.
    rise, usual = pytest.approx(4.4 / 3 - 1.2), pytest.approx(0.2)
    assert found == {"lowest_at": 2, "rise": rise, "usual": usual, "shown": False}
    steeper = pd.Series([1.1, 1.0, 1.2, 1.4, 1.6, 1.8], index=falls.index)  # 0.5 apart
    assert overfitting(falls, steeper)["shown"]
    # Up and down by as much as it ends above its lowest point: nothing was shown.
    wavers = pd.Series([1.0, 0.8, 1.1, 0.8, 1.1, 1.0], index=falls.index)
    assert not overfitting(falls, wavers)["shown"]
    # Both losses rise: the run falls apart, it does not overfit.
    assert not overfitting(falls[::-1].set_axis(falls.index), steeper)["shown"]
    assert not overfitting(falls[:1], steeper[:1])["shown"]
    # Lowest at the end: nothing rose.
    assert overfitting(falls, falls)["rise"] == 0


def test_a_run_that_recovered_by_its_end_does_not_overfit() -> None:
    # High from the third epoch to the tenth, yet the last three are those around the lowest again.
    returns = pd.Series([1.1, 1.0, *[1.3, 1.31] * 4, 1.1, 1.0, 1.1], index=range(1, 14))
    falls = pd.Series(np.linspace(1, 0, 13), index=returns.index)
    assert not overfitting(falls, returns)["shown"]
    stays = returns.where(returns.index < 11, 1.3)
    assert overfitting(falls, stays)["shown"]
    # Training loss counts to its last epoch: it fell, and then the run fell apart.
    falls.iloc[-1] = 2.0
    assert not overfitting(falls, stays)["shown"]


def test_a_noisy_plateau_rarely_passes_for_overfitting() -> None:
    generator = np.random.default_rng(0)
    falls = pd.Series(np.linspace(1, 0, 20))
    runs = (pd.Series(generator.normal(1, 0.03, 20)) for _ in range(400))
    assert sum(overfitting(falls, run)["shown"] for run in runs) < 40


def test_other_seeds_are_compared_by_welch() -> None:
    a, b = {0: 1.0, 1: 2.0, 2: 3.0}, {5: 1.0, 6: 5.0}
    difference = difference_interval(a, b)
    # Variances 1 and 8: squared error 1/3 + 4, Welch's degrees of freedom by his formula.
    squared = 1 / 3 + 8 / 2
    df = squared**2 / ((1 / 3) ** 2 / 2 + 4**2 / 1)
    half = stats.t.ppf(0.975, df) * math.sqrt(squared)
    assert (difference.mean, difference.n, difference.method) == (-1.0, 2, "Welch")
    assert (difference.low, difference.high) == pytest.approx((-1 - half, -1 + half))


def test_of_seeds_shared_in_part_those_are_paired() -> None:
    few, more = {0: 1.5, 1: 2.7}, {0: 1.0, 1: 2.0, 2: 9.0}
    shared = difference_interval(few, {0: 1.0, 1: 2.0})
    assert difference_interval(few, more) == shared
    assert difference_interval(more, few).mean == -shared.mean
    assert (shared.n, shared.method) == (2, "paired by seed")
    # One seed in common makes no interval where all runs do.
    assert difference_interval({0: 1.0, 1: 2.0}, {1: 1.0, 2: 3.0}).method == "Welch"


def test_one_run_is_held_against_the_other_sides_run_of_its_seed() -> None:
    # The mean of three would count the luck of its seed as the recipe's.
    told = difference_interval({0: 1.5}, {0: 2.0, 1: 1.0, 2: 1.0})
    assert (told.mean, told.low, told.n, told.method) == (-0.5, None, 1, "paired by seed")
    assert difference_interval({0: 2.0, 1: 1.0}, {0: 1.5}).mean == 0.5
    assert difference_interval({3: 1.5}, {0: 2.0, 1: 1.0}).method == "means of different seeds"


@pytest.mark.parametrize("seed", [0, 7])
def test_one_run_has_no_interval_and_shows_nothing(seed: int) -> None:
    difference = difference_interval({0: 0.9}, {seed: 0.5})
    assert (difference.low, difference.high, difference.n) == (None, None, 1)
    assert difference.verdict == "one run on a side: no interval"


def test_no_spread_at_all_is_a_point() -> None:
    difference = difference_interval({0: 0.5, 1: 0.5}, {2: 0.25, 3: 0.25})
    assert (difference.low, difference.high) == (0.25, 0.25)
    # One side without any is not both: the other's spread makes the interval.
    difference = difference_interval({0: 0.5, 1: 0.5}, {2: 0.2, 3: 0.3})
    half = stats.t.ppf(0.975, 1) * math.sqrt(0.005 / 2)
    assert (difference.low, difference.high) == pytest.approx((0.25 - half, 0.25 + half))


def test_no_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="values, reference: got none"):
        difference_interval({0: 0.5}, {})


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.3, "higher"),
        (-0.3, -0.1, "lower"),
        (-0.1, 0.3, "nothing was shown"),
        (0.0, 0.3, "nothing was shown"),
        (-0.3, 0.0, "nothing was shown"),
        (None, None, "one run on a side: no interval"),
    ],
)
def test_the_verdict_is_read_off_the_interval(low, high, said) -> None:
    assert Difference(0.2, low, high, 3, "Welch").verdict == said
    assert Difference(math.nan, low, high, 3, "Welch").verdict == "not measured"


def test_two_runs_have_an_interval_and_no_verdict() -> None:
    # A narrow one by luck: the differences of two pairs agree to one image in 5,000.
    difference = difference_interval({0: 0.6092, 1: 0.6094}, {0: 0.6, 1: 0.6})
    assert difference.low is not None and difference.low > 0
    assert difference.verdict == "two runs on a side: too few for a verdict"


def test_recipes_stand_in_one_table_each_against_its_own_reference() -> None:
    values = {"a": [0.5, 0.6], "a2": [0.7, 0.8], "b": [0.1], "b2": [0.3, 0.3]}
    rows = [(name, seed, x) for name, xs in values.items() for seed, x in enumerate(xs)]
    frame = pd.DataFrame(rows, columns=["variant", "seed", "val_accuracy"])
    table = compare_recipes(frame, {"a2": "a", "b2": "b", "b": "b"})
    assert list(table.index) == ["a", "a2", "b", "b2"]
    assert table["n"].tolist() == [2, 2, 1, 2]
    interval = mean_interval([0.7, 0.8])
    assert tuple(table.loc["a2", ["mean", "low", "high"]]) == (
        interval.mean,
        interval.low,
        interval.high,
    )
    assert table["against"].fillna("").tolist() == ["", "a", "", "b"]
    assert table.loc[["a2", "b2"], "worth"].tolist() == pytest.approx([0.2, 0.2])
    assert table.loc["a2", "method"] == "paired by seed"
    assert table.loc["a2", "sd"] == pytest.approx(0.1 / math.sqrt(2))
    assert table.loc["a2", "verdict"] == "two runs on a side: too few for a verdict"
    assert table["worth_n"].tolist() == [pd.NA, 2, pd.NA, 1]
    assert table.loc["b2", "verdict"] == "one run on a side: no interval"


def test_the_second_interval_borrows_the_scatter_of_all_recipes() -> None:
    values = {"a": [0.5, 0.6, 0.7], "b": [0.61, 0.72, 0.83], "c": [0.4, 0.8, 0.6], "one": [0.9]}
    rows = [(name, seed, x) for name, xs in values.items() for seed, x in enumerate(xs)]
    frame = pd.DataFrame(rows, columns=["variant", "seed", "val_accuracy"])
    table = compare_recipes(frame, dict.fromkeys(values, "a"))
    # Sums of squares 0.02, 0.0242, 0.08 and 0 over 2 + 2 + 2 + 0 degrees of freedom.
    half = 2.446912 * math.sqrt(0.1242 / 6)
    for name, worth, n in (("b", 0.12, 3), ("c", 0.0, 3), ("one", 0.3, 1)):
        ends = [worth + sign * half * math.sqrt(1 / n + 1 / 3) for sign in (-1, 1)]
        assert table.loc[name, ["pooled_low", "pooled_high"]].tolist() == pytest.approx(ends)
    assert table.loc["a", ["pooled_low", "pooled_high"]].isna().all()
    single = compare_recipes(frame.drop_duplicates("variant"), dict.fromkeys(values, "a"))
    assert single[["pooled_low", "pooled_high"]].isna().all(axis=None)


def test_the_words_are_those_of_the_intervals() -> None:
    values = {"a": [0.5, 0.6, 0.7], "b": [0.61, 0.72, 0.83], "c": [0.4, 0.8, 0.6], "one": [0.9]}
    rows = [(name, seed, x) for name, xs in values.items() for seed, x in enumerate(xs)]
    frame = pd.DataFrame(rows, columns=["variant", "seed", "val_accuracy"])
    table = compare_recipes(frame, dict.fromkeys(values, "a"))
    # b - a: 0.11, 0.12, 0.13, so 12 ± 4.302653 / √3 = 2.48 points; c - a: sd 0.1 √3, so ± 43.03.
    assert verdict_lines(table) == [
        "b: +12.00 points [+9.52, +14.48] against a (n = 3, paired by seed): higher",
        "c: +0.00 points [-43.03, +43.03] against a (n = 3, paired by seed): nothing was shown",
        "one: +40.00 points against a (n = 1, paired by seed): one run on a side: no interval",
    ]
    assert verdict_lines(table, "nats", 1)[0].startswith("b: +0.12 nats [+0.10, +0.14]")
    alone = compare_recipes(frame, {"one": "one"})
    assert verdict_lines(alone) == [] and list(alone.columns) == list(table.columns)


def test_the_spread_is_pooled_within_recipes() -> None:
    table = pd.DataFrame([[1.0, 2.0, 3.0], [10.0, 10.0, 16.0]])
    spread = pooled_spread(table)
    # Sums of squares 2 and 24, degrees of freedom 2 and 2.
    assert (spread.sd, spread.df) == (pytest.approx(math.sqrt(26 / 4)), 4)
    # Chi-squared of 4 degrees of freedom: 0.4844 and 11.1433, from any table.
    assert spread.low == pytest.approx(math.sqrt(26 / 11.1433), rel=1e-4)
    assert spread.high == pytest.approx(math.sqrt(26 / 0.4844), rel=1e-4)


def test_the_paired_spread_of_two_recipes_is_that_of_their_differences() -> None:
    table = pd.DataFrame([[1.0, 2.0, 3.0, 7.0], [1.5, 2.1, 3.9, 6.0]])
    spread = pooled_spread(table, paired=True)
    assert spread.sd == pytest.approx(np.std(table.loc[1] - table.loc[0], ddof=1))
    assert spread.df == 3


def test_what_seeds_share_counts_unpaired_alone() -> None:
    table = pd.DataFrame([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    assert pooled_spread(table).sd == 1
    assert pooled_spread(table, paired=True).sd == 0


@pytest.mark.parametrize(
    ("rows", "columns", "paired", "said"),
    [(3, 1, False, "got 3 recipes and 1 seeds; .* 1 and 2"), (1, 3, True, "1 recipes .* 2 and 2")],
)
def test_a_spread_needs_seeds(rows: int, columns: int, paired: bool, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pooled_spread(pd.DataFrame(np.zeros((rows, columns))), paired=paired)


@pytest.mark.parametrize(
    ("effect", "two_samples", "pairs"),
    # Cohen (1988), table 2.4.1, and the same for one sample: 80 % power, two-sided 5 %.
    [(0.2, 394, 199), (0.5, 64, 34), (0.8, 26, 15), (1.0, 17, 10)],
)
def test_seeds_needed_are_cohens(effect: float, two_samples: int, pairs: int) -> None:
    assert seeds_needed(0.003 * effect, 0.003) == two_samples
    assert seeds_needed(0.003 * effect, 0.003, paired=True) == pairs


@pytest.mark.parametrize("paired", [False, True])
def test_seeds_needed_find_the_difference_as_often_as_promised(paired: bool) -> None:
    n = seeds_needed(0.3, 0.25, paired=paired)
    generator = np.random.default_rng(0)

    def found(n: int) -> float:
        b = generator.normal(0, 0 if paired else 0.25, (40_000, n))
        a = generator.normal(0.3, 0.25, (40_000, n))
        test = stats.ttest_1samp(a - b, 0, axis=1) if paired else stats.ttest_ind(a, b, axis=1)
        return float((test.pvalue < 0.05).mean())

    error = 3 * math.sqrt(0.8 * 0.2 / 40_000)
    assert found(n) > 0.8 - error
    assert found(n - 1) < 0.8 + error


@pytest.mark.parametrize("paired", [False, True])
def test_clearer_effects_need_no_more_seeds(paired: bool) -> None:
    # From ratios of about 4 on scipy's noncentral t has no number for the far tail.
    needed = [seeds_needed(ratio, 1.0, paired=paired) for ratio in np.geomspace(0.2, 200, 60)]
    assert needed == sorted(needed, reverse=True) and needed[-1] == 2


def test_two_seeds_are_the_least() -> None:
    assert seeds_needed(0.3, 0.0) == seeds_needed(10.0, 0.001) == 2
    assert seeds_needed(0.003, 5.5e-17, paired=True) == seeds_needed(0.003, 5.5e-17) == 2


@pytest.mark.parametrize(("difference", "sd"), [(0.0, 1.0), (-0.3, 1.0), (0.3, -1.0)])
def test_seeds_needed_refuses(difference: float, sd: float) -> None:
    with pytest.raises(ValueError, match="difference, sd: got"):
        seeds_needed(difference, sd)
