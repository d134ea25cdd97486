"""What the tests of the data side share: arguments, small data sets, a group of processes."""

import datetime
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image
from torch.multiprocessing import start_processes

from arguments import data_config, get_args_parser
from datasets import SampleDataset, build_dataset
from utils import InputError


def dataset_args(data_path: Path | str, **changes: object) -> Namespace:
    """main.py's arguments, with every random augmentation switched on."""
    strong = {"train_interpolation": "random", "reprob": 0.9, "recount": 2}
    given = {"data_path": str(data_path), "input_size": 48, "seed": 3}
    return Namespace(**vars(get_args_parser().parse_args([])) | strong | given | changes)


def config_of(args: Namespace, input_size: int | None = None) -> dict:
    """The data config of `dataset_args`, for inputs of its own size or another one."""
    return data_config(args, args.input_size if input_size is None else input_size, {})


def random_image(rng: np.random.Generator, height: int = 60, width: int = 70) -> Image.Image:
    """An RGB image of independent random pixels."""
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_image_folder(root: Path) -> Path:
    """ImageFolder of two classes with four training and three validation images each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                random_image(rng).save(root / split / name / f"{index}.png")
    return root


def build(is_train: bool, data_path: Path, **changes: object) -> SampleDataset:
    """The data set of `dataset_args`."""
    args = dataset_args(data_path, **changes)
    return build_dataset(is_train, args, config_of(args))[0]


def refusal(is_train: bool, args: Namespace) -> str:
    """The one-line text with which `build_dataset` refuses the arguments."""
    with pytest.raises(InputError) as error:
        build_dataset(is_train, args, config_of(args))
    assert "\n" not in str(error.value)
    return str(error.value)


def note(path: Path, line: str) -> None:
    """Adds a line to a file that several processes write."""
    with open(path, "a") as file:
        file.write(f"{line}\n")


def run_forked(num_processes: int, body: Callable[[int], object]) -> None:
    """Runs body(rank) in processes that have this one's patches; none may fail."""
    start_processes(body, nprocs=num_processes, start_method="fork")


def run_group(tmp_path: Path, world_size: int, body: Callable[[int], None]) -> None:
    """Runs body(rank) in forked processes that are joined by gloo, two on each machine."""

    def join(rank: int) -> None:
        os.environ["LOCAL_RANK"] = str(rank % 2)
        store = dist.FileStore(str(tmp_path / "store"), world_size)
        group = {"store": store, "rank": rank, "world_size": world_size}
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60), **group)
        body(rank)
        dist.destroy_process_group()

    run_forked(world_size, join)
