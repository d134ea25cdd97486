"""Data sets: the same images on any machine, policies for bad ones, bad input, one download."""

import json
import pickle
import random
import shutil
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import (
    build,
    config_of,
    dataset_args,
    note,
    random_image,
    refusal,
    run_group,
    write_image_folder,
)
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10

import arguments
import main
from datasets import DATA_SETS, SampleDataset, build_dataset, build_transform, check_same_classes
from inputs.batches import ERASING_STREAM, DeviceLoader, Normalize
from inputs.images import BadImageError, ResizeToCover, allow_posterize_to_black
from samplers import SampleKey, TrainSampler
from utils import InputError, in_turns, seed_everything

# ImageNet's, written out as an independent check.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_image_folder(tmp_path / "images")


def _load(
    dataset: SampleDataset,
    keys: Iterable,
    num_workers: int = 0,
    batch_size: int = 2,
    device: torch.device = CPU,
) -> Tensor:
    """The images as a model gets them, normalised and erased."""
    batches = DataLoader(dataset, batch_size, sampler=keys, num_workers=num_workers)
    return torch.cat([images for images, _, _ in DeviceLoader(batches, dataset, device)])


def _normalize(image: Tensor, config: dict) -> Tensor:
    return Normalize(config, CPU)(image[None])[0]


# Randomness -------------------------------------------------------------------------------------


def test_images_depend_on_the_key_alone(folder):
    dataset = build(True, folder)
    keys = list(TrainSampler(len(dataset), seed=1, num_repeats=3))
    alone = _load(dataset, keys, 0)
    torch.manual_seed(99)
    assert torch.equal(alone, _load(dataset, keys, 2))
    assert torch.equal(alone[4:], _load(dataset, keys[4:], 1)), "as in a run that resumes there"
    assert torch.equal(alone, _load(dataset, keys, batch_size=7))
    assert torch.equal(alone.flip(0), _load(dataset, keys[::-1], 2, batch_size=3))
    assert len({tuple(image.flatten()[:200].tolist()) for image in alone}) == len(keys)


@pytest.mark.parametrize("change", ["index", "epoch", "repetition", "seed"])
def test_each_part_of_the_key_changes_the_augmentation(folder, change):
    key = {"index": 0, "epoch": 0, "repetition": 0, "seed": 3}

    def image(index: int, epoch: int, repetition: int, seed: int) -> tuple[Tensor, int]:
        return build(True, folder, seed=seed)[SampleKey(index, epoch, repetition)][::3]

    (image_a, seed_a), (image_b, seed_b) = image(**key), image(**key | {change: 1})
    assert torch.equal(image_a, image(**key)[0]) and seed_a == image(**key)[1]
    assert not torch.equal(image_a, image_b) and seed_a != seed_b


def test_the_process_keeps_its_own_random_streams(folder):
    def draws() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    seed_everything(1)
    expected = draws()
    seed_everything(1)
    assert len(_load(build(True, folder, reprob=1), [SampleKey(1, 2, 0), SampleKey(2, 2, 0)])) == 2
    assert draws() == expected


