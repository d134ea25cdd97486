"""Data sets and transforms, named as in DeiT's `datasets.py`.

Modifications of https://github.com/facebookresearch/deit (`datasets.py`):
- a sample's augmentation depends on (seed, epoch, index, repetition) alone (`SampleDataset`);
- unreadable images end the run with their path, or are replaced and counted;
- CIFAR-10, a built-in demo set and torchvision's iNaturalist; ImageFolders of any class count;
- inputs of (H, W); inputs of at most 32 pixels are resized when the images have another size;
- bad input raises `InputError` with one line.
"""

import hashlib
import os
import random
import textwrap
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder, VisionDataset

from inputs.demo import is_demo, make_demo
from inputs.images import (
    CROP_PADDING,
    SMALL_INPUT,
    BadImageError,
    ResizeToCover,
    allow_posterize_to_black,
    cover_and_crop,
    evaluation_crop,
    image_size,
    load_image,
    to_bytes,
)
from inputs.inaturalist import build_inaturalist
from samplers import SampleKey
from utils import InputError, refusing

# How many other samples a bad training image tries before the run gives up.
MAX_REPLACEMENTS = 100


def _hash(*fields: int) -> int:
    """63-bit hash, the same on every machine."""
    digest = hashlib.blake2b(repr(fields).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class SampleDataset(Dataset):
    """Wraps a torchvision data set so that a key alone decides the sample.

    With a `SampleKey` the CPU's random generators are seeded from (seed, epoch, index, repetition)
    before the transform: an image is the same with any number of data loader worker processes, in
    any order and after a resume. A plain index is evaluation, whose transform draws nothing. Images
    are bytes; `inputs.batches.DeviceLoader` makes a model's inputs of them, and puts the states of
    the generators back.

    Args:
        source: its items are (RGB image, target) or raise `BadImageError`; it also has the targets
            of all samples and the names of the classes.
        transform: from an RGB image to a (3, H, W) uint8 tensor.
        data_config: what the transform was built from; input_size is the (H, W) of that tensor.
        erasing: timm's random erasing of normalised images, or None.
        seed: the run's random seed.
        bad_images: "error" raises `BadImageError`; "skip" puts another sample in the place of a bad
            one in training, and a zero image with the right target in evaluation.
    """

    def __init__(
        self,
        source: VisionDataset,
        transform: Callable[[Image.Image], Tensor],
        data_config: Mapping[str, object],
        *,
        erasing: RandomErasing | None = None,
        seed: int = 0,
        bad_images: str = "error",
    ) -> None:
        if bad_images not in ("error", "skip"):
            raise InputError(f"bad_images is {bad_images!r}, allowed: error, skip")
        self.source = source
        self.transform = transform
        self.targets = np.asarray(source.targets, dtype=np.int64)  # (num_samples,)
        self.classes = list(source.classes)
        self.data_config = data_config
        self.erasing = erasing
        self.image_size = image_size(data_config["input_size"])
        self.seed = seed
        self.bad_images = bad_images

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: SampleKey | int) -> tuple[Tensor, int, int, int]:
        """Image, target, whether it is bad, and the sample's seed.

        Returns:
            (3, H, W) uint8; the class; 1 if this key's image cannot be read, else 0; the 63-bit
            seed of all that is random about the sample, or -1 in evaluation.
        """
        training = isinstance(key, SampleKey)
        index = key.index if training else int(key)
        is_bad = 0
        try:
            image, target = self.source[index]
        except BadImageError as error:
            if self.bad_images == "error":
                raise
            is_bad = 1
            if not training:
                image = torch.zeros(3, *self.image_size, dtype=torch.uint8)
                return image, int(self.targets[index]), is_bad, -1
            image, target = self._replacement(key, error)
        seed = -1
        if training:
            seed = _hash(self.seed, key.epoch, key.index, key.repetition)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        return self.transform(image), int(target), is_bad, seed

    def _replacement(self, key: SampleKey, error: BadImageError) -> tuple[Image.Image, int]:
        """Another readable sample; which one depends on the random seed and the key alone."""
        for attempt in range(MAX_REPLACEMENTS):
            drawn = _hash(self.seed, key.epoch, key.index, key.repetition, attempt) % len(self)
            with suppress(BadImageError):
                return self.source[drawn]
        text = f"{error}; and {MAX_REPLACEMENTS} samples drawn in its place cannot be read either"
        raise BadImageError(text) from error


