"""Pictures of what each stage did to an image: panels, titles and the contact sheet.

Pure drawing with numpy and Pillow; `visualize_mask.py` is the script.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from models.trace import PatchKind

BORDER_COLOURS = {PatchKind.CLUSTER: (255, 170, 0), PatchKind.PAIR: (255, 0, 200)}
DROPPED_COLOUR = (255, 255, 255)
LEGEND = (
    ("own pixels: token of one patch", None),
    ("mean colour: cluster", BORDER_COLOURS[PatchKind.CLUSTER]),
    ("mean colour: matched pair", BORDER_COLOURS[PatchKind.PAIR]),
    ("blank: dropped", DROPPED_COLOUR),
)
PAPER, INK, GREY, SWATCH = (255, 255, 255), (0, 0, 0), (110, 110, 110), (190, 190, 190)
FRAME = (150, 150, 150)
PANELS_PER_ROW = 4
THUMBNAIL_WIDTH = 140  # pixels of one panel on the contact sheet, about


class StagePanel(NamedTuple):
    """What one panel shows, in numbers."""

    title: str
    group: np.ndarray  # (N_0,) int64: the token each patch sits in; -1: dropped
    kind: np.ndarray  # (N_0,) int64: PatchKind of that token


class Picture(NamedTuple):
    """One image and what the stages made of it."""

    header: str  # file and model
    true_class: str  # "" when not known
    prediction: str  # the predicted class in words, or ""
    image: np.ndarray  # (H, W, 3) uint8, the pixels that the patches cover
    grid_size: tuple[int, int]
    stages: tuple[StagePanel, ...]


def border_width(cell_height: int, cell_width: int) -> int:
    """Width in pixels of the border inside a merged region, for patches drawn in this size."""
    return max(1, min(cell_height, cell_width) // 12)


def draw_stage(
    image: np.ndarray,
    group: np.ndarray,
    kind: np.ndarray,
    grid_size: tuple[int, int],
    scale: int,
) -> np.ndarray:
    """Draws one panel, every image pixel as a square of scale x scale pixels.

    The patch in row r and column c of the grid covers the panel's rows r * h .. (r + 1) * h - 1
    and columns c * w .. (c + 1) * w - 1, with h = scale * H / rows and w = scale * W / columns. A
    token of one patch shows its pixels, a merged token the rounded mean of all pixels of all of
    its patches. A pixel of a merged token is border when a pixel of another token, of a dropped
    patch or of the outside lies within `border_width(h, w)` of it in both directions, so a border
    lies inside its own region. Dropped patches are white.

    Args:
        image: (H, W, 3) uint8; H and W are multiples of the grid's rows and columns.
        group: (rows * columns,) the token that each patch sits in, or -1: dropped.
        kind: (rows * columns,) `PatchKind` code of that token.
        grid_size: rows and columns of the patch grid.
        scale: enlargement, at least 1.

    Returns:
        (H * scale, W * scale, 3) uint8.

    Raises:
        ValueError: when the grid does not divide the image, or not every patch has an entry.
    """
    rows, columns = grid_size
    height, width = image.shape[:2]
    if height % rows or width % columns:
        raise ValueError(f"grid_size {grid_size} must divide the image size {(height, width)}")
    if group.shape != (rows * columns,) or kind.shape != group.shape:
        raise ValueError(
            f"group {group.shape} and kind {kind.shape} must be ({rows * columns},): one a patch"
        )
    cell = (height // rows, width // columns)
    labels = _enlarge(group.reshape(rows, columns), *cell)  # (H, W)
    kinds = _enlarge(kind.reshape(rows, columns), *cell)  # (H, W)

    panel = np.where((kinds > PatchKind.SINGLE)[..., None], _mean_colours(image, labels), image)
    panel[kinds == PatchKind.DROPPED] = DROPPED_COLOUR
    panel, labels, kinds = (_enlarge(array, scale, scale) for array in (panel, labels, kinds))
    border = _find_borders(labels, border_width(cell[0] * scale, cell[1] * scale))
    for merged_kind, colour in BORDER_COLOURS.items():
        panel[border & (kinds == merged_kind)] = colour
    return panel


def choose_scale(height: int, width: int, grid_size: tuple[int, int]) -> int:
    """Smallest enlargement that makes a panel 280 pixels wide and each patch 8 pixels or more."""
    smallest_side = min(height // grid_size[0], width // grid_size[1])
    return max(1, -(-280 // width), -(-8 // smallest_side))


def _enlarge(array: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Repeats each entry of an (H, W, ...) array, giving (H * rows, W * columns, ...)."""
    return array.repeat(rows, axis=0).repeat(columns, axis=1)