def test_evaluation_is_not_random(folder):
    dataset, num_classes = build_dataset(False, dataset_args(folder), config_of(dataset_args("")))
    first, second = _load(dataset, list(range(6)), 0), _load(dataset, list(range(6)), 2)
    assert torch.equal(first, second) and first.shape == (6, 3, 48, 48)
    assert num_classes == 2 and dataset.classes == ["ant", "bee"]
    assert [dataset[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]


# Transforms -------------------------------------------------------------------------------------


def test_evaluation_matches_torchvision():
    image = random_image(np.random.default_rng(1), 300, 417)
    expected = transforms.Resize(256, transforms.InterpolationMode.BICUBIC)(image)
    expected = transforms.ToTensor()(transforms.CenterCrop(224)(expected))
    config = config_of(dataset_args(""), 224)
    ours = build_transform(False, dataset_args(""), config)(image)
    assert ours.dtype == torch.uint8
    assert torch.equal(_normalize(ours, config), transforms.Normalize(MEAN, STD)(expected))


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_a_squashed_image_is_timms(crop_pct):
    image = random_image(np.random.default_rng(1), 90, 61)
    config = config_of(dataset_args(""), 64) | {"crop_mode": "squash", "crop_pct": crop_pct}
    theirs = create_transform(64, interpolation="bicubic", crop_pct=crop_pct, crop_mode="squash")
    ours = build_transform(False, dataset_args(""), config)(image)
    assert torch.equal(_normalize(ours, config), theirs(image))


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "none"])
def test_training_matches_timm(aa):
    args = dataset_args("", aa=aa)
    config = config_of(args, 64)
    ours = build_transform(True, args, config)
    theirs = create_transform(
        64, is_training=True, color_jitter=0.3, auto_augment=aa if aa != "none" else None,
        interpolation="random",
    )  # fmt: skip
    allow_posterize_to_black(theirs)
    rng = np.random.default_rng(1)
    for seed in range(20):
        image, results = random_image(rng, 90, 70), []
        for transform in (ours, theirs):
            seed_everything(seed)
            results.append(transform(image))
        assert torch.equal(_normalize(results[0], config), results[1])


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("input_size", [16, 32, 33, 64, [48, 48], (32, 64), (96, 40)])
@pytest.mark.parametrize("source_size", [(1, 1), (20, 9), (32, 32), (64, 200)])
def test_every_input_size_from_every_image_size(is_train, input_size, source_size):
    image = random_image(np.random.default_rng(2), *source_size)
    transform = build_transform(is_train, dataset_args(""), config_of(dataset_args(""), input_size))
    sizes = [input_size] if isinstance(input_size, int) else list(input_size)
    assert transform(image).shape == (3, sizes[0], sizes[-1])


def test_very_long_images_stay_small_in_memory():
    strip = Image.new("RGB", (60_000, 1))
    assert ResizeToCover((256, 256))(strip).size == (256 * 64, 256)


@pytest.mark.parametrize(
    ("is_train", "changes", "name"),
    [
        (True, {"aa": "nonsense"}, "aa='nonsense'"),
        (True, {"aa": "rand-zz5"}, "aa='rand-zz5'"),
        (True, {"remode": "x"}, "remode='x'"),
        (True, {"input_size": 0}, "input_size is (0, 0), allowed"),
        (False, {"input_size": (32, 32, 3)}, "input_size is (32, 32, 3), allowed"),
        (False, {"eval_crop_ratio": 0.0}, "crop ratio is 0.0, allowed"),
        (False, {"eval_crop_ratio": 1.5}, "crop ratio is 1.5, allowed"),
    ],
)
def test_wrong_transforms_are_one_line(is_train, changes, name):
    assert name in refusal(is_train, dataset_args("", **changes))


@pytest.mark.parametrize(
    "aa", ["rand-m10-n9-inc1", "rand-m10-n9-inc0", "rand-m9-mstd0.5-inc1", "augmix", "v0", "3a"]
)
def test_auto_augment_at_any_magnitude(aa):
    args = dataset_args("", aa=aa)
    transform = build_transform(True, args, config_of(args, 16))
    image = random_image(np.random.default_rng(8), 20, 20)
    for seed in range(150):
        seed_everything(seed)
        result = transform(image)
        assert result.shape == (3, 16, 16) and result.dtype == torch.uint8


def test_posterize():
    args = dataset_args("", aa="rand-m9-inc1")
    transform = build_transform(True, args, config_of(args))
    (augment,) = (step for step in transform.transforms if hasattr(step, "ops"))
    (operation,) = (step for step in augment.ops if step.name.startswith("Posterize"))
    image = random_image(np.random.default_rng(9))
    for bits in range(9):
        expected = np.asarray(image) >> (8 - bits) << (8 - bits)
        assert np.array_equal(np.asarray(operation.aug_fn(image, bits)), expected)


# Batches ----------------------------------------------------------------------------------------


