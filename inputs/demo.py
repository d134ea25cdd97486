"""Draws the demo set: six classes of objects on textured backgrounds, written as an ImageFolder.

The class is that of the object: a shape, with a range of hues that only touches the next class's,
as with fruit. Its tone, size, place and angle, the background's texture and colours, and small
vivid blobs are drawn at random and say nothing about the class, so that a model has to find the
few tokens that matter while the rest stays diverse. (Shape alone, in any colour, takes a small
transformer far longer to learn than a demo should last.)
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from utils import InputError

DEMO_CLASSES = ("cross", "disc", "ring", "square", "star", "triangle")
# Written last: a folder with it was complete when it got its name.
MANIFEST = "demo.json"
# Raised when the pictures change, so that older sets are drawn again.
DEMO_VERSION = 2
# Shapes are drawn this many times larger, then averaged down, for smooth edges.
SUPERSAMPLING = 4
# Least distance, in 8-bit RGB, that nine tenths of a background keep from the object's colour.
MIN_CONTRAST = 110.0
# Half the width of a class's range of hues, as a share of the distance between two classes: from
# 0.5 up neighbours overlap and the shape has to decide between them.
HUE_SPREAD = 0.5


def _hsv_to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """(3,) RGB in 0..255 of a colour whose three HSV components are in 0..1."""
    ramp = np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return 255 * value * (1 - saturation * (1 - np.clip(ramp, 0, 1)))


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
    if kind == 1:
        return _unit(np.clip(2 * np.sin(frequency * (u + bend)), -1, 1))
    if kind == 2:
        field = np.sin(frequency * (u + bend)) * np.sin(frequency * (v + bend))
        return _unit(np.clip(4 * field, -1, 1))
    if kind == 3:
        centre = rng.uniform(-0.6, 0.6, 2)
        return _unit(np.sin(frequency * (np.hypot(x - centre[0], y - centre[1]) + bend)))
    return _unit(u + 2 * bend)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) float background in 0..255: textures blended between muted colours."""
    # Neighbouring hues, often with a second family, look like one scene rather than confetti.
    hue = rng.random()
    values = rng.uniform(0.15, 0.95, 4)
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
        arm = 0.32
        corners = np.array([(arm, 0.95), (arm, arm), (0.95, arm)])
        quarter_turn = np.array([[0, -1], [1, 0]])
        turns = [np.linalg.matrix_power(quarter_turn, power) for power in range(4)]
        points = np.concatenate([corners @ turn for turn in turns])
    elif name == "star":
        angles = np.arange(10) * np.pi / 5
        points = np.stack([np.cos(angles), np.sin(angles)], 1)
        points[1::2] *= 0.42
    else:
        corners = {"square": 4, "triangle": 3}[name]
        angles = np.arange(corners) * 2 * np.pi / corners
        points = np.stack([np.cos(angles), np.sin(angles)], 1)
    angle = rng.uniform(0, 2 * np.pi)
    rotation = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return points @ np.array(rotation)


def _object_mask(rng: np.random.Generator, name: str, size: int) -> Image.Image:
    """8-bit mask of one object, 0.3 to 0.6 of the image wide, wholly inside the image."""
    large = size * SUPERSAMPLING
    radius = rng.uniform(0.3, 0.6) * large / 2
    centre = rng.uniform(radius, large - radius, 2)
    mask = Image.new("L", (large, large))
    draw = ImageDraw.Draw(mask)
    if name in ("disc", "ring"):
        # Equal areas would make these two look larger than the shapes with corners.
        radius *= 0.9
        draw.ellipse((*(centre - radius), *(centre + radius)), fill=255)
        if name == "ring":
            hole = radius * rng.uniform(0.5, 0.62)
            draw.ellipse((*(centre - hole), *(centre + hole)), fill=0)
    else:
        corners = _polygon(rng, name) * radius + centre
        draw.polygon([tuple(corner) for corner in corners], fill=255)
    return mask.reduce(SUPERSAMPLING)


def _scene_colours(rng: np.random.Generator, name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws a background and an object's vivid colour until the object stands out from it.

    Args:
        rng: the source of randomness.
        name: class of the object, which decides the range of hues.
        size: side in pixels.

    Returns:
        (size, size, 3) background and (3,) colour, both in 0..255; the pair of most contrast if
        no pair in six reaches `MIN_CONTRAST`.
    """
    best, best_distance = None, -1.0
    for _ in range(6):
        background = _background(rng, size)
        hue = (DEMO_CLASSES.index(name) + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) / len(DEMO_CLASSES)
        colour = _hsv_to_rgb(hue % 1, rng.uniform(0.75, 1), rng.uniform(0.75, 1))
        distances = np.linalg.norm(background.reshape(-1, 3)[::7] - colour, axis=1)
        distance = float(np.quantile(distances, 0.1))
        if distance > best_distance:
            best, best_distance = (background, colour), distance
        if distance >= MIN_CONTRAST:
            break
    return best


def _draw_blobs(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Adds up to six small round blobs, which carry no label, to a (size, size, 3) image."""
    size = len(image)
    canvas = Image.fromarray(image.astype(np.uint8)).resize((2 * size, 2 * size))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(0, 7)):
        centre = rng.uniform(0, 2 * size, 2)
        radii = rng.uniform(0.015, 0.045, 2) * 2 * size
        colour = _hsv_to_rgb(rng.random(), rng.uniform(0.3, 1), rng.uniform(0.4, 1))
        draw.ellipse((*(centre - radii), *(centre + radii)), fill=tuple(colour.astype(int)))
    return np.asarray(canvas.reduce(2), dtype=np.float64)


