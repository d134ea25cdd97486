"""The figures that only the study has; the others are `analysis/figures.py`'s."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis.figures import METHODS, new_figure, styled

BAR_COLOURS = ("#56B4E9", "#009E73", METHODS["bat"][1], "#999999")


@styled
def plot_ablation(rows: Sequence[Mapping]) -> Figure:
    """Accuracy of every row of the ablation, a group of bars a keep rate.

    The axis does not start at 0: the differences are small. Bars are drawn from the lowest shown
    value; the whiskers are standard errors of the difference to importance alone.

    Args:
        rows: label, keep_rate, acc1, difference_error (None in the first row of a keep rate).
    """
    figure = new_figure(2.6)
    axes = figure.add_subplot()
    labels = list(dict.fromkeys(row["label"] for row in rows))
    rates = sorted({row["keep_rate"] for row in rows}, reverse=True)
    width = 0.8 / len(labels)
    for index, label in enumerate(labels):
        own = [row for row in rows if row["label"] == label and row["acc1"] is not None]
        at = [
            rates.index(row["keep_rate"]) + (index - (len(labels) - 1) / 2) * width for row in own
        ]
        values = [row["acc1"] for row in own]
        errors = [row["difference_error"] or 0 for row in own]
        axes.bar(at, values, 0.92 * width, color=BAR_COLOURS[index], label=label)
        if any(errors):
            axes.errorbar(at, values, errors, fmt="none", ecolor="#333333", capsize=2)
        for x, value, error in zip(at, values, errors, strict=True):
            axes.annotate(
                f"{value:.1f}", (x, value + error), xytext=(0, 2), textcoords="offset points",
                ha="center", fontsize=6.5,
            )  # fmt: skip
    shown = [row["acc1"] for row in rows if row["acc1"] is not None]
    spread = max(max(shown) - min(shown), 1.0)
    axes.set_ylim(min(shown) - spread, max(shown) + 0.6 * spread)
    axes.set_xticks(range(len(rates)), [f"keep rate {rate:g}" for rate in rates])
    axes.grid(False, axis="x")
    axes.set_ylabel("Acc@1 (%), cut axis")
    title = "whiskers: standard error of the difference to importance alone"
    figure.legend(loc="outside lower center", ncols=2, title=title)
    return figure


@styled
def plot_ratios(
    accuracy: np.ndarray, clusters: Sequence[float], matches: Sequence[float], default: tuple
) -> Figure:
    """Heat map of accuracy over the two ratios; the default has a frame.

    Args:
        accuracy: (match ratios, cluster ratios) Acc@1 in percent.
        clusters: cluster ratios of the columns.
        matches: match ratios of the rows.
        default: (cluster ratio, match ratio) of the design.
    """
    figure = new_figure(2.7)
    axes = figure.add_subplot()
    image = axes.imshow(accuracy, cmap="viridis", origin="lower", aspect="auto")
    middle = (np.nanmin(accuracy) + np.nanmax(accuracy)) / 2
    for (row, column), value in np.ndenumerate(accuracy):
        colour = "white" if value < middle else "black"
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=7)
    corner = clusters.index(default[0]) - 0.5, matches.index(default[1]) - 0.5
    style = {"fill": False, "edgecolor": METHODS["bat"][1], "linewidth": 1.8}
    axes.add_patch(Rectangle(corner, 1, 1, **style))
    axes.set_xticks(range(len(clusters)), [f"{value:g}" for value in clusters])
    axes.set_yticks(range(len(matches)), [f"{value:g}" for value in matches])
    axes.set_xlabel("cluster ratio (framed: the default)")
    axes.set_ylabel("match ratio")
    axes.grid(False)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("Acc@1 (%)")
    bar.outline.set_linewidth(0.6)
    return figure