def test_every_byte_is_normalised_as_torchvision_does():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, axis=2)
    for mean, std in ((MEAN, STD), ((0.5,) * 3, (0.5,) * 3), ([0.1, 0.0, 1.0], [1.0, 0.3, 2.0])):
        expected = transforms.Normalize(mean, std)(transforms.ToTensor()(pixels))
        images = torch.from_numpy(pixels).permute(2, 0, 1).expand(7, -1, -1, -1)
        result = Normalize({"mean": mean, "std": std}, CPU)(images)
        assert torch.equal(result, expected.expand(7, -1, -1, -1)) and result.is_contiguous()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bytes_leave_the_workers(folder, num_workers):
    args = dataset_args(folder, num_workers=num_workers, batch_size=4, repeated_aug=False)
    for loader in (
        main.build_train_loader(args, build(True, folder), CPU),
        main.build_val_loader(args, build(False, folder), CPU),
    ):
        assert {images.dtype for images, *_ in loader._batches} == {torch.uint8}
        for images, targets, is_bad in loader:
            assert images.dtype == torch.float32 and images.is_contiguous()
            assert targets.dtype == is_bad.dtype == torch.int64


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_the_key_alone_decides_what_timm_erases(folder, mode):
    changes = {"reprob": 0.25, "remode": mode}
    dataset = build(True, folder, **changes)
    keys = [SampleKey(index, epoch, 0) for epoch in range(60) for index in range(8)]
    images, plain = _load(dataset, keys), _load(build(True, folder, reprob=0), keys)
    is_erased = (images != plain).flatten(1).any(dim=1)
    assert 0.18 < is_erased.float().mean() < 0.32
    assert not torch.equal(is_erased[:8], is_erased[8:16])
    again = _load(dataset, [keys[i] for i in is_erased.nonzero().flatten().tolist()], 1, 5)
    assert torch.equal(images[is_erased], again)
    theirs = RandomErasing(1.0, mode=mode, max_count=2, device="cpu")
    for key, image, before in zip(keys[:80], images, plain, strict=False):
        if not torch.equal(image, before):
            seed = dataset[key][3] ^ ERASING_STREAM
            random.seed(seed)
            torch.manual_seed(seed)
            assert torch.equal(theirs(before), image)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_numbers_and_keeps_its_random_stream(folder):
    gpu = torch.device("cuda", 0)
    keys = [SampleKey(index, epoch, 0) for epoch in range(9) for index in range(8)]
    for changes in ({"reprob": 0}, {"remode": "const"}):  # noise is the device's own
        dataset = build(True, folder, **changes)
        assert torch.equal(_load(dataset, keys, device=gpu).cpu(), _load(dataset, keys))
    dataset = build(True, folder)
    torch.cuda.manual_seed(5)
    alone = _load(dataset, keys, device=gpu)
    drawn = torch.rand(3, device=gpu)
    assert torch.equal(alone.flip(0), _load(dataset, keys[::-1], batch_size=7, device=gpu))
    torch.cuda.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3, device=gpu))


def test_three_augment_and_evaluation_erase_nothing(folder):
    assert build(False, folder).erasing is None
    assert build(True, folder, aa="3a").erasing is None
    assert build(True, folder, reprob=0).erasing is None


# Policies for bad images ------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_policy_reaches_the_training_process(folder, num_workers):
    bad = folder / "train" / "bee" / "2.png"
    bad.write_bytes(b"")
    dataset = build(True, folder)
    with pytest.raises(BadImageError) as error:
        _load(dataset, [SampleKey(index, 0, 0) for index in range(8)], num_workers)
    traceback.clear_frames(error.tb)  # or some later test waits for the loader's worker
    assert str(error.value).startswith(f"cannot read image {bad}: ")
    assert "\n" not in str(error.value)


def test_limit_of_pixels_reaches_the_workers(folder):
    assert len(_load(build(False, folder, max_image_pixels=60 * 70), [0, 1], 1)) == 2
    with pytest.raises(BadImageError, match=r"/val/ant/0\.png: 70 x 60 pixels, max") as error:
        _load(build(False, folder, max_image_pixels=60 * 70 - 1), [0, 1], 1)
    traceback.clear_frames(error.tb)


def test_skip_policy_replaces_in_training(folder):
    clean = build(True, folder)
    (folder / "train" / "bee" / "2.png").write_bytes(b"")
    dataset = build(True, folder, bad_images="skip")
    keys = [SampleKey(index, epoch, 0) for epoch in range(4) for index in range(8)]
    samples = [dataset[key] for key in keys]
    assert [is_bad for _, _, is_bad, _ in samples] == [int(key.index == 6) for key in keys]
    for key, (image, target, is_bad, _) in zip(keys, samples, strict=True):
        assert is_bad or (torch.equal(image, clean[key][0]) and target == clean[key][1])
    bad = [key.index == 6 for key in keys]
    replaced = _load(dataset, keys)[bad]
    again = _load(dataset, [key for key in keys if key.index == 6], 1)
    assert torch.equal(replaced, again), "the replacement depends on the key alone"
    assert all(image.any() for image in replaced)


