"""How the tools' figures look: half a page wide, and readable by the colour-blind.

Colours are Okabe and Ito's; every method has a marker of its own besides. Figures are made without
pyplot: no display, and no global state.
"""

from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from utils import write_atomically

LONG_LABEL = 16  # characters
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
# Name, colour and marker; another method takes OTHER.
METHODS = {
    "bat": ("BAT", "#D55E00", "o"),
    "evit": ("EViT", "#0072B2", "s"),
    "topk": ("top-k", "#56B4E9", "v"),
    "tome": ("ToMe, 3 stages", "#009E73", "D"),
    "dpcknn": ("DPC-KNN", "#CC79A7", "^"),
    "random": ("random", "#E69F00", "X"),
    "evo": ("Evo-ViT", "#999933", "p"),
    "ppt": ("PPT", "#661100", "h"),
    "none": ("dense", "#000000", "*"),
}
OTHER = ("#666666", "P")
HOLLOW_MARKERS = "osD^v<>ph*"
# Settings of a method in a legend.
SHORT = {
    "proportional_attention=on": "prop. attention",
    "proportional_attention=off": "no prop. attention",
    "cluster_ratio=": "clusters ",
    "match_ratio=": "matches ",
    "reduction_loc=": "blocks ",
    "keep_rate=": "keep rate ",
    "tome_r=": "r = ",
}

styled = matplotlib.rc_context(STYLE)  # a decorator: the function draws under the style


def method_style(reduction: str) -> dict:
    """Label, colour and marker of a method, as keywords of `Axes.plot`.

    A method with settings of its own (bat,cluster_ratio=0.25) is hollow, with another marker.
    """
    method, comma, settings = reduction.partition(",")
    label, colour, marker = METHODS.get(method, (method, *OTHER))
    style = {"label": label, "color": colour, "marker": marker}
    if comma:
        for name, short in SHORT.items():
            settings = settings.replace(name, short)
        style["label"] = f"{label.partition(',')[0]}: {settings.replace(',', ', ')}"
        number = sum(map(ord, reduction)) % len(HOLLOW_MARKERS)
        style |= {"markerfacecolor": "white", "marker": HOLLOW_MARKERS[number]}
    return style


def new_figure(height: float) -> Figure:
    """An empty figure, half a page wide and `height` inches high."""
    return Figure(figsize=(WIDTH, height))


def below_figure(figure: Figure, handles: Sequence[Line2D], title: str) -> None:
    """Puts a legend below the axes; of long labels one in a row, for which the figure grows."""
    is_long = max(len(handle.get_label()) for handle in handles) > LONG_LABEL
    if is_long:
        figure.set_figheight(figure.get_figheight() + 0.14 * len(handles))
    ncols = 1 if is_long else 4
    place = {"loc": "outside lower center", "columnspacing": 1.2}
    figure.legend(handles=handles, ncols=ncols, title=title, **place)


@styled
def save_figure(figure: Figure, stem: Path) -> None:
    """Writes a figure to stem.png (300 dots per inch) and stem.pdf."""
    for suffix, options in (("png", {}), ("pdf", {"metadata": {"CreationDate": None}})):
        save = partial(figure.savefig, format=suffix, **options)
        write_atomically(stem.with_name(f"{stem.name}.{suffix}"), save)


@styled
def plot_accuracy(rows: Sequence[dict] | pd.DataFrame, *, bars: str) -> Figure:
    """Accuracy against GMACs: a line a method and checkpoint, keep rates beside the points.

    Every line starts at the checkpoint's dense model, if that is there. Lines carry
    "checkpoint:method" as their gid.

    Args:
        rows: each with reduction, keep_rate, gmacs, acc1, the ends acc1_low and acc1_high of its
            error bar (NaN: none), and if there is any, checkpoint.
        bars: what the error bars are, in words.
    """
    table = pd.DataFrame(rows)
    table = table.assign(checkpoint=table.get("checkpoint", ""))
    styles = {name: method_style(name) for name in table.reduction.unique()}
    styles.get("none", {}).update(linestyle="", markersize=7)  # the dense model is one point
    line_styles = dict(zip(table.checkpoint.unique(), cycle(("-", "--", ":", "-.")), strict=False))
    table = table.sort_values("gmacs")
    axes = new_figure(3.1).add_subplot()
    for (checkpoint, method), own in table.groupby(["checkpoint", "reduction"]):
        zorder = {"none": 4, "bat": 3}.get(method, 2)
        style = {"linestyle": line_styles[checkpoint], "zorder": zorder} | styles[method]
        dense = (table.checkpoint == checkpoint) & (table.reduction == "none")
        line = table[table.index.isin(own.index) | dense]
        axes.plot(line.gmacs, line.acc1, gid=f"{checkpoint}:{method}", **style)
        axes.vlines(own.gmacs, own.acc1_low, own.acc1_high, style["color"], lw=0.8, alpha=0.6)
    axes.set_xlabel("multiply-accumulates per image (GMACs)")
    axes.set_ylabel("Acc@1 (%)")
    axes.margins(x=0.08, y=0.1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    handles = [Line2D([], [], **style) for style in styles.values()]
    if len(line_styles) > 1:
        handles += [
            Line2D([], [], color="#444444", linestyle=line_style, label=checkpoint)
            for checkpoint, line_style in line_styles.items()
        ]
    below_figure(axes.figure, handles, f"numbers at the points: keep rate\nbars: {bars}")
    _label_keep_rates(axes, table[table.reduction != "none"])
    return axes.figure


def _label_keep_rates(axes: Axes, table: pd.DataFrame) -> None:
    """Writes a checkpoint's keep rates above the best of their points; never one over another."""
    best = table.loc[table.groupby(["checkpoint", "keep_rate"]).acc1.idxmax()]
    axes.figure.draw_without_rendering()
    halo = [withStroke(linewidth=2, foreground="white")]  # error bars may pass behind
    boxes = []
    for row in best.sort_values("gmacs").itertuples():
        label = axes.annotate(
            f"{row.keep_rate:g}", (row.gmacs, row.acc1), xytext=(-1, 4), ha="right", va="bottom",
            textcoords="offset points", fontsize=7, color="#333333", path_effects=halo,
        )  # fmt: skip
        while any(label.get_window_extent().overlaps(box) for box in boxes):
            label.set_position((-1, label.get_position()[1] + 2))
        boxes.append(label.get_window_extent())
