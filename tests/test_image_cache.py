"""The image cache: the same pixels as the ordinary loader, and augmentation that a key decides."""

import errno
import os
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import PLAIN_FLAGS, RUN_FLAGS, TINY_FLAGS, read_log
from data_helpers import build, config_of, dataset_args, note, random_image, run_group
from torch.utils.data import DataLoader

from datasets import build_dataset
from inputs import cache
from inputs.batches import DeviceLoader
from inputs.cache import CachedLoader, build_cached_loader, cached_images, crop_and_flip
from samplers import TrainSampler
from utils import InputError

CPU = torch.device("cpu")
PLAIN = {"aa": "none", "color_jitter": 0, "reprob": 0, "batch_size": 5, "input_size": 32}


def cache_args(data_path: Path, folder: Path, **changes: object) -> Namespace:
    return dataset_args(data_path, **PLAIN | {"image_cache": str(folder)} | changes)


def assert_same(batches, others) -> None:
    for batch, other in zip(batches, others, strict=True):
        for mine, theirs in zip(batch, other, strict=True):
            assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype


def training_loader(size: int = 40, **options: object) -> CachedLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, 3, 8, 8), dtype=torch.uint8, generator=generator)
    sampler = TrainSampler(size, **options)
    return CachedLoader(images, torch.arange(size), sampler, 7)


@pytest.mark.parametrize("input_size", [32, 24, 48, (24, 40)])
def test_evaluation_equals_the_ordinary_loader(data_path, tmp_path, input_size):
    args = cache_args(data_path, tmp_path, input_size=input_size, eval=True)
    dataset, _ = build_dataset(False, args, config_of(args))
    ours = build_cached_loader(args, dataset, range(24), CPU)
    theirs = DataLoader(dataset, batch_size=5, sampler=range(24))
    assert len(ours) == len(theirs) == 5
    assert_same(ours, theirs)
    ours, theirs = (DeviceLoader(batches, dataset, CPU) for batches in (ours, theirs))
    assert len(ours) == len(theirs) == 5
    assert_same(ours, theirs)
    assert {batch[0].dtype for batch in ours} == {torch.float32}


def test_evaluation_follows_the_data_config(data_path, tmp_path):
    args = cache_args(data_path, tmp_path, input_size=(40, 56), eval=True)
    files = set()
    for changes in ({}, {"interpolation": "bilinear"}, {"crop_mode": "squash"}):
        dataset, _ = build_dataset(False, args, config_of(args) | changes)
        ours = build_cached_loader(args, dataset, range(24), CPU)
        assert_same(ours, DataLoader(dataset, batch_size=5, sampler=range(24)))
        files.add(ours.images.numpy().tobytes())
    assert len(files) == 3


def test_crops_and_flips_are_torchvisions():
    rng = np.random.default_rng(0)
    picture = torch.from_numpy(np.asarray(random_image(rng, 12, 10)).copy()).permute(2, 0, 1)
    draws = torch.tensor([[0, 8, 3, 4], [8, 0, 5, 4], [0, 1, 1, 0]])
    cropped = crop_and_flip(picture.expand(4, -1, -1, -1), draws)
    padded = TF.pad(picture, [4, 4, 4, 4])
    for result, (top, left, flip) in zip(cropped, draws.T.tolist(), strict=True):
        expected = TF.crop(padded, top, left, 12, 10)
        assert torch.equal(result, TF.hflip(expected) if flip else expected)
    assert torch.equal(cropped[3], picture)


def test_every_crop_and_flip_occurs():
    draws = training_loader(4000)._draws()
    assert draws.shape == (3, 1, 4000)
    for row, count in zip(draws[:, 0], (9, 9, 2), strict=True):
        frequencies = torch.bincount(row) / 4000
        assert len(frequencies) == count
        assert (frequencies - 1 / count).abs().max() < 0.03


def test_a_sample_depends_on_its_key_alone():
    def by_key(**options: object) -> dict:
        loader = training_loader(**{"num_repeats": 3, "seed": 2} | options)
        loader.sampler.set_epoch(1)
        images = torch.cat([images for images, *_ in loader])
        return dict(zip(loader.sampler, images, strict=False))

    alone = by_key()
    shares = by_key(world_size=2) | by_key(rank=1, world_size=2)
    assert all(torch.equal(alone[key], image) for key, image in shares.items() if key in alone)
    other = by_key(seed=3)
    common = [key for key in alone if key in other]
    assert common and not all(torch.equal(alone[key], other[key]) for key in common)