def test_skip_policy_gives_zeros_in_evaluation(folder):
    (folder / "val" / "bee" / "1.png").write_bytes(b"")
    dataset = build(False, folder, bad_images="skip", input_size=(48, 32))
    images = _load(dataset, range(6), 1)
    assert images.shape == (6, 3, 48, 32) and dataset[4][1] == 1
    assert [bool(image.any()) for image in images] == [True, True, True, True, False, True]
    assert [dataset[i][2] for i in range(6)] == [0, 0, 0, 0, 1, 0]


def test_skip_policy_gives_up_when_nothing_is_readable(folder):
    for path in folder.glob("train/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(BadImageError, match=r"cannot read image .*ant/0\.png.*in its place"):
        build(True, folder, bad_images="skip")[SampleKey(0, 0, 0)]


# Bad input --------------------------------------------------------------------------------------


def test_bad_folders(folder):
    for name in ("nowhere", "x" * 300):
        assert "does not exist" in refusal(True, dataset_args(folder / name))
    assert "does not exist" in refusal(True, dataset_args("~nobody-here"))
    (folder / "file").write_text("")
    assert "is not a folder" in refusal(True, dataset_args(folder / "file"))
    (folder / "train").rename(folder / "training")
    assert len(build(False, folder)) == 6
    assert "evaluation val/ only" in refusal(True, dataset_args(folder))
    (folder / "val" / "cow").mkdir()
    assert "no valid file for the classes cow" in refusal(False, dataset_args(folder))
    shutil.rmtree(folder / "val")
    assert f"No such file or directory: '{folder}/val'" in refusal(False, dataset_args(folder))
    (folder / "val").mkdir()
    assert f"any class folder in {folder}/val" in refusal(False, dataset_args(folder))
    (folder / "val").rmdir()
    for target in ("val", "file"):  # a link to itself, and no folder
        (folder / "val").symlink_to(target)
        assert f"no images in {folder}/val" in refusal(False, dataset_args(folder))
        (folder / "val").unlink()


def test_unknown_choices_list_the_allowed_ones(folder):
    assert tuple(DATA_SETS) == arguments.DATA_SETS
    text = refusal(True, dataset_args(folder, data_set="MNIST"))
    assert text == f"data_set is 'MNIST', allowed: {', '.join(DATA_SETS)}"
    text = refusal(True, dataset_args(folder, bad_images="ignore"))
    assert text == "bad_images is 'ignore', allowed: error, skip"


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "CIFAR", "INAT", "INAT19"])
def test_missing_torchvision_data_sets_say_what_to_do(tmp_path, name):
    text = refusal(True, dataset_args(tmp_path, data_set=name))
    assert text.startswith(f"cannot read {name} in {tmp_path} (--download fetches it): ")
    assert "does not exist" in refusal(True, dataset_args(tmp_path / "nowhere", data_set=name))


def test_different_classes_are_named(folder):
    train, val = build(True, folder), build(False, folder)
    check_same_classes(train, val)
    many = [f"class {index}" for index in range(99)]
    for classes, text in (
        (["ant", "wasp"], "only in train: bee; only in val: wasp"),
        (many, r"class 0, class 1, class 10, .* \[\.\.\.\]$"),
        (["bee", "ant"], "another order"),
    ):
        val.classes = classes
        with pytest.raises(InputError, match=text):
            check_same_classes(train, val)


# torchvision's data sets ------------------------------------------------------------------------


CIFAR_TARGETS = [9, 0, 3, 3, 1]
CIFAR_PIXELS = np.random.default_rng(6).integers(0, 256, (5, 3072), dtype=np.uint8)


