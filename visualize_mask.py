"""Draws what each reduction stage of a model did to an image: kept, merged or dropped.

One PNG an image: the image as the model sees it, then one panel a stage. A token that stands for
one patch shows the patch's pixels; a merged token shows its mean colour, with a border that says
how it was made; dropped patches are hatched. Blocks are counted from 0. `contact_sheet.png` shows
all images together.

    python visualize_mask.py --checkpoint output/demo/best.pth --data-path FOLDER --output-dir pics
"""

import math
import os
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torchvision.utils import make_grid

from arguments import (
    ArgumentParser,
    add_data_arguments,
    add_model_arguments,
    data_config,
    folder,
    model_arguments,
    pretrained_config,
    random_seed,
)
from checkpoints import load_checkpoint, model_from_checkpoint
from datasets import build_dataset, build_transform
from inputs.batches import Normalize
from inputs.images import BadImageError, list_images, load_image
from models import ReducingTransformer, describe_rates, describe_reduction
from models.trace import PatchKind, trace_patches
from utils import (
    InputError,
    check_writable,
    find_device,
    logger,
    run_script,
    seed_everything,
    write_atomically,
)

DEFAULT_NUM_IMAGES = 16
DEFAULT_NUM_CLASSES = 1000

BORDER_COLOURS = {  # the colour-blind can tell them apart too
    PatchKind.PAIR: (255, 0, 200),
    PatchKind.CLUSTER: (255, 170, 0),
    PatchKind.MIXED: (0, 255, 200),
}
KIND_LABELS = {
    PatchKind.SINGLE: "single patch: its pixels",
    PatchKind.PAIR: "matched: mean colour",
    PatchKind.CLUSTER: "clustered: mean colour",
    PatchKind.MIXED: "mixed (both): mean colour",
    PatchKind.DROPPED: "dropped: hatched",
    PatchKind.WAITING: "waiting: pale",
}
FRAME_GREY = 150
PANELS_PER_ROW = 4
PANEL = (300, 8)  # least width in pixels of a panel, and least side of a patch in it
THUMBNAIL = (112, 6)  # the same on the contact sheet
DPI = 128  # a power of two: sizes in inches stay exact
GAP, LINE = 12, 16  # pixels between panels, and of a line of text
FONT = {"family": "monospace", "size": 7}  # all characters equally wide: text wraps by count
CHARACTER = 7.6  # pixels of one, rounded up
LEGEND_ENTRY = 235  # pixels of the longest


class Source(NamedTuple):
    """One image to draw."""

    name: str  # shown in the picture
    true_class: str  # "" when not known
    read: Callable[[], Image.Image]  # gives the RGB image; raises BadImageError


class LoadedModel(NamedTuple):
    model: ReducingTransformer
    description: str
    classes: Sequence[str]  # names of the outputs; empty: random weights, which predict nothing
    data_config: Mapping[str, object]  # of its inputs, as `arguments.data_config` gives it


class Panel(NamedTuple):
    title: str
    group: np.ndarray  # (N_0,) int64: the token that each patch sits in; -1: dropped
    kind: np.ndarray  # (N_0,) int64: PatchKind of that token


class Picture(NamedTuple):
    """One image and what the stages made of it."""

    source: Source
    prediction: str  # the predicted class in words, or ""
    image: np.ndarray  # (H, W, 3) uint8, the pixels that the patches cover
    grid_size: tuple[int, int]
    stages: Sequence[Panel]


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="visualize_mask.py",
        description=__doc__.rpartition("\n\n")[0],
        conflict_handler="resolve",  # --data-path means more here
    )
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.set_defaults(data_set=None, bad_images="skip")
    # fmt: off
    add = parser.add_argument_group("pictures").add_argument
    add("--data-path", required=True,
        help="folder of images (searched recursively), one image, or a text file with one path a "
        "line, relative to the current folder; with --data-set the folder of that data set, whose "
        "validation images are drawn")
    add("--checkpoint", default="", help="checkpoint of main.py; without it: random weights")
    add("--output-dir", type=folder, default="output/pictures", help="where to write")
    add("--num-images", type=int, metavar="N",
        help=f"draw the first N images; default: {DEFAULT_NUM_IMAGES}, or a whole list")
    add("--shuffle", action="store_true", help="draw a random choice of the images")
    add("--seed", type=random_seed, default=0,
        help="random seed of the choice and of random weights")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    # fmt: on
    return parser