def _mean_colours(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Replaces each pixel by the mean over all pixels of its (H, W) label, rounded, as uint8."""
    index = labels.ravel() + 1  # -1, dropped, counts as a label of its own here
    counts = np.maximum(np.bincount(index), 1)
    means = [np.bincount(index, image[..., i].ravel()) / counts for i in range(3)]
    return np.rint(np.stack(means, axis=-1)).astype(np.uint8)[index].reshape(image.shape)


def _find_borders(labels: np.ndarray, width: int) -> np.ndarray:
    """Marks the pixels with another label, or the outside, within `width` in both directions.

    Looking at the eight corners and sides of that square is enough: no label is narrower than it.
    """
    height, length = labels.shape
    padded = np.pad(labels, width, constant_values=-2)
    border = np.zeros(labels.shape, dtype=bool)
    for i in (0, width, 2 * width):
        for j in (0, width, 2 * width):
            border |= padded[i : i + height, j : j + length] != labels
    return border


def draw_picture(picture: Picture) -> Image.Image:
    """Draws the original, one panel a stage, titles, header and legend at full size."""
    height, width = picture.image.shape[:2]
    scale = choose_scale(height, width, picture.grid_size)
    panels = [_enlarge(picture.image, scale, scale)]
    panels += [
        draw_stage(picture.image, s.group, s.kind, picture.grid_size, scale) for s in picture.stages
    ]
    original = f"original: {picture.true_class}" if picture.true_class else "original"
    titles = [f"{original}\n{picture.prediction}"]
    titles += [f"{stage.title}\n{describe_tokens(stage)}" for stage in picture.stages]

    font_size = min(max(width * scale // 22, 12), 20)
    line, gap = font_size + 6, font_size // 2
    columns = min(len(panels), PANELS_PER_ROW)
    rows = -(-len(panels) // columns)
    step = (2 * line + height * scale + gap, width * scale + gap)
    board = Image.new("RGB", (columns * step[1] + gap, rows * step[0]), PAPER)
    draw = ImageDraw.Draw(board)
    for i, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        left, top = gap + i % columns * step[1], i // columns * step[0]
        first, second = title.split("\n")
        _draw_text(draw, (left, top), first, font_size, width * scale)
        _draw_text(draw, (left, top + line), second, font_size - 2, width * scale, GREY)
        _paste_framed(board, panel, (left, top + 2 * line))
    header = _draw_header(picture.header, board.width, font_size)
    return _stack([header, board, _draw_legend(board.width, font_size)])


def describe_tokens(stage: StagePanel) -> str:
    """Counts a stage's tokens by kind, and the patches that were dropped by then."""
    counts = {kind: np.unique(stage.group[stage.kind == kind]).size for kind in PatchKind}
    text = f"{counts[PatchKind.SINGLE]} of one patch"
    for kind, noun in ((PatchKind.PAIR, "matched"), (PatchKind.CLUSTER, "clustered")):
        text += f", {counts[kind]} {noun}" if counts[kind] else ""
    num_dropped = int((stage.kind == PatchKind.DROPPED).sum())
    return text + (f"; dropped patches: {num_dropped}" if num_dropped else "")


def _draw_text(
    draw: ImageDraw.ImageDraw,
    position: tuple[int, int],
    text: str,
    size: int,
    width: int,
    colour: tuple[int, int, int] = INK,
) -> None:
    """Writes one line, shortened in the middle until it is at most `width` pixels long."""
    font = ImageFont.load_default(size)
    shown, keep = text, len(text)
    while font.getlength(shown) > width and keep > 1:
        keep -= 1
        shown = text[: keep - keep // 2] + "..." + text[len(text) - keep // 2 :]
    draw.text(position, shown, fill=colour, font=font)


def _draw_header(text: str, width: int, font_size: int) -> Image.Image:
    """Writes words on as many lines of `width` pixels as they need."""
    font = ImageFont.load_default(font_size)
    line, gap = font_size + 6, font_size // 2
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and font.getlength(longer) > width - 2 * gap:
            lines.append(word)
        else:
            lines[-1] = longer
    header = Image.new("RGB", (width, gap + len(lines) * line), PAPER)
    for i, words in enumerate(lines):
        position = (gap, gap + i * line)
        _draw_text(ImageDraw.Draw(header), position, words, font_size, width - 2 * gap)
    return header


def _paste_framed(board: Image.Image, panel: np.ndarray, position: tuple[int, int]) -> None:
    """Pastes an (H, W, 3) panel at (left, top), with a thin grey line around its outside."""
    left, top = position
    box = (left - 1, top - 1, left + panel.shape[1], top + panel.shape[0])
    ImageDraw.Draw(board).rectangle(box, outline=FRAME)
    board.paste(Image.fromarray(panel), position)


def _stack(images: Sequence[Image.Image]) -> Image.Image:
    """Puts equally wide images below each other."""
    canvas = Image.new("RGB", (images[0].width, sum(image.height for image in images)), PAPER)
    top = 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height
    return canvas


def _draw_legend(width: int, font_size: int) -> Image.Image:
    """Draws what the borders mean, wrapped into as many lines as `width` asks for."""
    font = ImageFont.load_default(font_size)
    line, gap = font_size + 6, font_size // 2
    places, left, top = [], gap, gap
    for text, colour in LEGEND:
        length = int(font.getlength(text)) + font_size + 2 * gap
        if left > gap and left + length > width:
            left, top = gap, top + line
        places.append((text, colour, left, top))
        left += length + gap
    legend = Image.new("RGB", (width, top + line + gap), PAPER)
    draw = ImageDraw.Draw(legend)
    for text, colour, left, top in places:
        box = (left, top, left + font_size, top + font_size)
        if colour is None:
            for i in range(font_size):  # a checker of greys stands for "pixels"
                draw.line(
                    (left + i, top, left + i, top + font_size), (90 + 120 * (i // 4 % 2),) * 3
                )
        else:
            fill, outline = (colour, GREY) if colour == DROPPED_COLOUR else (SWATCH, colour)
            draw.rectangle(box, fill, outline, width=1 if fill == DROPPED_COLOUR else 3)
        draw.text((left + font_size + gap, top - 2), text, fill=INK, font=font)
    return legend


def draw_strip(picture: Picture, name: str) -> Image.Image:
    """Draws the panels of one picture small, in one row, for the contact sheet."""
    rows, columns = picture.grid_size
    height, width = picture.image.shape[:2]
    image, scale = picture.image, max(1, THUMBNAIL_WIDTH // width)
    if width > THUMBNAIL_WIDTH:  # smaller, with whole pixels a patch
        cell_width = min(max(4, THUMBNAIL_WIDTH // columns), width // columns)
        cell_height = max(1, round(cell_width * (height / rows) / (width / columns)))
        size = (columns * cell_width, rows * cell_height)
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    panels = [_enlarge(image, scale, scale)]
    panels += [draw_stage(image, s.group, s.kind, picture.grid_size, scale) for s in picture.stages]
    (panel_height, panel_width), line, gap = panels[0].shape[:2], 18, 5
    size = (len(panels) * (panel_width + gap), line + panel_height + 1)
    strip = Image.new("RGB", size, PAPER)
    text = f"{name}   {picture.prediction}"
    _draw_text(ImageDraw.Draw(strip), (1, 0), text, 12, strip.width)
    for i, panel in enumerate(panels):
        _paste_framed(strip, panel, (1 + i * (panel_width + gap), line))
    return strip


def draw_contact_sheet(strips: Sequence[Image.Image], header: str) -> Image.Image:
    """Lays out equally large strips on one sheet that is rather wider than high.

    Args:
        strips: what `draw_strip` made of each picture, at least one.
        header: what is written above them.
    """
    gap, font_size = 10, 15
    step = (strips[0].height + gap, strips[0].width + gap)
    columns = max(1, round((1.5 * len(strips) * step[0] / step[1]) ** 0.5))
    rows = -(-len(strips) // columns)
    board = Image.new("RGB", (gap + columns * step[1], gap + rows * step[0]), PAPER)
    for i, strip in enumerate(strips):
        board.paste(strip, (gap + i % columns * step[1], gap + i // columns * step[0]))
    header_image = _draw_header(header, board.width, font_size)
    return _stack([header_image, board, _draw_legend(board.width, font_size)])