def write_cifar10(root: Path) -> None:
    """Five images that are the training and the validation set."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batch = {"data": CIFAR_PIXELS, "labels": CIFAR_TARGETS}
    (folder / "batch").write_bytes(pickle.dumps(batch))
    (folder / "meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}))


@pytest.fixture
def cifar10(monkeypatch) -> type[CIFAR10]:
    """torchvision's class, reading what `write_cifar10` writes."""
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, name, [["batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": None})
    return CIFAR10


@pytest.mark.usefixtures("cifar10")
def test_cifar10(tmp_path):
    write_cifar10(tmp_path)
    train = build(True, tmp_path, data_set="CIFAR10", input_size=64)
    val = build(False, tmp_path, data_set="CIFAR10", input_size=32)
    assert len(val.classes) == 10 and len(train) == 5
    assert train[SampleKey(0, 0, 0)][0].shape == (3, 64, 64)
    assert [val[index][1] for index in range(5)] == CIFAR_TARGETS
    assert torch.equal(val[2][0].flatten(), torch.from_numpy(CIFAR_PIXELS[2]))
    check_same_classes(train, val)


@pytest.fixture
def inaturalist(tmp_path: Path) -> Path:
    """iNaturalist 2018 of three categories in two super-categories, two images each."""
    rng = np.random.default_rng(7)
    files = []
    for name in ("Birds/1", "Plants/0", "Plants/2"):
        (tmp_path / "2018" / name).mkdir(parents=True)
        for index in range(2):
            random_image(rng).save(tmp_path / "2018" / name / f"{index}.jpg")
            files.append({"file_name": f"train_val2018/{name}/{index}.jpg"})
    for split, images in (("train", files[::2]), ("val", files[1::2])):
        (tmp_path / f"{split}2018.json").write_text(json.dumps({"images": images}))
    return tmp_path


@pytest.mark.parametrize(
    ("category", "targets", "num_classes"),
    [("name", [0, 1, 2], 3), ("full", [0, 1, 2], 3), ("supercategory", [1, 0, 1], 2)],
)
def test_inaturalist(inaturalist, category, targets, num_classes):
    for is_train in (True, False):
        dataset = build(is_train, inaturalist, data_set="INAT", inat_category=category)
        assert len(dataset.classes) == num_classes and len(dataset) == 3
        assert [dataset[index][1] for index in range(3)] == targets == dataset.targets.tolist()
        assert {name for _, name in dataset.source.index} == {f"{1 - is_train}.jpg"}


def test_inaturalist_says_what_is_missing(inaturalist):
    args = dataset_args(inaturalist, data_set="INAT")
    kingdom = dataset_args(inaturalist, data_set="INAT", inat_category="kingdom")
    assert "name, full, supercategory" in refusal(True, kingdom)
    (inaturalist / "val2018.json").write_text('{"images": []}')
    assert "none of the images" in refusal(False, args)
    (inaturalist / "val2018.json").unlink()
    assert "val2018.json does not exist" in refusal(False, args)


# Several processes ------------------------------------------------------------------------------


def test_one_process_downloads_and_the_others_wait(cifar10, tmp_path, monkeypatch):
    events, root = tmp_path / "events", tmp_path / "data"

    def download(dataset: CIFAR10) -> None:
        if not root.exists():
            note(events, "begins")
            time.sleep(0.5)
            write_cifar10(root)
            note(events, "ends")

    def body(rank: int) -> None:
        args = dataset_args(root, data_set="CIFAR10", download=True)
        train, val = main.build_datasets(args, config_of(args, 32), CPU)
        note(events, f"{len(train)} and {len(val)} images")

    monkeypatch.setattr(cifar10, "download", download)
    run_group(tmp_path, 2, body)
    assert events.read_text().splitlines() == ["begins", "ends"] + ["5 and 5 images"] * 2


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_processes_take_turns(tmp_path, failing):
    events = tmp_path / "events"

    def body(rank: int) -> None:
        with suppress(InputError), in_turns(CPU):
            note(events, f"{rank} begins")
            time.sleep(0.1)
            note(events, f"{rank} ends")
            if rank == failing:
                raise InputError("refused")
        note(events, "after")

    run_group(tmp_path, 3, body)  # rank 2 is the first of the second machine
    turns = [f"{rank} {what}" for rank in (0, 2, 1) for what in ("begins", "ends")]
    assert events.read_text().splitlines() == turns + ["after"] * 3
