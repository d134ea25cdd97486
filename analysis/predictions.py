"""What every configuration of a sweep made of every image, and the file that keeps it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from engine import BatchScores
from utils import InputError, write_atomically

_ARRAYS = ("predicted", "correct1", "correct5", "is_bad")


class Answer(NamedTuple):
    """What a model makes of a batch."""

    scores: BatchScores
    predicted: Tensor  # (B,) int64 class of the largest logit
    seconds: float  # of the forward pass alone


class Progress(NamedTuple):
    """How far a sweep is; replaced as a whole, so that an interrupt never finds half of it.

    Attributes:
        num_done: images that every configuration has seen.
        num_timed: images that the forward times belong to.
        loss_sums: (configurations,) float64 sums of the losses.
        seconds: (configurations,) float64 forward times.
    """

    num_done: int
    num_timed: int
    loss_sums: np.ndarray
    seconds: np.ndarray


@dataclass
class Predictions:
    """What every configuration made of every image; columns from `progress.num_done` on are open.

    Attributes:
        settings: everything that the numbers depend on, as plain values.
        predicted: (configurations, images) int32 class of the largest logit; -1 is open.
        correct1: (configurations, images) bool, see `BatchScores`.
        correct5: (configurations, images) bool.
        is_bad: (images,) bool, the image could not be read and counts as wrong.
        progress: how far the sweep is.
    """

    settings: dict
    predicted: np.ndarray
    correct1: np.ndarray
    correct5: np.ndarray
    is_bad: np.ndarray
    progress: Progress

    @classmethod
    def empty(cls, settings: dict, num_configurations: int, num_images: int) -> "Predictions":
        """Those of a sweep that has not begun."""
        shape = (num_configurations, num_images)
        zeros = np.zeros(num_configurations)
        return cls(
            settings,
            np.full(shape, -1, dtype=np.int32),
            np.zeros(shape, dtype=bool),
            np.zeros(shape, dtype=bool),
            np.zeros(num_images, dtype=bool),
            Progress(0, 0, zeros, zeros),
        )

    def add(self, answers: Sequence[Answer], is_bad: Tensor, *, timed: bool) -> None:
        """Notes what all configurations, in order, made of the next batch.

        Args:
            answers: one a configuration.
            is_bad: (B,) which images could not be read.
            timed: whether the forward times count.
        """
        done, num_timed, loss_sums, seconds = self.progress
        here = slice(done, done + len(is_bad))
        for row, answer in enumerate(answers):
            self.predicted[row, here] = answer.predicted.cpu()
            self.correct1[row, here] = answer.scores.correct1.cpu()
            self.correct5[row, here] = answer.scores.correct5.cpu()
        self.is_bad[here] = is_bad.cpu()
        # Sums over a batch are added up in the order of `engine.evaluate`, to the same last digit.
        losses = [answer.scores.loss.double().sum().item() for answer in answers]
        if timed:
            num_timed += len(is_bad)
            seconds = seconds + [answer.seconds for answer in answers]
        self.progress = Progress(here.stop, num_timed, loss_sums + losses, seconds)

    def save(self, path: Path) -> None:
        """Writes predictions.npz atomically."""
        arrays = {name: getattr(self, name) for name in _ARRAYS} | self.progress._asdict()
        settings = json.dumps(self.settings)
        write_atomically(path, lambda file: np.savez(file, settings=settings, **arrays))

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Reads predictions.npz.

        Raises:
            InputError: the file is damaged or not such a file.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                settings = json.loads(str(stored["settings"]))
                counts = {name: int(stored[name]) for name in ("num_done", "num_timed")}
                sums = {name: stored[name] for name in ("loss_sums", "seconds")}
                arrays = {name: stored[name] for name in _ARRAYS}
        except Exception as problem:  # damaged files fail in every way that a reader can
            raise InputError(f"{path} cannot be read; --restart replaces it") from problem
        return cls(settings, **arrays, progress=Progress(**counts, **sums))


def open_predictions(
    path: Path, settings: dict, num_configurations: int, num_images: int, *, restart: bool
) -> Predictions:
    """The predictions of an earlier, perhaps interrupted sweep with the same settings, or new ones.

    Args:
        path: of predictions.npz.
        settings: plain values that JSON can hold.
        num_configurations: configurations of the sweep.
        num_images: images of the data set.
        restart: leave an earlier sweep alone; it is replaced at the first saving.

    Raises:
        InputError: the earlier sweep had other settings (the message names them).
    """
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    if restart or not path.exists():
        return Predictions.empty(settings, num_configurations, num_images)
    earlier = Predictions.load(path)
    if earlier.settings != settings:
        then, now = _flat(earlier.settings), _flat(settings)
        differing = [
            f"{name} was {then.get(name)}, is {now.get(name)}"
            for name in then | now
            if then.get(name) != now.get(name)
        ]
        raise InputError(
            f"{path.parent} holds a sweep with other settings: {'; '.join(differing)}; "
            "give another --output-dir, or --restart to begin anew"
        )
    return earlier


def _flat(settings: dict, prefix: str = "") -> dict:
    """Nested settings as one level, with keys such as data.path."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