def check_same_classes(train_dataset: SampleDataset, val_dataset: SampleDataset) -> None:
    """Raises `InputError` naming the classes that only one of the two data sets has."""
    if train_dataset.classes == val_dataset.classes:
        return
    train, val = set(train_dataset.classes), set(val_dataset.classes)
    reasons = [
        f"only in {name}: {textwrap.shorten(', '.join(sorted(names)), 100)}"
        for name, names in (("train", train - val), ("val", val - train))
        if names
    ]
    reason = "; ".join(reasons) or "another order"
    raise InputError(f"train and val have different classes; {reason}")


# Transforms -------------------------------------------------------------------------------------


def build_transform(
    is_train: bool, args: Namespace, data_config: Mapping[str, object]
) -> transforms.Compose:
    """Builds DeiT's transform from an RGB image to a (3, H, W) uint8 tensor.

    Training is timm's `create_transform`, without what `DeviceLoader` does. Evaluation resizes the
    image (antialiased) so that it covers (H, W) / crop_pct (or, with the crop mode "squash", is as
    large), then crops (H, W) from its centre. Inputs of at most 32 x 32 follow DeiT's rule for
    CIFAR: train on random crops of the padded image, evaluate on the whole of it; images of another
    size are resized to cover the input first. `src` (simple random crop) asks for such training
    crops at any size, with "3a" out of an image whose borders are mirrored.

    Args:
        is_train: for training or for evaluation.
        args: for training reads src, color_jitter, aa and train_interpolation; for evaluation
            nothing.
        data_config: input_size, (H, W) or one number for both; crop_pct in [0.1, 1]; mean and std
            of the channels; the evaluation's interpolation and crop_mode; as
            `arguments.data_config` gives it.
    """
    size = image_size(data_config["input_size"])
    _check_data_config(data_config)
    if is_train:
        return _train_transform(size, args, data_config)
    crop = cover_and_crop(size, **evaluation_crop(size, data_config))
    return transforms.Compose([*crop, to_bytes])


def _check_data_config(config: Mapping[str, object]) -> None:
    """Raises `InputError` for a crop or a normalisation that no image could have."""
    with refusing(f"images cannot be read with {dict(config)}"):
        ratio, mean, std = config["crop_pct"], *torch.tensor([config["mean"], config["std"]])
        if not 0.1 <= ratio <= 1:  # the whole image is resized to its input size / ratio
            raise ValueError(f"the crop ratio is {ratio}, allowed: 0.1 to 1")
        if config["crop_mode"] not in ("center", "squash"):
            raise ValueError(f"the crop mode is {config['crop_mode']!r}, known: center and squash")
        if len(std) != 3 or not mean.isfinite().all() or not (std > 0).all():
            raise ValueError("mean and std must be three numbers each, std above 0")


def _train_transform(
    size: tuple[int, int], args: Namespace, data_config: Mapping[str, object]
) -> transforms.Compose:
    """timm's training transform, with its assertions turned into `InputError`."""
    is_small = max(size) <= SMALL_INPUT
    names = ("aa", "color_jitter", "train_interpolation")
    given = ", ".join(f"{name}={getattr(args, name)!r}" for name in names)
    with refusing(f"timm refuses the augmentation {given}"):
        transform = create_transform(
            input_size=size,
            is_training=True,
            color_jitter=args.color_jitter,
            auto_augment=None if args.aa in (None, "", "none") else args.aa,
            interpolation=args.train_interpolation,
            mean=data_config["mean"],  # the colour around rotated images
            use_prefetcher=True,  # bytes
        )
    transform.transforms[-1] = to_bytes
    allow_posterize_to_black(transform)
    if is_small or args.src:
        border = "reflect" if args.aa == "3a" and not is_small else "constant"
        crop = transforms.RandomCrop(size, padding=CROP_PADDING, padding_mode=border)
        transform.transforms[:1] = [ResizeToCover(size), crop]
    return transform


