"""What the tests of the data side share: arguments, a random image, a small ImageFolder."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import build_dataset
from utils import InputError


def dataset_args(data_path: Path | str, **changes: object) -> Namespace:
    """Arguments of `build_dataset` with every random augmentation switched on."""
    args = {
        "data_set": "IMNET",
        "data_path": str(data_path),
        "input_size": 48,
        "color_jitter": 0.3,
        "aa": "rand-m9-mstd0.5-inc1",
        "train_interpolation": "random",
        "reprob": 0.9,
        "remode": "pixel",
        "recount": 2,
        "eval_crop_ratio": 0.875,
        "src": False,
        "inat_category": "name",
        "download": False,
        "seed": 3,
        "bad_images": "error",
    }
    return Namespace(**args | changes)


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


def refusal(is_train: bool, args: Namespace) -> str:
    """The one-line text with which `build_dataset` refuses the arguments."""
    with pytest.raises(InputError) as error:
        build_dataset(is_train, args, args.input_size)
    assert "\n" not in str(error.value)
    return str(error.value)
