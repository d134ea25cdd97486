"""Draws the demo set: six classes of objects on textured backgrounds, written as an ImageFolder.

The class is that of the object: a shape, with a range of hues that only touches the next class's
(shape alone takes a small transformer far longer to learn than a demo should last). Everything else
is random and says nothing about the class, so that a model has to find the few tokens that matter
while the rest stays diverse.
"""

import colorsys
import json
import os
import tempfile
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from utils import InputError

DEMO_CLASSES = ("cross", "disc", "ring", "square", "star", "triangle")
SETTINGS_FILE = "demo.json"
# Shapes are drawn this many times larger, then averaged down, for smooth edges.
SUPERSAMPLING = 4
# Least distance, in 8-bit RGB, that nine tenths of a background keep from the object's colour.
MIN_CONTRAST = 110.0
# Half the width of a class's range of hues, in distances between two classes; 0.5: ranges touch.
HUE_SPREAD = 0.5


def _hsv_to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """(3,) RGB in 0..255 of a colour whose three HSV components are in 0..1."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def _unit(field: np.ndarray) -> np.ndarray:
    """Stretches a field to 0..1."""
    return (field - field.min()) / max(field.max() - field.min(), 1e-6)


def _noise_field(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """(size, size) smooth noise in 0..1 with about `cells` bumps a side."""
    grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return _unit(np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)))


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size) field in 0..1: smooth noise, stripes, checks, rings or a gradient."""
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    angle = rng.uniform(0, np.pi)
    u = np.cos(angle) * x + np.sin(angle) * y
    v = np.cos(angle) * y - np.sin(angle) * x
    frequency = rng.uniform(3, 9) * 2 * np.pi
    # Straight patterns are bent a little, as cloth or water would be.
    bend = rng.uniform(0, 0.12) * _noise_field(rng, size, 4)
    kind = rng.integers(5)
    if kind == 0:
        return _noise_field(rng, size, int(rng.integers(3, 12)))
    stripes = np.sin(frequency * (u + bend))
    if kind == 1:
        return _unit(np.clip(2 * stripes, -1, 1))
    if kind == 2:
        return _unit(np.clip(4 * (stripes * np.sin(frequency * (v + bend))), -1, 1))
    if kind == 3:
        centre = rng.uniform(-0.6, 0.6, 2)
        return _unit(np.sin(frequency * (np.hypot(x - centre[0], y - centre[1]) + bend)))
    return _unit(u + 2 * bend)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) float background in 0..255: textures blended between muted colours."""
    hue = rng.random()
    values = rng.uniform(0.15, 0.95, 4)
    # Neighbouring hues, often with a second family, look like one scene rather than confetti.
    hues = (hue + rng.choice([0.0, 0.08, -0.08, 0.45], 4)) % 1
    saturations = rng.uniform(0.1, 0.6, 4)
    colours = [_hsv_to_rgb(*hsv) for hsv in zip(hues, saturations, values, strict=True)]
    blend = _texture(rng, size)[..., None]
    image = colours[0] * blend + colours[1] * (1 - blend)
    for colour in colours[2 : 2 + rng.integers(1, 3)]:
        mask = rng.uniform(0.3, 0.7) * _texture(rng, size)[..., None]
        image = image * (1 - mask) + colour * mask
    grain = rng.uniform(2, 14) * rng.standard_normal((size, size, 3))
    return np.clip(image + grain, 0, 255)


def _polygon(rng: np.random.Generator, name: str) -> np.ndarray:
    """(n, 2) corners of a shape around 0 that reaches a distance of 1, at a random angle."""
    if name == "cross":
        corners = np.array([(0.32, 0.95), (0.32, 0.32), (0.95, 0.32)])
        turned = corners[:, ::-1] * [1, -1]  # by a quarter
        points = np.concatenate([corners, turned, -corners, -turned])
    else:
        corners = {"star": 10, "square": 4, "triangle": 3}[name]
        angles = np.arange(corners) * 2 * np.pi / corners
        points = np.stack([np.cos(angles), np.sin(angles)], 1)
        if name == "star":
            points[1::2] *= 0.42
    angle = rng.uniform(0, 2 * np.pi)
    return points @ [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]


def _object_mask(rng: np.random.Generator, name: str, size: int) -> Image.Image:
    """8-bit mask of one object, 0.3 to 0.6 of the image wide, wholly inside the image."""
    large = size * SUPERSAMPLING
    radius = rng.uniform(0.3, 0.6) * large / 2
    centre = rng.uniform(radius, large - radius, 2)
    mask = Image.new("L", (large, large))
    draw = ImageDraw.Draw(mask)
    if name in ("disc", "ring"):
        radius *= 0.9  # of equal area these two would look larger than the shapes with corners
        draw.ellipse((*(centre - radius), *(centre + radius)), fill=255)
        if name == "ring":
            hole = radius * rng.uniform(0.5, 0.62)
            draw.ellipse((*(centre - hole), *(centre + hole)), fill=0)
    else:
        draw.polygon([*map(tuple, _polygon(rng, name) * radius + centre)], fill=255)
    return mask.reduce(SUPERSAMPLING)


def _scene_colours(rng: np.random.Generator, name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(size, size, 3) background and an object's vivid (3,) colour, both in 0..255.

    Drawn until the contrast reaches `MIN_CONTRAST`; of six such pairs the one of most contrast.
    """
    drawn = []
    for _ in range(6):
        background = _background(rng, size)
        hue = (DEMO_CLASSES.index(name) + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) / len(DEMO_CLASSES)
        colour = _hsv_to_rgb(hue % 1, rng.uniform(0.75, 1), rng.uniform(0.75, 1))
        distances = np.linalg.norm(background.reshape(-1, 3)[::7] - colour, axis=1)
        drawn.append((np.quantile(distances, 0.1), background, colour))
        if drawn[-1][0] >= MIN_CONTRAST:
            break
    return max(drawn, key=itemgetter(0))[1:]


