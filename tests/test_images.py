"""Hostile and unusual image files: each gives an RGB image or an error with its path."""

import os
import pickle
import socket
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from data_helpers import random_image
from PIL import Image, ImageFile

from arguments import get_args_parser
from inputs.images import MAX_IMAGE_PIXELS, BadImageError, list_images, load_image
from utils import InputError


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk


def _truncated(path: Path) -> None:
    whole = path.with_suffix(".whole.jpg")
    random_image(np.random.default_rng(4)).save(whole)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    whole.unlink()


def _pixels(path: Path) -> np.ndarray:
    """(H, W, 3) of an image, which must load without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(str(path))
    assert image.mode == "RGB" and type(image) is Image.Image
    return np.asarray(image)


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


# 29 bytes that are valid: 13,000 x 13,000 pixels, which take half a minute to decode.
LARGE_GIF = (
    b"GIF89a" + struct.pack("<HH", 13_000, 13_000) + bytes(3) + b","
    + struct.pack("<HHHH", 0, 0, 13_000, 13_000) + b"\0\2\2\x4c\1\0;"
)  # fmt: skip

UNREADABLE: dict[str, Callable[[Path], object]] = {
    "truncated": _truncated,
    "zero bytes": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404</html>"),
    "random bytes": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "jpeg header and noise": lambda path: path.write_bytes(
        b"\xff\xd8\xff\xe0" + np.random.default_rng(1).bytes(5000)
    ),
    "bomb": lambda path: path.write_bytes(_png_header(60_000, 60_000)),
    "large": lambda path: path.write_bytes(LARGE_GIF),
    "FIFO": os.mkfifo,
    "socket": _bind,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "program": lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "missing": lambda path: None,
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_files_name_their_path(tmp_path, kind):
    path = tmp_path / "picture.jpg"
    UNREADABLE[kind](path)
    with pytest.raises(BadImageError) as error:
        _pixels(path)
    text = str(error.value)
    assert str(path) in text and "\n" not in text
    assert len(text) > len(f"cannot read image {path}: "), "a reason is given"
    assert kind not in ("FIFO", "socket", "device", "folder") or f"a {kind}" in text
    assert str(pickle.loads(pickle.dumps(error.value))) == text


def test_content_counts_not_the_extension(tmp_path):
    image = random_image(np.random.default_rng(5))
    image.save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(_pixels(tmp_path / "a.jpg"), np.asarray(image))


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, extension):
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    path = tmp_path / f"a.{extension}"
    Image.fromarray(values).save(path)
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(_pixels(path), np.repeat(expected[..., None], 3, 2))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.2, 1.0]], np.float32), [0, 51, 255]),
        (np.array([[-10.0, 0.0, 90.0]], np.float32), [0, 26, 255]),
        (np.array([[0, 1_000_000, 2_000_000]], np.int32), [0, 128, 255]),
        (np.array([[-7, -7, -7]], np.int32), [0, 0, 0]),
    ],
)
def test_32_bit_grey(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert _pixels(tmp_path / "a.tif")[0, :, 0].tolist() == expected


def test_not_a_number_is_unreadable(tmp_path):
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(BadImageError, match="not finite"):
        load_image(str(tmp_path / "a.tif"))


@pytest.mark.parametrize("extension", ["gif", "png", "webp"])
def test_animation_gives_its_first_frame(tmp_path, extension):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"a.{extension}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.abs(_pixels(path).astype(int) - [255, 0, 0]).max() < 4


def test_palette_with_alpha_keeps_the_stored_colours(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    assert _pixels(tmp_path / "a.png").tolist() == [[[10, 20, 30], [200, 100, 50]]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "PA", "YCbCr", "LAB"])
def test_other_modes(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode in ("PA", "YCbCr", "LAB") else "a.png")
    Image.new(mode, (5, 4)).save(path)
    assert _pixels(path).shape == (4, 5, 3)


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red, *others = _pixels(tmp_path / "a.jpg")[0, 0]
    assert red > 240 and max(others) < 15, "cyan-free ink is red"


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert _pixels(tmp_path / "a.jpg").shape == (10, 30, 3)


def test_large_image_below_the_limit_prints_nothing(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert _pixels(tmp_path / "a.png").shape == (40, 40, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(BadImageError, match="bomb"):
        load_image(str(tmp_path / "a.png"))


def test_larger_images_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    assert load_image(str(tmp_path / "a.png"), 1200).size == (40, 30)
    monkeypatch.setattr(ImageFile.ImageFile, "load", Mock(side_effect=AssertionError("decoded")))
    with pytest.raises(BadImageError, match=r"40 x 30 pixels, max_image_pixels is 1199"):
        load_image(str(tmp_path / "a.png"), 1199)
    assert get_args_parser().parse_args([]).max_image_pixels == MAX_IMAGE_PIXELS


def test_list_images(tmp_path):
    files = [tmp_path / name for name in ("b/2.PNG", "b/a/1.jpg", "c.jpeg", "notes.txt")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("# a comment\n\nx/1.png\n ~/2.jpg \n~nobody-here/3.jpg")
    os.mkfifo(tmp_path / "d.png")  # listed, for load_image to refuse
    assert list_images(tmp_path) == [*files[:3], tmp_path / "d.png"]
    assert list_images(files[0]) == files[:1]
    named = [Path("x/1.png"), Path("~/2.jpg").expanduser(), Path("~nobody-here/3.jpg")]
    assert list_images(files[3]) == named


def test_no_images_to_list(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    os.mkfifo(tmp_path / "fifo")
    words = {"empty": "no image in", "binary": "neither an image", "nowhere": "does not exist"}
    words |= {"fifo": "neither folder nor file", "x" * 300: "does not exist"}
    for name, text in words.items():
        with pytest.raises(InputError, match=text):
            list_images(tmp_path / name)