def draw_stage(
    image: np.ndarray, group: np.ndarray, kind: np.ndarray, grid_size: tuple[int, int], scale: int
) -> np.ndarray:
    """Draws one panel, (H * scale, W * scale, 3) uint8.

    A token of one patch shows its pixels, a merged token the rounded mean of all pixels of all of
    its patches. One of its pixels is border when something of another kind, or the outside, is
    among the eight pixels around it, or another token among the three above and to the left: one
    line between two tokens of one kind. Dropped patches are white, with grey diagonal lines;
    waiting ones show their pixels, pale.

    Args:
        image: (H, W, 3) uint8; H and W are multiples of the grid's rows and columns.
        group: (rows * columns,) the token that each patch sits in, or -1: dropped.
        kind: (rows * columns,) `PatchKind` code of that token.
        grid_size: rows and columns of the patch grid.
        scale: side of the square that each pixel becomes, at least 1.
    """
    rows, columns = grid_size
    cell = (image.shape[0] // rows, image.shape[1] // columns)
    labels = _enlarge(group.reshape(grid_size), *cell)  # (H, W)
    kinds = _enlarge(kind.reshape(grid_size), *cell)  # (H, W)
    tokens = np.unique(group)
    means = [ndimage.mean(image[..., i], labels, tokens) for i in range(3)]
    means = np.rint(np.stack(means, axis=-1)).astype(np.uint8)  # (K, 3)

    is_merged = np.isin(kinds, list(BORDER_COLOURS))[..., None]
    panel = np.where(is_merged, means[np.searchsorted(tokens, labels)], image)
    panel, labels, kinds = (_enlarge(array, scale, scale) for array in (panel, labels, kinds))
    period = max(4, min(cell) * scale // 4)
    is_line = np.add.outer(*map(np.arange, kinds.shape)) % period < period // 4
    dropped = kinds == PatchKind.DROPPED
    panel[dropped] = np.where(is_line, FRAME_GREY, 255)[dropped][:, None]
    waiting = kinds == PatchKind.WAITING
    panel[waiting] = 255 - (255 - panel[waiting]) // 4
    border = _varies(kinds, 3) | _varies(labels, 2)
    for merged, colour in BORDER_COLOURS.items():
        panel[border & (kinds == merged)] = colour
    return panel


def _varies(values: np.ndarray, size: int) -> np.ndarray:
    """Whether the window at each entry of (H, W) values holds others; of size 2, it ends there."""
    outside = {"mode": "constant", "cval": -2}
    highest = ndimage.maximum_filter(values, size, **outside)
    return highest != ndimage.minimum_filter(values, size, **outside)


def choose_scale(image: np.ndarray, grid_size: tuple[int, int], least: tuple[int, int]) -> int:
    """Smallest enlargement that makes an (H, W, 3) image and its patches at least so large."""
    height, width = image.shape[:2]
    smallest_side = min(height // grid_size[0], width // grid_size[1])
    return max(math.ceil(least[0] / width), math.ceil(least[1] / smallest_side))


def draw_panels(picture: Picture, image: np.ndarray, scale: int) -> np.ndarray:
    """The (H, W, 3) image and a panel a stage, (1 + stages, H * scale, W * scale, 3)."""
    panels = [draw_stage(image, s.group, s.kind, picture.grid_size, scale) for s in picture.stages]
    return np.stack([_enlarge(image, scale, scale), *panels])


def _enlarge(array: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Repeats each entry of an (H, W, ...) array, giving (H * rows, W * columns, ...)."""
    return array.repeat(rows, axis=0).repeat(columns, axis=1)


def draw_picture(picture: Picture, description: str) -> Figure:
    """Draws the original and one panel a stage, with titles."""
    scale = choose_scale(picture.image, picture.grid_size, PANEL)
    panels = draw_panels(picture, picture.image, scale)
    name, true_class = picture.source[:2]
    original = f"original: {true_class}" if true_class else "original"
    titles = [f"{original}\n{picture.prediction}"]
    titles += [f"{stage.title}\n{describe_tokens(stage)}" for stage in picture.stages]
    columns = min(len(panels), PANELS_PER_ROW)
    return draw_page(panels, titles, f"{name}  |  {description}", columns, _kinds([picture]))


def _kinds(pictures: Sequence[Picture]) -> set[PatchKind]:
    """What there is to explain."""
    return {PatchKind(kind) for p in pictures for s in p.stages for kind in np.unique(s.kind)}


def draw_strip(picture: Picture) -> np.ndarray:
    """Draws the panels of one picture small, in one row, as (h, w, 3) uint8."""
    image, grid = picture.image, picture.grid_size
    cell = (image.shape[0] // grid[0], image.shape[1] // grid[1])
    largest = max(1, min(image.shape[1] // THUMBNAIL[0], min(cell) // THUMBNAIL[1]))
    shrinking = max(by for by in range(1, largest + 1) if cell[0] % by == cell[1] % by == 0)
    scale = choose_scale(image, grid, THUMBNAIL)
    image = np.asarray(Image.fromarray(image).reduce(shrinking))
    panels = torch.from_numpy(draw_panels(picture, image, scale)).permute(0, 3, 1, 2)
    strip = make_grid(panels, nrow=len(panels), padding=3, pad_value=FRAME_GREY)  # (3, h, w)
    return strip.permute(1, 2, 0).numpy()


def draw_page(
    panels: Sequence[np.ndarray],
    titles: Sequence[str],
    header: str,
    columns: int,
    kinds: Collection[PatchKind],
) -> Figure:
    """Lays out (h, w, 3) uint8 panels of one size, pixel for pixel, between header and legend.

    A line of a title that is too long is wrapped once, then cut; the header wraps as it needs. The
    legend explains the kinds.
    """
    height, width = panels[0].shape[:2]
    wrapped = [_wrap(title, width, max_lines=2) for title in titles]
    title_height = LINE * max(map(len, wrapped)) + 4
    step_x, step_y = width + GAP, title_height + height + GAP
    page_width = GAP + columns * step_x
    header_lines = _wrap(header, page_width - 2 * GAP)
    top = GAP + len(header_lines) * LINE + GAP
    legend_columns = max(1, page_width // LEGEND_ENTRY)
    legend_height = math.ceil(len(kinds) / legend_columns) * 20
    page_height = top + math.ceil(len(panels) / columns) * step_y + legend_height + GAP

    figure = Figure((page_width / DPI, page_height / DPI), DPI, facecolor="white")

    def write(lines: Sequence[str], x: int, y: int, va: str) -> None:
        text, place = "\n".join(lines), (x / page_width, 1 - y / page_height)
        figure.text(*place, text, va=va, parse_math=False, linespacing=1.1, **FONT)

    write(header_lines, GAP, GAP, "top")
    for index, (panel, lines) in enumerate(zip(panels, wrapped, strict=True)):
        x, y = GAP + index % columns * step_x, top + index // columns * step_y + title_height
        write(lines, x, y - 4, "bottom")
        framed = np.pad(panel, ((1, 1), (1, 1), (0, 0)), constant_values=FRAME_GREY)
        figure.figimage(framed, x - 1, page_height - y - height - 1, origin="upper")
    _add_legend(figure, kinds, legend_columns, (GAP / page_width, GAP / 2 / page_height))
    return figure


def _wrap(text: str, width: int, max_lines: int | None = None) -> list[str]:
    """Breaks each line of a text into lines of at most `width` pixels."""
    shape = {"width": int(width / CHARACTER), "max_lines": max_lines, "placeholder": "..."}
    return [part for line in text.split("\n") for part in wrap(line, **shape)]


def _add_legend(
    figure: Figure, kinds: Collection[PatchKind], columns: int, place: tuple[float, float]
) -> None:
    """`place` is the legend's lower left corner, as shares of the figure."""
    looks = {kind: {"ec": np.divide(c, 255), "lw": 2} for kind, c in BORDER_COLOURS.items()}
    looks |= {PatchKind.WAITING: {"fc": "0.93", "lw": 0}}
    looks |= {PatchKind.DROPPED: {"fc": "white", "ec": "0.6", "lw": 0, "hatch": "//////"}}
    handles = [
        Patch(**{"fc": "0.75", "label": label} | looks.get(kind, {}))
        for kind, label in KIND_LABELS.items()
        if kind in kinds
    ]
    spacing = {"borderaxespad": 0, "borderpad": 0, "handlelength": 1.6, "handleheight": 1.2}
    where = {"loc": "lower left", "bbox_to_anchor": place, "frameon": False}
    figure.legend(handles=handles, ncols=columns, prop=FONT, **where, **spacing)


def draw_contact_sheet(pictures: Sequence[Picture], description: str) -> Figure:
    """Draws all pictures small, on one page that is rather wider than high."""
    strips = [draw_strip(picture) for picture in pictures]
    titles = [f"{picture.source.name}\n{picture.prediction}" for picture in pictures]
    height, width = strips[0].shape[:2]
    columns = max(1, round(math.sqrt(1.5 * len(strips) * (height + 3 * LINE) / width)))
    return draw_page(strips, titles, description, min(columns, len(strips)), _kinds(pictures))


def describe_tokens(stage: Panel) -> str:
    """Counts a stage's tokens by kind, and the patches that were dropped by then."""
    counts = [np.unique(stage.group[stage.kind == kind]).size for kind in PatchKind]
    text = f"{counts[PatchKind.SINGLE]} single"
    words = {PatchKind.PAIR: "matched", PatchKind.CLUSTER: "clustered", PatchKind.MIXED: "mixed"}
    for kind, word in words.items():
        text += f", {counts[kind]} {word}" if counts[kind] else ""
    for kind in (PatchKind.DROPPED, PatchKind.WAITING):
        number = np.sum(stage.kind == kind)
        text += f"; {kind.name.lower()} patches: {number}" if number else ""
    return text


@torch.no_grad()
def make_picture(loaded: LoadedModel, source: Source, image: Tensor) -> Picture:
    """Runs one (3, H, W) uint8 image through the model and notes what became of each patch."""
    model = loaded.model
    device = next(model.parameters()).device
    normalized = Normalize(loaded.data_config, device)(image[None].to(device))
    logits, assignments = model.forward_with_assignments(normalized)
    panels, stages = [], model.stages()
    for stage, trace in zip(stages, trace_patches(assignments, stages), strict=True):
        place = f"stage {len(panels) + 1} (block {stage.block})"
        title = f"{place}: {stage.num_tokens} -> {stage.num_outputs} tokens"
        panels.append(Panel(title, trace.group[0].cpu().numpy(), trace.kind[0].cpu().numpy()))
    prediction = ""
    if loaded.classes:
        probability, index = logits[0].softmax(0).max(0)
        prediction = f"predicted ({probability:.0%}): {loaded.classes[index]}"
    grid_size, patch_size = model.patch_embed.grid_size, model.patch_embed.patch_size
    height, width = np.multiply(grid_size, patch_size)
    pixels = image[:, :height, :width].permute(1, 2, 0).contiguous().numpy()
    return Picture(source, prediction, pixels, grid_size, panels)


def prepare(args: Namespace) -> tuple[LoadedModel, list[Source]]:
    """Checks the flags; builds the model, on its device, and the list of images to draw."""
    if args.num_images is not None and args.num_images < 1:
        raise InputError(f"--num-images must be at least 1, got {args.num_images}")
    device = find_device(args.device)
    path = Path(os.path.expanduser(args.data_path))
    checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else {}
    model_args = model_arguments(args, checkpoint.get("model_args"))
    classes = checkpoint.get("classes") or []
    known = pretrained_config(model_args["model_name"]) | checkpoint.get("data_config", {})
    config = data_config(args, model_args["img_size"], known)
    if args.data_set:
        dataset, num_classes = build_dataset(False, args, config)
        classes = classes or dataset.classes
        true_classes = [dataset.classes[target] for target in dataset.targets]
        names = [f"{name}_{index:05d}" for index, name in enumerate(true_classes)]
        readers = [lambda i=i: dataset.source[i][0] for i in range(len(names))]
    else:
        files, num_classes = list_images(path), DEFAULT_NUM_CLASSES
        folders = [file.parent.name for file in files]
        true_classes = [folder if folder in classes else "" for folder in folders]
        names = [file.name for file in files]
        readers = [partial(load_image, str(file), args.max_image_pixels) for file in files]
    if not checkpoint:
        model_args.setdefault("num_classes", num_classes)

    seed_everything(args.seed)
    model = model_from_checkpoint(checkpoint, ema=args.ema, source=args.checkpoint, **model_args)
    logger.info(describe_reduction(model))
    origin = "/".join(Path(args.checkpoint).parts[-2:]) if checkpoint else "random weights"
    origin += " (exponential moving average)" if args.ema else ""
    name = model_args["model_name"]
    description = f"{name}, {model.reduction}, {describe_rates(model)}, {origin}"
    if len(classes) != model.num_classes:
        classes = [f"class {index}" for index in range(model.num_classes)]
    loaded = LoadedModel(model.to(device), description, classes if checkpoint else [], config)

    sources = [Source(*fields) for fields in zip(names, true_classes, readers, strict=True)]
    if args.shuffle:
        random.Random(args.seed).shuffle(sources)
    is_list = path.is_file() and not args.data_set
    count = args.num_images or (None if is_list else DEFAULT_NUM_IMAGES)
    logger.info(f"drawing {len(sources[:count])} of {len(sources)} images: {description}")
    return loaded, sources[:count]


def run(args: Namespace) -> int:
    """Draws every image and the contact sheet; gives 1 if an image was unreadable, else 0."""
    loaded, sources = prepare(args)
    transform = build_transform(False, args, loaded.data_config)
    output_dir = check_writable(args.output_dir)

    def save(figure: Figure, name: str) -> None:
        write_atomically(output_dir / name, partial(figure.savefig, format="png"))
        logger.info(output_dir / name)

    pictures = []
    for number, source in enumerate(sources, 1):
        try:
            image = transform(source.read())
        except BadImageError as problem:
            if args.bad_images == "error":
                raise
            print(problem, file=sys.stderr)
            continue
        pictures.append(make_picture(loaded, source, image))
        figure = draw_picture(pictures[-1], loaded.description)
        save(figure, f"{number:03d}_{Path(source.name).stem}.png")
    if pictures:
        blocks = ", ".join(str(stage.block) for stage in loaded.model.stages())
        place = "before" if loaded.model.settings.method.waits else "after"
        panels = f"  |  panels: original, {place} blocks {blocks} (from 0)" if blocks else ""
        save(draw_contact_sheet(pictures, loaded.description + panels), "contact_sheet.png")
    num_bad = len(sources) - len(pictures)
    if num_bad:
        print(f"{num_bad} of {len(sources)} images could not be read", file=sys.stderr)
    return int(num_bad > 0)


def main(argv: list[str] | None = None) -> int:
    return run_script(get_args_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