def build_erasing(args: Namespace) -> RandomErasing | None:
    """timm's random erasing; none where `aa` is "3a", DeiT-III's 3-Augment."""
    if args.aa == "3a" or args.reprob <= 0:
        return None
    with refusing(f"timm refuses remode={args.remode!r}"):
        return RandomErasing(args.reprob, mode=args.remode, max_count=args.recount)


# Data sets --------------------------------------------------------------------------------------


def _image_folder(root: Path, is_train: bool, args: Namespace) -> ImageFolder:
    split = "train" if is_train else "val"
    try:
        loader = partial(load_image, max_pixels=args.max_image_pixels)
        return ImageFolder(root / split, loader=loader)
    except OSError as error:
        raise InputError(
            f"no images in {root / split}: expected {split}/CLASS/IMAGE (training needs train/ and "
            f"val/, evaluation val/ only): {textwrap.shorten(str(error), 300)}"
        ) from error


def _demo(root: Path, is_train: bool, args: Namespace) -> ImageFolder:
    if not is_demo(root):
        make_demo(root)
    return _image_folder(root, is_train, args)


def _cifar(source: type[CIFAR10], root: Path, is_train: bool, args: Namespace) -> CIFAR10:
    return source(root, train=is_train, download=args.download)


# Each makes torchvision's data set of (root, is_train, args).
DATA_SETS: dict[str, Callable[[Path, bool, Namespace], VisionDataset]] = {
    "IMNET": _image_folder,
    "CIFAR10": partial(_cifar, CIFAR10),
    "CIFAR100": partial(_cifar, CIFAR100),
    "CIFAR": partial(_cifar, CIFAR100),
    "INAT": partial(build_inaturalist, "2018"),
    "INAT19": partial(build_inaturalist, "2019"),
    "DEMO": _demo,
}


def build_dataset(
    is_train: bool, args: Namespace, data_config: Mapping[str, object]
) -> tuple[SampleDataset, int]:
    """Builds the training or the validation set, and gives its number of classes too.

    Several processes call it in turns (`utils.in_turns`), since it may download or draw the images.
    Of `args` it reads seed, bad_images, what `build_source` and `build_transform` read and, for
    training, reprob, remode and recount.
    """
    transform = build_transform(is_train, args, data_config)
    erasing = build_erasing(args) if is_train else None
    policy = {"erasing": erasing, "seed": args.seed, "bad_images": args.bad_images}
    dataset = SampleDataset(build_source(is_train, args), transform, data_config, **policy)
    return dataset, len(dataset.classes)


def build_source(is_train: bool, args: Namespace) -> VisionDataset:
    """torchvision's training or validation set, which gives images as they are.

    Of `args` it reads data_set, data_path, max_image_pixels, download and inat_category.
    """
    root = Path(os.path.expanduser(args.data_path))
    if args.data_set not in DATA_SETS:
        raise InputError(f"data_set is {args.data_set!r}, allowed: {', '.join(DATA_SETS)}")
    may_be_made = args.data_set == "DEMO" or (args.download and args.data_set != "IMNET")
    if not os.path.isdir(root) and not may_be_made:  # pathlib's raises below a locked folder
        raise InputError(f"data path {root} does not exist or is not a folder")
    try:
        return DATA_SETS[args.data_set](root, is_train, args)
    except InputError:
        raise
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        advice = "try again later" if args.download else "--download fetches it"
        reason = textwrap.shorten(str(error), 300)
        raise InputError(f"cannot read {args.data_set} in {root} ({advice}): {reason}") from error
