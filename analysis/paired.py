"""Two configurations on the same images: bootstrap interval and McNemar's exact test."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from analysis.predictions import Predictions
from analysis.sweep import DENSE, Configuration

NUM_RESAMPLES = 10_000


class Comparison(NamedTuple):
    """Two configurations on the same images.

    Attributes:
        difference: accuracy of the first less that of the second, in percentage points.
        low: lower end of the difference's 95 % bootstrap interval.
        high: its upper end.
        only_first: images that the first alone gets right.
        only_second: images that the second alone gets right.
        p_value: of McNemar's exact test, two-sided.
    """

    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float


def compare_paired(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> Comparison:
    """Compares which images two configurations get right.

    The bootstrap draws the images with replacement, both answers to an image together, 10,000
    times, and takes the 2.5th and 97.5th percentile (Efron and Tibshirani 1993, chapter 13). Only
    how many images fall to either side matters, and these counts are multinomial: they are drawn
    directly. McNemar's exact test asks how likely so uneven a split of the images that only one
    gets right is, if each fell to either side with probability 1/2 (two-sided binomial test).

    Args:
        first: (images,) bool, right answers of one configuration.
        second: (images,) bool, of the other.
        seed: of the bootstrap.
    """
    num_images = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    counts = np.array([only_first, only_second, num_images - only_first - only_second])
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(num_images, counts / num_images, size=NUM_RESAMPLES)
    low, high = np.percentile(100 * (drawn[:, 0] - drawn[:, 1]) / num_images, [2.5, 97.5])
    discordant = only_first + only_second
    p_value = binomtest(only_first, discordant, 0.5).pvalue if discordant else 1.0
    difference = 100 * (only_first - only_second) / num_images
    return Comparison(difference, float(low), float(high), only_first, only_second, float(p_value))


def comparison_pairs(configurations: Sequence[Configuration]) -> list[tuple[int, int]]:
    """Bat against every other method, and every other one against evit, at each keep rate."""
    pairs = []
    reduced = [entry for entry in enumerate(configurations) if entry[1].reduction != DENSE]
    for index, entry in reduced:
        for rival_index, rival in reduced:
            same = (entry.checkpoint, entry.keep_rate) == (rival.checkpoint, rival.keep_rate)
            wanted = entry.reduction == "bat" or rival.reduction == "evit"
            if same and wanted and entry != rival:
                pairs.append((index, rival_index))
    return pairs


def compare(
    predictions: Predictions,
    configurations: Sequence[Configuration],
    pairs: Iterable[tuple[int, int]],
    *,
    seed: int = 0,
) -> list[dict]:
    """One row of plain values a pair: the two names, their Acc@1, and a `Comparison`."""
    rows = []
    for first, second in dict.fromkeys(pairs):
        right = predictions.correct1[first], predictions.correct1[second]
        rows.append(
            {
                "first": configurations[first].name,
                "second": configurations[second].name,
                "acc1_first": 100 * int(right[0].sum()) / len(right[0]),
                "acc1_second": 100 * int(right[1].sum()) / len(right[1]),
            }
            | compare_paired(*right, seed=seed)._asdict()
        )
    return rows
