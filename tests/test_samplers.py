"""Orders and shares of the samplers: DeiT's epoch length, any world size, resuming."""

from collections import Counter
from itertools import product

import pytest

from samplers import SampleKey, TrainSampler


def _epoch(num_samples: int, epoch: int = 0, **options: int) -> list[SampleKey]:
    sampler = TrainSampler(num_samples, **options)
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert len(keys) == len(sampler), "len() must say what iterating yields"
    return keys


@pytest.mark.parametrize("num_samples", [1, 7, 255, 256, 1000])
def test_without_repeats_every_sample_comes_once(num_samples):
    keys = _epoch(num_samples, epoch=3)
    assert sorted(key.index for key in keys) == list(range(num_samples))
    assert {(key.epoch, key.repetition) for key in keys} == {(3, 0)}


@pytest.mark.parametrize("num_repeats", [1, 3])
@pytest.mark.parametrize("num_samples", [12, 250, 256, 600, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_global_batches_do_not_depend_on_world_size(num_repeats, num_samples, world_size):
    alone = _epoch(num_samples, seed=5, num_repeats=num_repeats)
    ranks = [
        _epoch(num_samples, seed=5, num_repeats=num_repeats, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(keys) for keys in ranks}) == 1
    interleaved = [key for step in zip(*ranks, strict=True) for key in step]
    assert interleaved == alone[: len(interleaved)]
    assert len(alone) - len(interleaved) < world_size


@pytest.mark.parametrize(
    ("num_samples", "world_size", "expected"),
    [(1_281_167, 8, 160_128), (1000, 1, 768), (1000, 2, 384), (256, 3, 85), (255, 1, 255)],
)
def test_repeated_epoch_has_deits_length(num_samples, world_size, expected):
    options = {"num_repeats": 3, "world_size": world_size}
    assert len(TrainSampler(num_samples, **options)) == expected
    assert len(TrainSampler(num_samples, **options, epoch_samples=77)) == 77 // world_size


def test_repeats_are_consecutive_and_numbered():
    keys = _epoch(1000, num_repeats=3)
    assert [key.repetition for key in keys] == [0, 1, 2] * 256
    counts = Counter(key.index for key in keys)
    assert len(counts) == 256 and set(counts.values()) == {3}
    assert all(keys[i].index == keys[i + 2].index for i in range(0, 768, 3))


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(key.index for key in _epoch(50, epoch, seed=seed))

    assert len({order(*fields) for fields in product(range(3), range(3))}) == 9
    assert order(1, 2) == order(1, 2)


@pytest.mark.parametrize("num_repeats", [1, 3])
@pytest.mark.parametrize("start", [0, 1, 100, 384])
def test_start_resumes_within_an_epoch(num_repeats, start):
    sampler = TrainSampler(768, seed=1, num_repeats=num_repeats, rank=1, world_size=2)
    sampler.set_epoch(4)
    whole = list(sampler)
    sampler.set_epoch(4, start=start)
    assert list(sampler) == whole[start:]
    assert len(sampler) == 384 - start
    assert sampler.epoch_length == 384
    sampler.set_epoch(5)
    assert len(list(sampler)) == 384, "the next epoch starts at its beginning"
