"""Batches of bytes become a model's inputs on its device, as in timm's `PrefetchLoader`.

Modifications of https://github.com/huggingface/pytorch-image-models (`timm/data/loader.py`):
- what is erased of a sample depends on its key alone;
- the normalised numbers are those of torchvision's transforms, bit for bit.
"""

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from inputs.cache import CachedLoader

ERASING_STREAM = 0x2545F4914F6CDD1D  # sets the draws of an erasing apart from the transform's
NUM_SEEDS = 2**63  # a sample's seed is in 0 .. NUM_SEEDS - 1, evenly


class Normalize:
    """torchvision's `ToTensor` and `Normalize` for batches of bytes, bit for bit."""

    def __init__(self, data_config: Mapping[str, object], device: torch.device) -> None:
        # A tensor: by a number, a GPU multiplies with its rounded reciprocal.
        self.white = torch.tensor(255.0, device=device)
        stats = torch.tensor([data_config["mean"], data_config["std"]], device=device)
        self.mean, self.std = stats.view(2, 3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32, from uint8 on the same device."""
        result = torch.empty(images.shape, device=images.device)
        # On a CPU a few images at a time, which stay in its cache.
        size = 4 if images.device.type == "cpu" else len(images)
        for part, source in zip(result.split(size), images.split(size), strict=True):
            part.copy_(source).div_(self.white).sub_(self.mean).div_(self.std)
        return result


class DeviceLoader:
    """(images, targets, is_bad) batches whose images are normalised and erased on the device.

    Images (B, 3, H, W) float32 and targets (B,) int64 are on the device, is_bad (B,) int64 is on
    the CPU. An unreadable image that evaluation skips is 0 everywhere. The process's random
    generators are left as they were.
    """

    def __init__(self, batches: DataLoader | CachedLoader, dataset, device: torch.device) -> None:
        """Takes what `SampleDataset` gives, in batches, and that data set for its settings."""
        self._batches = batches
        self._device = device
        self._normalize = Normalize(dataset.data_config, device)
        self._erasing, self._erased_seeds = None, range(0)
        if dataset.erasing is not None:
            self._erased_seeds = range(int(dataset.erasing.probability * NUM_SEEDS))
            self._erasing = copy.copy(dataset.erasing)
            self._erasing.probability, self._erasing.device = 1.0, device
        is_cpu = device.type == "cpu"
        place = torch.default_generator if is_cpu else torch.get_device_module(device)
        self._seed_device = place.manual_seed  # torch.manual_seed is slow, and seeds every device

    @property
    def sampler(self) -> Sampler:
        return self._batches.sampler

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        with _kept_random_states(self._device):
            batches = iter(self._batches)  # draws a seed for the workers
        return iter(lambda: self._next(batches), None)

    def _next(self, batches: Iterator) -> tuple[Tensor, Tensor, Tensor] | None:
        with _kept_random_states(self._device):
            if (batch := next(batches, None)) is None:
                return None
            images, targets, is_bad, seeds = batch
            images = self._normalize(images.to(self._device, non_blocking=True))
            for image, bad, seed in zip(images, is_bad.tolist(), seeds.tolist(), strict=True):
                if seed in self._erased_seeds:  # decided by the key, without a draw
                    random.seed(seed ^ ERASING_STREAM)
                    self._seed_device(seed ^ ERASING_STREAM)
                    self._erasing(image)
                elif bad and seed < 0:
                    image.zero_()
        return images, targets.to(self._device, non_blocking=True), is_bad


def device_loader(
    dataset, device: torch.device, *, num_workers: int, pin_memory: bool = True, **options
) -> DeviceLoader:
    """A `DeviceLoader` of a `DataLoader` with these options; memory is pinned for GPUs only."""
    batches = DataLoader(
        dataset,
        num_workers=num_workers,
        pin_memory=pin_memory and device.type == "cuda",
        persistent_workers=num_workers > 0,
        **options,
    )
    return DeviceLoader(batches, dataset, device)


@contextmanager
def _kept_random_states(device: torch.device) -> Iterator[None]:
    """Puts the states of the random generators back after the body."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