def test_an_epoch_can_be_entered_in_its_middle():
    loader = training_loader()
    whole = list(loader)
    loader.sampler.set_epoch(0, start=14)
    assert len(loader) == len(whole) - 2
    assert_same(loader, whole[2:])


def test_the_file_is_made_once_and_anew_when_the_data_change(data_path, tmp_path):
    args = cache_args(tmp_path / "images", tmp_path / "cache")
    shutil.copytree(data_path, tmp_path / "images")
    dataset, _ = build_dataset(False, args, config_of(args))
    first = cached_images(args, dataset, False, CPU)
    (path,) = (tmp_path / "cache").glob("val-32x32-*.npy")
    made = path.stat().st_mtime_ns
    assert np.array_equal(cached_images(args, dataset, False, CPU), first)
    assert path.stat().st_mtime_ns == made
    changed, _ = dataset.source.samples[3]
    random_image(np.random.default_rng(0), 32, 32).save(changed)
    again = cached_images(args, dataset, False, CPU)
    differing = [i for i in range(len(first)) if not np.array_equal(again[i], first[i])]
    assert differing == [3] and len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aa": "rand-m9-mstd0.5-inc1"}, "add --aa none$"),
        ({"color_jitter": 0.3}, "add --color-jitter 0$"),
        ({"reprob": 0.25, "aa": "v0"}, "add --aa none --reprob 0$"),
        ({"input_size": 48}, "add --src$"),
        ({"bad_images": "skip"}, "add --bad-images error$"),
    ],
)
def test_other_augmentation_is_refused(data_path, tmp_path, changes, words):
    args = cache_args(data_path, tmp_path / "cache", **changes)
    dataset, _ = build_dataset(True, args, config_of(args))
    with pytest.raises(InputError, match=words):
        build_cached_loader(args, dataset, TrainSampler(64), CPU)
    assert not (tmp_path / "cache").exists()


def test_training_from_the_cache(call_main, data_path, tmp_path):
    flags = [*TINY_FLAGS, *RUN_FLAGS, *PLAIN_FLAGS, "--data-path", data_path, "--batch-size", 8]
    cached = ["--image-cache", tmp_path / "cache", "--epoch-images", 32, "--no-repeated-aug",
              "--epochs", 2, "--no-model-ema", "--output-dir", tmp_path / "run"]  # fmt: skip
    assert call_main(*flags, *cached).returncode == 0
    entry = read_log(tmp_path / "run")[-1]
    correct = np.load(tmp_path / "run" / "correct.npy")
    assert correct.shape == (24,) and 100 * correct.mean() == pytest.approx(entry["test_acc1"])
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    assert torch.load(checkpoint, weights_only=True)["updates"] == 2 * 32 // 8
    without = call_main(*flags, "--eval", "--resume", checkpoint)
    assert f"loss {entry['test_loss']:.4f}  on 24 images" in without.stdout


def test_one_process_of_a_machine_decodes(data_path, tmp_path, monkeypatch):
    events, decode = tmp_path / "events", cache._decode
    args = cache_args(data_path, tmp_path / "cache")
    dataset = build(False, data_path, input_size=32)

    def recorded(*facts: object) -> None:
        note(events, "begins")
        decode(*facts)
        note(events, "ends")

    def body(rank: int) -> None:
        note(events, f"{len(cached_images(args, dataset, False, CPU))} images")

    monkeypatch.setattr(cache, "_decode", recorded)
    run_group(tmp_path, 2, body)
    assert events.read_text().splitlines() == ["begins", "ends"] + ["24 images"] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_one_line(data_path, tmp_path, monkeypatch):
    def fill_disk(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    dataset = build(False, data_path, input_size=32)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^--image-cache: cannot write .*/file/val.*exists$"):
        cached_images(cache_args(data_path, tmp_path / "file"), dataset, False, CPU)
    monkeypatch.setattr(os, "fsync", fill_disk)
    with pytest.raises(InputError, match=r"^--image-cache: cannot write .* left on device$"):
        cached_images(cache_args(data_path, tmp_path / "cache"), dataset, False, CPU)
    assert list((tmp_path / "cache").iterdir()) == []
