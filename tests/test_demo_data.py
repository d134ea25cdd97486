"""The demo set: the same every time, whole or absent, never in the place of other data."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import dataset_args, refusal, write_image_folder
from PIL import Image

from inputs import demo as demo_data
from datasets import build_dataset, check_same_classes
from inputs.demo import DEMO_CLASSES, is_demo, make_demo
from utils import InputError

REPOSITORY = Path(__file__).resolve().parent.parent


def _contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.glob("*/*/*.png"))}


SMALL = {"num_train": 3, "num_val": 2, "size": 32}


def test_demo_is_the_same_every_time(tmp_path: Path) -> None:
    first = _contents(make_demo(tmp_path / "a", **SMALL))
    assert first == _contents(make_demo(tmp_path / "b", **SMALL))
    assert len(first) == len(set(first.values())) == len(DEMO_CLASSES) * 5
    longer = _contents(make_demo(tmp_path / "c", **SMALL | {"num_train": 4}))
    assert first.items() <= longer.items(), "a picture does not depend on how many there are"
    other = _contents(make_demo(tmp_path / "d", **SMALL, seed=1))
    assert other.keys() == first.keys() and not set(other.values()) & set(first.values())


def test_demo_is_an_image_folder(tmp_path: Path) -> None:
    root = make_demo(tmp_path / "made" / "demo", **SMALL)
    args = dataset_args(root, data_set="DEMO", input_size=32)
    train, num_classes = build_dataset(True, args)
    val, _ = build_dataset(False, args)
    assert (len(train), len(val), num_classes) == (18, 12, 6)
    assert train.classes == list(DEMO_CLASSES)
    check_same_classes(train, val)
    assert np.asarray(Image.open(root / "val" / "star" / "0001.png")).shape == (32, 32, 3)


def test_complete_demo_is_left_alone(tmp_path: Path) -> None:
    root = make_demo(tmp_path / "demo", **SMALL)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    make_demo(root, **SMALL)
    build_dataset(True, dataset_args(root, data_set="DEMO"))
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize("damage", ["missing", "cut", "marker"])
def test_damaged_demo_is_drawn_again(tmp_path: Path, damage: str) -> None:
    root = make_demo(tmp_path / "demo", **SMALL)
    whole = _contents(root)
    picture = root / "train" / "disc" / "0000.png"
    if damage == "missing":
        picture.unlink()
    elif damage == "cut":
        picture.write_bytes(picture.read_bytes()[:100])
    else:
        manifest = json.loads((root / demo_data.MANIFEST).read_text())
        (root / demo_data.MANIFEST).write_text(json.dumps(manifest | {"version": -1}))
    assert not is_demo(root)
    make_demo(root, **SMALL)
    assert is_demo(root) and _contents(root) == whole


def test_interrupted_demo_leaves_no_half_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupt(*args: object) -> Image.Image:
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return draw(*args)

    draw = demo_data.draw_demo_image
    monkeypatch.setattr(demo_data, "draw_demo_image", interrupt)
    root = tmp_path / "demo"
    with pytest.raises(KeyboardInterrupt):
        make_demo(root, **SMALL)
    assert not root.exists()
    make_demo(root, **SMALL)
    assert is_demo(root)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [root]


def test_demo_never_replaces_other_data(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "images")
    before = _contents(folder)
    with pytest.raises(InputError, match="not touched"):
        make_demo(folder)
    assert "not touched" in refusal(True, dataset_args(folder, data_set="DEMO"))
    assert _contents(folder) == before
    (folder / "file").write_text("")
    assert "cannot make" in refusal(True, dataset_args(folder / "file" / "demo", data_set="DEMO"))


def test_two_processes_make_one_demo(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]; from inputs.demo import make_demo; "
        f"make_demo(sys.argv[1], **{SMALL})"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "demo"), *sys.path]
    processes = [subprocess.Popen(command, cwd=REPOSITORY) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert is_demo(tmp_path / "demo")


@pytest.mark.parametrize("setting", [{"num_train": 0}, {"num_val": 0}, {"size": 8}, {"seed": -1}])
def test_demo_refuses_wrong_settings(tmp_path: Path, setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .*allowed"):
        make_demo(tmp_path / "demo", **setting)


@pytest.mark.parametrize("name", DEMO_CLASSES)
def test_demo_objects_are_whole(name: str) -> None:
    for index in range(20):
        rng = np.random.default_rng([9, index])
        mask = np.asarray(demo_data._object_mask(rng, name, 64)) / 255
        rows, cols = np.nonzero(mask)
        width = max(np.ptp(rows), np.ptp(cols)) + 1
        # A turned polygon is narrower than the circle around it, a triangle's by a factor of 0.8.
        assert 0.2 * 64 <= width <= 0.6 * 64 + 2
        edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert edge.mean() < 0.02, "the object does not leave the image"
        assert 0 < ((mask > 0) & (mask < 1)).sum() < (mask > 0).sum() / 2, "smooth edges only"
