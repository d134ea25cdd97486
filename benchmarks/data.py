"""`--what data`: images/s of the input pipeline, step by step, beside timm's loader."""

import argparse
import statistics
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from timm.data.readers.reader import Reader
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from datasets import SampleDataset, build_transform, load_image
from images import allow_posterize_to_black
from samplers import EvalSampler, TrainSampler
from utils import InputError

from .report import Column, Report, make_report
from .timing import Run, interleaved_times, median_ratio

COLUMNS = [
    Column("step"),
    Column("split"),
    Column("pipeline"),
    Column("workers"),
    Column("images"),
    Column("images/s_per_worker", 2),
    Column("ms_per_image", 3),
    Column("vs_timm", 4),
]

PROTOCOL = [
    "decode: file to RGB pixels; augment: pixels to a normalised tensor (train: DeiT's random "
    "crop, flip, RandAugment and erasing; eval: resize and centre crop), of images decoded before",
    "loader: batches of both, in file order or shuffled, by this project's loader, by timm's "
    "create_loader with the same augmentation that normalises and erases in the worker as ours "
    "does (timm), and by the one that does so on the batch afterwards (timm-prefetch)",
    "every round runs each line once over the same files, in turn; images/s: median of the rounds, "
    "divided by the workers (0 workers: this process, one thread)",
    "vs_timm: median over the rounds of the time of the faster of timm's loaders / own time",
]


class DataChoice(NamedTuple):
    """What to read, and how.

    Attributes:
        folder: searched for image files, subfolders included.
        num_images: how many of them, evenly spread over the sorted list.
        batch_size: images of a batch.
        num_workers: loader processes; 0: this process.
        repetitions: timed rounds.
        warmup: rounds before them.
        options: what `datasets.build_transform` reads.
    """

    folder: Path
    num_images: int
    batch_size: int
    num_workers: int
    repetitions: int
    warmup: int
    options: argparse.Namespace


class _Files(Dataset, Reader):
    """A list of files, as this project's source and as timm's reader."""

    def __init__(self, paths: Sequence[Path], *, opened: bool) -> None:
        super().__init__()
        self.paths = [str(path) for path in paths]
        self.opened = opened

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[object, int]:
        path = self.paths[index]
        return (open(path, "rb") if self.opened else load_image(path)), 0

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.paths[index]


def find_images(folder: Path, num_images: int) -> list[Path]:
    """Up to `num_images` image files below a folder, evenly spread over the sorted list.

    Raises:
        InputError: the folder holds no image.
    """
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise InputError(f"no image in {folder} (extensions: {' '.join(IMG_EXTENSIONS)})")
    count = min(num_images, len(paths))
    return [paths[i * len(paths) // count] for i in range(count)]


def benchmark_data(choice: DataChoice) -> Report:
    """Measures reading, augmenting and loading of one folder's images.

    Args:
        choice: what to read, and how.

    Returns:
        One line per step, split and pipeline.

    Raises:
        InputError: there are no images, or fewer than one batch.
    """
    paths = find_images(choice.folder, choice.num_images)
    if len(paths) < choice.batch_size:
        raise InputError(f"--batch-size {choice.batch_size} is more than the {len(paths)} images")
    paths = paths[: len(paths) // choice.batch_size * choice.batch_size]  # whole batches only
    named = _steps(paths, choice.options) | _loaders(paths, choice)
    times = interleaved_times(
        list(named.values()),
        choice.repetitions,
        warmup=choice.warmup,
        device=torch.device("cpu"),
    )
    rows, raw = [], []
    seconds_of = dict(zip(named, times, strict=True))
    for (step, split, pipeline), seconds in seconds_of.items():
        workers = choice.num_workers if step == "loader" else 0
        per_image = statistics.median(seconds) * max(1, workers) / len(paths)
        row = {"step": step, "split": split, "pipeline": pipeline, "workers": workers}
        raw.append(row | {"seconds": seconds})
        row |= {"images": len(paths), "images/s_per_worker": 1 / per_image}
        row |= {"ms_per_image": 1e3 * per_image}
        if step == "loader":
            rivals = [seconds_of[step, split, name] for name in ("timm", "timm-prefetch")]
            row["vs_timm"] = median_ratio(min(rivals, key=statistics.median), seconds)
        rows.append(row)
    return make_report("data", COLUMNS, rows, PROTOCOL, raw)


def _steps(paths: Sequence[Path], options: argparse.Namespace) -> dict[tuple, Run]:
    """Decoding alone, and augmenting decoded images alone."""
    decoded = [load_image(str(path)) for path in paths]

    def decode() -> None:
        for path in paths:
            load_image(str(path))

    def decode_timm() -> None:
        for path in paths:
            Image.open(path).convert("RGB")

    def augment(is_train: bool) -> Run:
        transform = build_transform(is_train, options)

        def run() -> None:
            for image in decoded:
                transform(image)

        return run

    return {
        ("decode", "both", "bat"): decode,
        ("decode", "both", "timm"): decode_timm,
        ("augment", "train", "bat"): augment(True),
        ("augment", "eval", "bat"): augment(False),
    }


def _loaders(paths: Sequence[Path], choice: DataChoice) -> dict[tuple, Run]:
    """One pass over all images by every loader, for training and for evaluation."""
    loaders = {}
    for split in ("train", "eval"):
        is_train = split == "train"
        loaders["loader", split, "bat"] = _own_loader(paths, choice, is_train)
        for name in ("timm", "timm-prefetch"):
            loader = _timm_loader(paths, choice, is_train, prefetch=name == "timm-prefetch")
            loaders["loader", split, name] = loader
    return {name: _one_pass(loader) for name, loader in loaders.items()}


def _one_pass(loader) -> Run:
    """Reads all images; our training sampler goes to its next epoch, as timm's does by itself."""
    epochs = count()

    def run() -> None:
        if isinstance(loader.sampler, TrainSampler):
            loader.sampler.set_epoch(next(epochs))
        for _ in loader:
            pass

    return run


def _own_loader(paths: Sequence[Path], choice: DataChoice, is_train: bool) -> DataLoader:
    dataset = SampleDataset(
        _Files(paths, opened=False),
        build_transform(is_train, choice.options),
        targets=[0] * len(paths),
        classes=["image"],
        image_size=choice.options.input_size,
    )
    return DataLoader(
        dataset,
        batch_size=choice.batch_size,
        sampler=TrainSampler(len(paths)) if is_train else EvalSampler(len(paths)),
        num_workers=choice.num_workers,
        persistent_workers=choice.num_workers > 0,
    )


def _timm_loader(paths: Sequence[Path], choice: DataChoice, is_train: bool, *, prefetch: bool):
    options = choice.options
    loader = create_loader(
        ImageDataset("", reader=_Files(paths, opened=True)),
        input_size=(3, *options.input_size),
        batch_size=choice.batch_size,
        is_training=is_train,
        re_prob=options.reprob,
        re_mode=options.remode,
        re_count=options.recount,
        color_jitter=options.color_jitter,
        auto_augment=options.aa,
        interpolation=options.train_interpolation if is_train else "bicubic",
        num_workers=choice.num_workers,
        crop_pct=options.eval_crop_ratio,
        device=torch.device("cpu"),
        use_prefetcher=prefetch,
    )
    if is_train:
        allow_posterize_to_black(loader.dataset.transform)
    return loader
