"""Decoded images in one file, and a loader that augments whole batches on the device.

For small images and small models: reading a file and augmenting it costs more than a training step
on a GPU. Every image is decoded once, kept as bytes in a memory-mapped file that all runs share,
and moved to the device; random crops and flips are index arithmetic there.
"""

import hashlib
import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import write_array_header_1_0
from torch import Tensor
from torch.utils.data import BatchSampler
from torchvision import transforms

from inputs.images import CROP_PADDING, SMALL_INPUT, cover_and_crop, evaluation_crop
from samplers import TrainSampler
from utils import InputError, in_turns, logger

AUGMENTATION_STREAM = 0x5DEECE66D  # sets the draws of an epoch apart from its shuffle


def _digest(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def digest_dataset(dataset) -> str:
    """Short hash of a data set's classes, targets and file names (where it has files)."""
    samples = getattr(dataset.source, "samples", ())
    files = [os.path.relpath(path, dataset.source.root) for path, _ in samples]
    return _digest(dataset.classes, dataset.targets.tolist(), files)


def check_cacheable(args: Namespace, dataset) -> None:
    """Raises `InputError` unless the augmentation is `CachedLoader`'s: random crop and flip."""
    if args.bad_images != "error":
        raise InputError("--image-cache takes readable images only: add --bad-images error")
    if args.eval:
        return
    needed = {
        "--aa none": args.aa not in (None, "", "none"),
        "--color-jitter 0": args.color_jitter,
        "--reprob 0": args.reprob,
        "--src": not args.src and max(dataset.image_size) > SMALL_INPUT,
    }
    missing = [flag for flag, is_needed in needed.items() if is_needed]
    if missing:
        flags = " ".join(missing)
        raise InputError(f"--image-cache augments by random crop and flip alone: add {flags}")


def cached_images(args: Namespace, dataset, is_train: bool, device: torch.device) -> np.ndarray:
    """Opens the file of a data set's decoded images, after making it if it is not there.

    An image becomes what `cover_and_crop` makes of it at the (H, W) of the data set's inputs: for
    evaluation with the settings of its data_config, for training the middle of the whole image.
    The file's name says which files, of which sizes and times, it was made from. One process of
    each machine makes it, the others wait.

    Returns:
        (images, 3, H, W) uint8, memory-mapped; what is written to it stays in this process.
    """
    rows, cols = dataset.image_size
    crop = {} if is_train else evaluation_crop(dataset.image_size, dataset.data_config)
    paths = [path for path, _ in getattr(dataset.source, "samples", ())]
    stats = [os.stat(path) for path in paths if os.path.exists(path)]  # decoding names the others
    size, time = sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)
    digest = _digest(digest_dataset(dataset), rows, cols, crop, size, time)[:12]
    path = Path(args.image_cache) / f"{'train' if is_train else 'val'}-{rows}x{cols}-{digest}.npy"
    try:
        with in_turns(device):
            if not path.exists():
                logger.info(f"decoding {len(dataset)} images into {path}")
                _decode(dataset, crop, path)
    except OSError as problem:
        reason = problem.strerror or problem
        raise InputError(f"--image-cache: cannot write {path}: {reason}") from problem
    return np.load(path, mmap_mode="c")


def _decode(dataset, crop_settings: dict[str, object], path: Path) -> None:
    """Writes the file, whole or not at all, even if another run does so at the same time."""
    crop = transforms.Compose(cover_and_crop(dataset.image_size, **crop_settings))
    shape = (len(dataset), 3, *dataset.image_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
        partial = Path(folder, path.name)
        with open(partial, "wb") as file:
            write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for index in range(len(dataset)):
                image, _ = dataset.source[index]
                file.write(np.asarray(crop(image)).transpose(2, 0, 1).tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


class CachedLoader:
    """Batches of decoded images, as bytes, cropped and flipped on the device.

    With a `TrainSampler` every image is padded by 4 black pixels, cropped at random and flipped
    with probability 1/2, as `build_transform` does for small inputs; the draws depend on (seed,
    epoch, index, repetition) alone, and an incomplete last batch is left out. With plain indices
    images are those of `build_transform`. Batches are (images, targets, is_bad, seeds), as a
    `DataLoader` makes them of a `SampleDataset` in evaluation.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        sampler: TrainSampler | Sequence[int],
        batch_size: int,
    ) -> None:
        """Takes (N, 3, H, W) uint8 images on the device to augment on, (N,) int64 CPU targets."""
        self.images = images
        self.targets = targets
        self.sampler = sampler
        self._trains = isinstance(sampler, TrainSampler)
        self._batches = BatchSampler(sampler, batch_size, drop_last=self._trains)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        draws = self._draws() if self._trains else None
        for keys in self._batches:
            index = torch.tensor([key.index for key in keys] if self._trains else keys)
            images = self.images[index.to(self.images.device, non_blocking=True)]
            if draws is not None:
                repetition = torch.tensor([key.repetition for key in keys])
                own = draws[:, repetition, index].to(images.device, non_blocking=True)
                images = crop_and_flip(images, own)
            is_bad, seeds = torch.tensor([[0], [-1]]).expand(2, len(keys))
            yield images, self.targets[index], is_bad, seeds

    def _draws(self) -> Tensor:
        """(3, repetitions, N) int64: first row and column of each crop, and whether to flip."""
        sampler = self.sampler
        generator = torch.Generator().manual_seed(sampler.epoch_seed ^ AUGMENTATION_STREAM)
        shape = (sampler.num_repeats, sampler.num_samples)
        corners = torch.randint(2 * CROP_PADDING + 1, (2, *shape), generator=generator)
        flips = torch.randint(2, (1, *shape), generator=generator)
        return torch.cat([corners, flips])


def crop_and_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Pads images with black, crops them to their old size and mirrors some of them.

    Args:
        images: (B, C, H, W), like the result.
        draws: (3, B) int64: first row and first column of the crop within the padded image, each in
            0 .. 8, and 1 for a mirrored image.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, [CROP_PADDING] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 9, 9, H, W), a view
    top, left, flip = draws
    image = torch.arange(len(images), device=images.device)
    crops = windows[image, :, top, left]  # (B, C, H, W)
    return torch.where(flip.bool().view(-1, 1, 1, 1), crops.flip(3), crops)


def build_cached_loader(
    args: Namespace, dataset, sampler: TrainSampler | Sequence[int], device: torch.device
) -> CachedLoader:
    """Decodes a data set, or opens what is decoded already, and moves it to the device."""
    check_cacheable(args, dataset)
    pixels = cached_images(args, dataset, isinstance(sampler, TrainSampler), device)
    # On the CPU the file itself is the memory, shared by all processes that read it.
    images = torch.from_numpy(pixels).to(device)
    return CachedLoader(images, torch.from_numpy(dataset.targets), sampler, args.batch_size)