def draw_demo_image(name: str, size: int, rng: np.random.Generator) -> Image.Image:
    """One RGB picture of size x size pixels, with an object of class `name`."""
    image, colour = _scene_colours(rng, name, size)
    mask = _object_mask(rng, name, size)
    # A soft shadow, down and to the right, lifts the object off the background.
    shadow = Image.new("L", mask.size)
    shadow.paste(mask, (max(1, size // 32),) * 2)
    shadow = shadow.filter(ImageFilter.GaussianBlur(size / 40))
    image = image * (1 - 0.55 * np.asarray(shadow)[..., None] / 255)
    opacity = np.asarray(mask)[..., None] / 255
    image = image * (1 - opacity) + colour * opacity
    return Image.fromarray(np.clip(np.rint(image), 0, 255).astype(np.uint8))


def is_demo(root: str | Path) -> bool:
    """Whether a folder holds a demo set; only a complete one has its settings written in it."""
    return (Path(root) / SETTINGS_FILE).is_file()


def _draw_all(root: Path, settings: dict) -> None:
    """Writes the pictures, then the settings, into a new folder `root`."""
    for split_id, split in enumerate(("train", "val")):
        for class_id, name in enumerate(DEMO_CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(settings[f"num_{split}"]):
                rng = np.random.default_rng([settings["seed"], split_id, class_id, index])
                image = draw_demo_image(name, settings["size"], rng)
                image.save(folder / f"{index:04d}.png")
    (root / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n")


def make_demo(
    root: str | Path, *, num_train: int = 500, num_val: int = 100, size: int = 64, seed: int = 0
) -> Path:
    """Draws the demo set at root/train/CLASS/NNNN.png and root/val/CLASS/NNNN.png.

    A picture depends on (seed, split, class, index) and the size alone. The set is drawn in a
    folder beside `root` and renamed when it is complete, so `root` never holds a part of it, even
    if two runs make it at once. A folder that holds anything else is never touched.

    Args:
        root: folder to make, or the complete set of an earlier call with the same settings.
        num_train: pictures a class, from 1 up, as is `num_val`.
        size: side of a picture in pixels, from 16 up.
    """
    settings = {"num_train": num_train, "num_val": num_val, "size": size, "seed": seed}
    for name, least in (("num_train", 1), ("num_val", 1), ("size", 16), ("seed", 0)):
        if settings[name] < least:
            raise InputError(f"{name} is {settings[name]}, allowed: {least} or more")
    root = Path(root).expanduser().absolute()
    try:
        if not is_demo(root):
            if root.exists() and any(root.iterdir()) and not is_demo(root):  # by another run
                raise InputError(f"{root} holds something else than a demo set; not touched")
            root.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
                _draw_all(Path(folder, "new"), settings)
                with suppress(OSError):  # another run has been quicker
                    os.replace(Path(folder, "new"), root)
        if json.loads((root / SETTINGS_FILE).read_text()) != settings:
            raise InputError(f"{root} holds another demo set; not touched")
    except OSError as error:
        raise InputError(f"cannot make the demo set in {root}: {error}") from error
    return root
