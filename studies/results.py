"""What the runs of a study left behind, and the statistics of the tables."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import read_log

from .plan import Run, epochs_of
from .presets import Preset

FAILED, OPEN = "failed", "not finished"


class Result(NamedTuple):
    """A run that has ended well.

    Attributes:
        acc1: Acc@1 of the last epoch's weights, in percent.
        loss: their mean cross-entropy.
        hits: (images,) bool, which validation images they get right.
        gmacs: multiply-accumulates of one image, in 10^9.
        seconds: of training, evaluations not included.
        images_per_second: of training, mean over the epochs.
    """

    acc1: float
    loss: float
    hits: np.ndarray
    gmacs: float
    seconds: float
    images_per_second: float


class Difference(NamedTuple):
    """Accuracy of one method less that of another.

    Attributes:
        value: in points of Acc@1.
        error: its standard error, in points.
        source: what the error is over: "seeds" or "images".
    """

    value: float
    error: float
    source: str


def run_folder(folder: Path, run: Run) -> Path:
    """Where a run writes."""
    return folder / "runs" / run.name


def load_result(folder: Path, run: Run, preset: Preset) -> Result | None:
    """Reads a run's results; None if it has not come to its end."""
    own = run_folder(folder, run)
    entries = read_log(own / "log.txt")
    finished = len(entries) == epochs_of(run, preset) and "test_acc1" in entries[-1]
    if not finished or not (own / "correct.npy").is_file():
        return None
    images = sum(entry["images_per_second"] * entry["epoch_seconds"] for entry in entries)
    seconds = sum(entry["epoch_seconds"] for entry in entries)
    return Result(
        entries[-1]["test_acc1"],
        entries[-1]["test_loss"],
        np.load(own / "correct.npy"),
        json.loads((own / "args.json").read_text())["gmacs"],
        seconds,
        images / seconds,
    )


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the sample standard deviation; None for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Difference of two sets of answers to the same images, its error over the images.

    Args:
        first: (images,) bool, right answers.
        second: (images,) bool, of the method that is subtracted.
    """
    differences = first.astype(float) - second.astype(float)
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return Difference(100 * float(differences.mean()), 100 * float(error), "images")


def difference(first: Sequence[Result], second: Sequence[Result]) -> Difference | None:
    """Difference of two methods whose runs have the same seeds, in the same order.

    With two seeds and more, the standard error is that of the mean of the seeds' differences; with
    one, it is over the validation images and says nothing about another seed.
    """
    if not first or len(first) != len(second):
        return None
    if len(first) == 1:
        return paired_difference(first[0].hits, second[0].hits)
    values = [a.acc1 - b.acc1 for a, b in zip(first, second, strict=True)]
    mean, std = mean_and_std(values)
    return Difference(mean, std / math.sqrt(len(values)), "seeds")