def draw_demo_image(name: str, size: int, rng: np.random.Generator) -> Image.Image:
    """Draws one picture of the demo set.

    Args:
        name: one of `DEMO_CLASSES`.
        size: side in pixels.
        rng: the only source of randomness.

    Returns:
        An RGB image of size x size pixels.
    """
    background, colour = _scene_colours(rng, name, size)
    image = _draw_blobs(rng, background)
    mask = _object_mask(rng, name, size)
    # A soft shadow, down and to the right, lifts the object off the background.
    offset = max(1, size // 32)
    shadow = Image.new("L", mask.size)
    shadow.paste(mask, (offset, offset))
    shadow = shadow.filter(ImageFilter.GaussianBlur(size / 40))
    image = image * (1 - 0.55 * np.asarray(shadow)[..., None] / 255)
    # Light from a random side shades the object from bright to dark.
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    shade = 1 + rng.uniform(0, 0.5) * (np.cos(angle) * x + np.sin(angle) * y)
    opacity = np.asarray(mask)[..., None] / 255
    image = image * (1 - opacity) + colour * shade[..., None] * opacity
    return Image.fromarray(np.clip(np.rint(image), 0, 255).astype(np.uint8))


def _image_bytes(root: Path) -> tuple[int, int]:
    """Number of pictures below root and their bytes in all."""
    sizes = [file.stat().st_size for file in root.glob("*/*/*.png")]
    return len(sizes), sum(sizes)


def _manifest(root: Path) -> dict | None:
    """What is written in root's manifest, or None where there is no readable one."""
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "settings" in manifest else None


def is_demo(root: str | Path, settings: dict | None = None) -> bool:
    """Whether a folder holds a complete demo set.

    Args:
        root: the folder.
        settings: if given, what the set must have been drawn with.

    Returns:
        True if every picture that the manifest counts is there, with no byte missing.
    """
    root = Path(root)
    manifest = _manifest(root)
    if manifest is None or manifest.get("version") != DEMO_VERSION:
        return False
    if settings is not None and manifest.get("settings") != settings:
        return False
    return _image_bytes(root) == (manifest.get("images"), manifest.get("bytes"))


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Holds a lock file; the system lets go of it when its process dies."""
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _draw_all(root: Path, settings: dict) -> None:
    """Writes the pictures, then the manifest, into the empty folder `root`."""
    for split_id, split in enumerate(("train", "val")):
        for class_id, name in enumerate(DEMO_CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(settings[f"num_{split}"]):
                rng = np.random.default_rng([settings["seed"], split_id, class_id, index])
                image = draw_demo_image(name, settings["size"], rng)
                image.save(folder / f"{index:04d}.png")
    num_images, num_bytes = _image_bytes(root)
    manifest = {
        "version": DEMO_VERSION,
        "settings": settings,
        "images": num_images,
        "bytes": num_bytes,
    }
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _replace(root: Path, complete: Path) -> None:
    """Gives the complete folder its name; what was there is a damaged demo set or empty."""
    if root.exists():
        old = root.with_name(f".{root.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(root, old)
        os.replace(complete, root)
        shutil.rmtree(old)
    else:
        os.replace(complete, root)


def make_demo(
    root: str | Path,
    *,
    num_train: int = 500,
    num_val: int = 100,
    size: int = 64,
    seed: int = 0,
) -> Path:
    """Draws the demo set at root/train/CLASS/NNNN.png and root/val/CLASS/NNNN.png.

    A picture depends on (seed, split, class, index) and the size alone. The set is drawn in a
    folder beside `root` and renamed when it is complete, so `root` never holds a part of it; a
    complete set with the same settings stays as it is, a damaged or different one is replaced. A
    folder that holds anything but a demo set is never touched. Safe with several processes.

    Args:
        root: folder to make; its parents are made too.
        num_train: training pictures a class, 1 or more.
        num_val: validation pictures a class, 1 or more.
        size: side of a picture in pixels, 16 or more.
        seed: of the set, 0 or more.

    Returns:
        `root` as a path.
    """
    settings = {"num_train": num_train, "num_val": num_val, "size": size, "seed": seed}
    for name, least in (("num_train", 1), ("num_val", 1), ("size", 16), ("seed", 0)):
        if settings[name] < least:
            raise ValueError(f"{name} is {settings[name]}, allowed: {least} or more")
    root = Path(root).expanduser().absolute()
    if is_demo(root, settings):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(root.with_name(f".{root.name}.lock")):
            # Another process may have drawn it while this one waited for the lock.
            if not is_demo(root, settings):
                if root.exists() and _manifest(root) is None and any(root.iterdir()):
                    raise InputError(f"{root} holds something else than a demo set; not touched")
                partial = root.with_name(f".{root.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                _draw_all(partial, settings)
                _replace(root, partial)
    except OSError as error:
        raise InputError(f"cannot make the demo set in {root}: {error}") from error
    return root
