"""Reading image files safely, and the steps that DeiT's transforms need beside timm's."""

import os
import stat
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.layers import to_2tuple
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional

from utils import InputError

# A file is read by its content, whatever its extension; formats outside this list (EPS, for one,
# would start an external program) are refused.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# 1/4 GiB of RGB, as Pillow's own limit, at which it only warns.
MAX_IMAGE_PIXELS = 89_000_000
# Longer images are cut to this many short sides before resizing, which bounds the memory.
MAX_ASPECT_RATIO = 64
# DeiT's limit: inputs up to this size are cropped out of the padded image, not zoomed into.
SMALL_INPUT = 32
CROP_PADDING = 4  # black pixels around an image that is cropped at random


class BadImageError(InputError):
    """An image that cannot be read; the text is one line with the path and the reason."""

    def __init__(self, text: str) -> None:
        # The data loader rebuilds a worker's exception from its traceback: the last line counts.
        super().__init__(text.rstrip().rpartition("\n")[2].rpartition("BadImageError: ")[2])


def _grey_to_8bit(image: Image.Image) -> Image.Image:
    """Scales a greyscale image of 16 or 32 bits to 8 (Pillow's own conversion clips at 255).

    Integers within 0..65535 are taken as 16-bit, floats within 0..1 as fractions of white;
    anything else is stretched from its own minimum to its own maximum.
    """
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("pixel values that are not finite")
    low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
    if values.min() < low or values.max() > high:
        low, high = values.min(), values.max()
    scaled = (values - low) * (255.0 / max(high - low, np.finfo(np.float64).tiny))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def load_image(path: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Reads an image file as 8-bit RGB; `BadImageError` for any other file or format.

    As in torchvision's loader alpha is dropped, so a transparent pixel has the colour stored under
    it, and the orientation in EXIF data is not applied. Of an animation the first frame counts.
    Images of more than `max_pixels` are refused before they are decoded; of more than twice
    `PIL.Image.MAX_IMAGE_PIXELS` (179 million) always, by Pillow.
    """
    try:
        letter = stat.filemode(os.stat(path).st_mode)[0]
        if letter != "-":  # opening a FIFO would wait for ever
            kind = {"d": "folder", "p": "FIFO", "s": "socket"}.get(letter, "device")
            raise ValueError(f"a {kind}, not a file")
        # Pillow warns about large images, odd metadata and palettes with alpha, all defined here.
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            image = Image.open(file, formats=IMAGE_FORMATS)
            if image.width * image.height > max_pixels:
                raise ValueError(
                    f"{image.width} x {image.height} pixels, max_image_pixels is {max_pixels}"
                )
            image.load()
            if image.mode.startswith("I") or image.mode == "F":
                image = _grey_to_8bit(image)
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("RGB")
    # Pillow's decoders raise almost anything on damaged data: struct.error, SyntaxError, ...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        line = str(path).replace("\n", "\\n")
        raise BadImageError(f"cannot read image {line}: {reason}") from error


class ResizeToCover:
    """Resizes so that the image just covers (H, W), keeping its aspect ratio.

    For H = W this is torchvision's `Resize(H)`. A very long image is first cut to its middle.
    """

    def __init__(self, size: tuple[int, int], interpolation: str = "bicubic") -> None:
        self.size = size
        self.resampling = Image.Resampling[interpolation.upper()]

    def __call__(self, image: Image.Image) -> Image.Image:
        longest = MAX_ASPECT_RATIO * min(image.size)
        if max(image.size) > longest:
            size = [min(image.height, longest), min(image.width, longest)]
            image = functional.center_crop(image, size)
        rows, cols = self.size
        width, height = image.size
        if rows * width >= cols * height:
            cols = max(cols, int(rows * width / height))
        else:
            rows = max(rows, int(cols * height / width))
        if (cols, rows) == image.size:
            return image
        return image.resize((cols, rows), self.resampling)


def cover_and_crop(
    size: tuple[int, int],
    crop_ratio: float = 1.0,
    interpolation: str = "bicubic",
    crop_mode: str = "center",
) -> list[Callable]:
    """The steps to the middle (H, W) of an image resized to cover (H, W) / crop_ratio.

    With timm's crop mode "squash" it is resized to exactly that, whatever its aspect ratio.
    """
    rows, cols = size
    covered = int(rows / crop_ratio), int(cols / crop_ratio)
    if crop_mode == "squash":
        resize = transforms.Resize(covered, transforms.InterpolationMode(interpolation))
    else:
        resize = ResizeToCover(covered, interpolation)
    return [resize, transforms.CenterCrop(size)]


def evaluation_crop(size: tuple[int, int], config: Mapping[str, object]) -> dict[str, object]:
    """`cover_and_crop`'s settings for evaluation; small inputs see the whole image."""
    ratio = 1.0 if max(size) <= SMALL_INPUT else config["crop_pct"]
    return {"crop_ratio": ratio} | {name: config[name] for name in ("interpolation", "crop_mode")}


def allow_posterize_to_black(transform: transforms.Compose) -> None:
    """Lets the posterize steps of timm's transform keep 0 bits, which Pillow 13 refuses; in place.

    RandAugment reaches 0 bits at its largest magnitude, so that `rand-m9-mstd0.5` would end a run.
    """
    for step in transform.transforms:
        policies = getattr(step, "policy", [getattr(step, "ops", [])])
        for operation in chain.from_iterable(policies):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)


def to_bytes(image: Image.Image) -> torch.Tensor:
    """The pixels of an RGB image, (3, H, W) uint8, as a view of Pillow's (H, 3, W).

    Such lines are collated to (B, 3, H, W) faster than pixel by pixel.
    """
    lines = torch.frombuffer(bytearray(image.tobytes("raw", "RGB;L")), dtype=torch.uint8)
    return lines.view(image.height, 3, image.width).transpose(0, 1)


def image_size(input_size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) of a size given as one number or as two."""
    sizes = to_2tuple(input_size)
    if len(sizes) != 2 or min(sizes) < 1:
        raise InputError(f"input_size is {input_size}, allowed: one or two numbers from 1 up")
    return tuple(sizes)


def list_images(path: Path) -> list[Path]:
    """The images that a path stands for, at least one; `InputError` if there is none.

    Args:
        path: a folder, searched recursively, in sorted order; an image; or a text file with one
            path a line, relative to the current folder (empty lines and lines with # do not count).
    """
    # os.path's functions, for pathlib's raise where a folder is locked or a name is too long.
    if os.path.isdir(path):
        found = [file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS]
        files = sorted(file for file in found if not os.path.isdir(file))
    elif path.suffix.lower() in IMG_EXTENSIONS and os.path.exists(path):
        files = [path]
    elif os.path.isfile(path):
        try:
            lines = map(str.strip, path.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as problem:
            reason = getattr(problem, "strerror", "neither an image nor a text file with paths")
            raise InputError(f"data path {path}: {reason}") from problem
        named = (line for line in lines if line and not line.startswith("#"))
        files = [Path(os.path.expanduser(line)) for line in named]
    else:
        raise InputError(f"data path {path} does not exist or is neither folder nor file")
    if not files:
        raise InputError(f"no image in {path} (extensions: {' '.join(IMG_EXTENSIONS)})")
    return files
