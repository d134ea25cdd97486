"""The demo set: the same every time, whole or absent, never in the place of other data."""

from pathlib import Path

import numpy as np
import pytest
from data_helpers import build, dataset_args, refusal, run_forked, write_image_folder
from PIL import Image

from datasets import check_same_classes
from inputs import demo
from inputs.demo import DEMO_CLASSES, is_demo, make_demo
from utils import InputError

SMALL = {"num_train": 3, "num_val": 2, "size": 32}


def _contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.glob("*/*/*.png"))}


def test_demo_is_the_same_every_time(tmp_path):
    def made(name: str, **changes: int) -> dict[str, bytes]:
        return _contents(make_demo(tmp_path / name, **SMALL | changes))

    first = made("a")
    assert len(first) == len(set(first.values())) == len(DEMO_CLASSES) * 5
    longer = made("b", num_train=4)
    assert first.items() <= longer.items(), "a picture does not depend on how many there are"
    other = made("c", seed=1)
    assert other.keys() == first.keys() and not set(other.values()) & set(first.values())


def test_demo_is_an_image_folder(tmp_path):
    root = make_demo(tmp_path / "made" / "demo", **SMALL)
    train = build(True, root, data_set="DEMO", input_size=32)
    val = build(False, root, data_set="DEMO", input_size=32)
    assert (len(train), len(val), len(train.classes)) == (18, 12, 6)
    assert train.classes == list(DEMO_CLASSES)
    check_same_classes(train, val)
    assert np.asarray(Image.open(root / "val" / "star" / "0001.png")).shape == (32, 32, 3)


def test_complete_demo_is_left_alone(tmp_path):
    root = make_demo(tmp_path / "demo", **SMALL)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    make_demo(root, **SMALL)
    build(True, root, data_set="DEMO")
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_interrupted_demo_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.json, "dumps", interrupt)  # called when every picture is there
    with pytest.raises(KeyboardInterrupt):
        make_demo(tmp_path / "demo", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_demo_never_replaces_other_data(tmp_path):
    folder = write_image_folder(tmp_path / "images")
    before = _contents(folder)
    with pytest.raises(InputError, match="not touched"):
        make_demo(folder)
    assert "not touched" in refusal(True, dataset_args(folder, data_set="DEMO"))
    other = make_demo(tmp_path / "demo", **SMALL)
    with pytest.raises(InputError, match="not touched"):
        make_demo(other, **SMALL | {"seed": 1})
    assert _contents(folder) == before
    (folder / "file").write_text("")
    assert "cannot make" in refusal(True, dataset_args(folder / "file" / "demo", data_set="DEMO"))


def test_two_runs_make_one_demo(tmp_path):
    root = tmp_path / "demo"
    run_forked(3, lambda rank: make_demo(root, **SMALL))
    assert is_demo(root) and list(tmp_path.iterdir()) == [root]


@pytest.mark.parametrize("setting", [{"num_train": 0}, {"num_val": 0}, {"size": 8}, {"seed": -1}])
def test_demo_refuses_wrong_settings(tmp_path, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .*allowed"):
        make_demo(tmp_path / "demo", **setting)


@pytest.mark.parametrize("name", DEMO_CLASSES)
def test_demo_objects_are_whole(name):
    for index in range(20):
        rng = np.random.default_rng([9, index])
        mask = np.asarray(demo._object_mask(rng, name, 64)) / 255
        rows, cols = np.nonzero(mask)
        width = max(np.ptp(rows), np.ptp(cols)) + 1
        # A turned polygon is narrower than the circle around it, a triangle's by a factor of 0.8.
        assert 0.2 * 64 <= width <= 0.6 * 64 + 2
        edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert edge.mean() < 0.02, "the object does not leave the image"
        assert 0 < ((mask > 0) & (mask < 1)).sum() < (mask > 0).sum() / 2, "smooth edges only"
