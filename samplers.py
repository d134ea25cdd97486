"""Which samples an epoch visits, in which order, and which process takes them.

Modifications of DeiT's `samplers.py: RASampler` (https://github.com/facebookresearch/deit):
- the sampler yields `SampleKey`s, so that a sample's augmentation can depend on its key alone;
- the shuffle also depends on a random seed, and an epoch can be entered in its middle;
- rank and world size are plain arguments, the number of repetitions is one too;
- a data set of fewer than 256 samples has an epoch of its own size instead of an empty one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

# DeiT cuts an epoch of repeated augmentation to a multiple of this many samples.
REPEATED_EPOCH_MULTIPLE = 256


class SampleKey(NamedTuple):
    """What a training sample's augmentation depends on, beside the run's random seed."""

    index: int
    epoch: int
    repetition: int


class TrainSampler(Sampler[SampleKey]):
    """Shuffled samples of one epoch for one rank, with repeated augmentation.

    The order of an epoch depends on (seed, epoch) alone. Rank r takes positions r, r + world_size,
    ... of it, so the samples of a global batch are the same whatever the number of ranks. With
    `num_repeats` R > 1 (DeiT: 3) each index stands R times in a row and only the first part of that
    list is visited, DeiT's rule: n // 256 * 256 positions (n of them if n < 256). With R = 1 each
    index comes once. `epoch_samples` ends an epoch after so many samples over all ranks. The last
    positions that would not give every rank one more are left out; each rank has one at least.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int = 0,
        num_repeats: int = 1,
        rank: int = 0,
        world_size: int = 1,
        epoch_samples: int | None = None,
    ) -> None:
        super().__init__()
        epoch_samples = num_samples if epoch_samples is None else epoch_samples
        self.num_samples = num_samples
        self.epoch_samples = epoch_samples
        self.seed = seed
        self.num_repeats = num_repeats
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0

    @property
    def epoch_length(self) -> int:
        """Samples of a whole epoch on this rank, wherever iteration starts."""
        total = self.num_samples
        if self.num_repeats > 1 and total >= REPEATED_EPOCH_MULTIPLE:
            total = total // REPEATED_EPOCH_MULTIPLE * REPEATED_EPOCH_MULTIPLE
        return min(total, self.epoch_samples) // self.world_size

    @property
    def epoch_seed(self) -> int:
        """One 64-bit word per (seed, epoch): neighbouring seeds never share an epoch's order."""
        return (self.seed * 1_000_003 + self.epoch) % 2**63

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the epoch that the next iteration visits, from this rank's sample `start` on."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return self.epoch_length - self.start

    def __iter__(self) -> Iterator[SampleKey]:
        generator = torch.Generator().manual_seed(self.epoch_seed)
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        for step in range(self.start, self.epoch_length):
            position = self.rank + step * self.world_size
            index, repetition = divmod(position, self.num_repeats)
            yield SampleKey(order[index], self.epoch, repetition)
