"""The figures of `analyze.py`, drawn for half a page's width.

Colours are Okabe and Ito's, which colour-blind readers tell apart; every method has a marker of its
own besides. Figures are made without pyplot: no display, no global state but the style.
"""

from collections.abc import Sequence
from functools import wraps
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

WIDTH = 3.5  # inches: half a page, a column
STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # text stays text
    "savefig.dpi": 300,
}
# Name, colour and marker; another method takes the last line.
METHODS = {
    "bat": ("BAT", "#D55E00", "o"),
    "evit": ("EViT", "#0072B2", "s"),
    "topk": ("top-k", "#56B4E9", "v"),
    "tome": ("ToMe", "#009E73", "D"),
    "dpcknn": ("DPC-KNN", "#CC79A7", "^"),
    "random": ("random", "#E69F00", "X"),
    "none": ("dense", "#000000", "*"),
}
OTHER = ("#666666", "P")
LINE_STYLES = ("-", "--", ":", "-.")
MEASURE_LABELS = {
    "relative_distance": "relative distance to\nequal tokens",
    "mean_cosine": "mean cosine of\ntoken pairs",
    "effective_rank": "effective rank",
    "attention_share": "attention on attentive\ntokens* (%)",
}


def styled(draw):
    """Runs a function that draws under the shared style."""

    @wraps(draw)
    def drawn(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def method_style(reduction: str) -> dict:
    """Label, colour and marker of a method, as keywords of `Axes.plot`."""
    label, colour, marker = METHODS.get(reduction, (reduction, *OTHER))
    return {"label": label, "color": colour, "marker": marker}


@styled
def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Writes a figure as PNG (300 dots per inch) and as PDF.

    Args:
        figure: to write.
        stem: path without a suffix.

    Returns:
        The two files.
    """
    paths = [stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.pdf")]
    figure.savefig(paths[0])
    figure.savefig(paths[1], metadata={"CreationDate": None})  # the same file every time
    return paths


def new_figure(height: float) -> Figure:
    """An empty figure, half a page wide.

    Args:
        height: in inches.
    """
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    return figure


@styled
def plot_sweep(rows: Sequence[dict]) -> Figure:
    """Accuracy against GMACs: a line a method and checkpoint, keep rates beside the points.

    Every line starts at the checkpoint's dense model, if that was evaluated. Lines carry
    "checkpoint:method" as their gid.

    Args:
        rows: as `sweep.summarize` returns them.
    """
    figure = new_figure(3.1)
    axes = figure.add_subplot()
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    methods = list(dict.fromkeys(row["reduction"] for row in rows))
    line_styles = dict(zip(checkpoints, cycle(LINE_STYLES), strict=False))
    for checkpoint, line_style in line_styles.items():
        own = [row for row in rows if row["checkpoint"] == checkpoint]
        dense = [row for row in own if row["reduction"] == "none"]
        for method in sorted(methods, key=lambda name: name == "bat"):  # BAT on top
            points = [row for row in own if row["reduction"] == method]
            if method != "none" and points:
                points = sorted(points + dense, key=lambda row: row["gmacs"])
            axes.plot(
                [row["gmacs"] for row in points],
                [row["acc1"] for row in points],
                gid=f"{checkpoint}:{method}",
                linestyle="" if method == "none" else line_style,
                zorder=4 if method == "none" else 3 if method == "bat" else 2,
                **method_style(method) | ({"markersize": 7} if method == "none" else {}),
            )
    axes.set_xlabel("multiply-accumulates per image (GMACs)")
    axes.set_ylabel("Acc@1 (%)")
    axes.margins(x=0.08, y=0.1)
    handles = [_method_handle(name) for name in methods]
    if len(checkpoints) > 1:
        handles += [
            Line2D([], [], color="#444444", linestyle=line_style, label=checkpoint)
            for checkpoint, line_style in line_styles.items()
        ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=4,
        title="numbers at the points: keep rate",
        columnspacing=1.2,
        handlelength=2.2,
    )
    _label_keep_rates(axes, rows)
    return figure


def _method_handle(reduction: str) -> Line2D:
    """Legend entry of a method in the sweep's figure, where the dense model is a point."""
    point = {"linestyle": "", "markersize": 7} if reduction == "none" else {}
    return Line2D([], [], **method_style(reduction) | point)


def _label_keep_rates(axes: Axes, rows: Sequence[dict]) -> list[Text]:
    """Writes a checkpoint's keep rates above the best of their points; never one over another."""
    best: dict[tuple[str, float], dict] = {}
    for row in rows:
        if row["reduction"] != "none":
            point = row["checkpoint"], row["keep_rate"]
            best[point] = max(best.get(point, row), row, key=lambda entry: entry["acc1"])
    labels: list[Text] = []
    renderer = axes.figure.canvas.get_renderer()
    axes.figure.draw_without_rendering()
    for row in sorted(best.values(), key=lambda entry: entry["gmacs"]):
        label = axes.annotate(
            f"{row['keep_rate']:g}",
            (row["gmacs"], row["acc1"]),
            xytext=(-1, 4),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=7,
            color="#333333",
        )
        others = [other.get_window_extent(renderer) for other in labels]
        while any(label.get_window_extent(renderer).overlaps(other) for other in others):
            x, y = label.get_position()
            label.set_position((x, y + 2))
        labels.append(label)
    return labels


@styled
def plot_diversity(rows: Sequence[dict]) -> Figure:
    """A panel a measure: its mean over the images against the block, a line a method.

    Lines carry the method as their gid, panels the measure as their label. The deviations between
    images, which all methods share, would hide the lines; they are in the table.

    Args:
        rows: as `diversity.measure_methods` returns them.
    """
    figure = new_figure(4.0)
    panels = figure.subplots(2, 2, sharex=True)
    methods = list(dict.fromkeys(row["reduction"] for row in rows))
    reducing = sorted({row["block"] for row in rows if row["attention_share"] is not None})
    for axes, (measure, title) in zip(panels.flat, MEASURE_LABELS.items(), strict=True):
        axes.set_label(measure)
        axes.set_title(title)
        scale = 100 if measure == "attention_share" else 1
        for method in sorted(methods, key=lambda name: name == "bat"):
            own = [row for row in rows if row["reduction"] == method and row[measure] is not None]
            if measure == "attention_share" and method == "none":
                continue  # every token is kept: 100 % by definition
            blocks = [row["block"] for row in own]
            mean = scale * np.array([row[measure] for row in own])
            style = method_style(method) | {"markersize": 3}
            axes.plot(blocks, mean, gid=method, zorder=3 if method == "bat" else 2, **style)
        for block in reducing:
            axes.axvline(block, color="#999999", linestyle=(0, (1, 2)), linewidth=0.8, zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[1]:
        axes.set_xlabel("block index (from 0)")
    figure.legend(
        handles=[Line2D([], [], **method_style(name)) for name in methods],
        loc="outside lower center",
        ncols=4,
        title="dotted: reducing blocks.  * BAT: its attentive tokens;\n"
        "other methods: as many most attended ones as they keep",
        columnspacing=1.2,
    )
    return figure


@styled
def plot_patches(
    importance: np.ndarray, lost_at: np.ndarray, blocks: Sequence[int], num_images: int
) -> Figure:
    """Heat maps over the patch grid: importance at each stage, and when patches lost their token.

    Args:
        importance: (S, rows, columns) class-token attention; NaN: no token there any more.
        lost_at: (rows, columns) stage at which the patch lost its own token; S + 1: never.
        blocks: index of the block of each stage.
        num_images: images that were averaged over.
    """
    num_stages = len(blocks)
    num_rows = (num_stages + 2) // 2
    aspect = lost_at.shape[0] / lost_at.shape[1]
    figure = new_figure(0.3 + num_rows * (0.42 + 0.9 * min(aspect, 2.5)))
    panels = figure.subplots(num_rows, 2, squeeze=False).flat
    for axes, stage in zip(panels, range(num_stages), strict=False):
        title = f"stage {stage + 1} (block {blocks[stage]})"
        heat_map(axes, 100 * importance[stage], title, "importance (%)")
    axes = panels[num_stages]
    heat_map(axes, lost_at, "own token lost", f"stage ({num_stages + 1}: never)", "cividis")
    for axes in panels[num_stages + 1 :]:
        axes.remove()
    images = "1 image" if num_images == 1 else f"mean of {num_images} images"
    figure.supxlabel(f"patch column ({images})", fontsize=8)
    figure.supylabel("patch row", fontsize=8)
    return figure


def heat_map(
    axes: Axes, values: np.ndarray, title: str, unit: str, colours: str = "viridis"
) -> None:
    """One panel with its colour bar."""
    axes.set_facecolor("#dddddd")  # shows where there is no value
    image = axes.imshow(values, cmap=colours)
    axes.grid(False)
    axes.set_title(title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.04)
    bar.locator = MaxNLocator(4)
    bar.set_label(unit, fontsize=7)
    bar.outline.set_linewidth(0.6)
