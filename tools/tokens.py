"""What happened to every patch of an image: stage by stage, and in which token it ended.

    python -m tools.tokens --checkpoint best.pth --data-path FOLDER

Letters: B batch, S stages, N_0 patches of the image, N tokens entering a stage, K leaving it.
Exit codes: 0 done, 1 images could not be read (they are named and counted), 2 bad input.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from arguments import ArgumentParser
from datasets import SampleDataset, build_transform
from inputs.images import list_images, load_image
from models import BATVisionTransformer
from models.reduction import ReducedTokens, group_sums
from models.trace import PatchKind, trace_patches
from tools import common
from tools.figures import new_figure, save_figure, styled
from utils import check_writable, logger, run_script

HELP = """Says for every patch of every image what became of it. tokens.csv has a row a patch, with
lost_at, the first stage (from 1) after which no token stands for the patch alone, and for each
stage: the kind of token that the patch is in afterwards (single, pair, cluster, dropped), the
number of that token, the importance that the patch's token had before, and that token's weight in
the one it went into; final_weight is the product of the weights: with what share the patch is in
final_token; these shares sum to 1 over the patches of a final token. For evit's fused token, a sum,
weights are importances divided by their sum. tokens.png and .pdf show the means over the images."""


KIND_NAMES = np.array([kind.name.lower() for kind in PatchKind])


class ImageFiles:
    """Image files as the source of a `SampleDataset`: a data set without classes."""

    classes = ("image",)

    def __init__(self, files: Sequence[Path]) -> None:
        self.targets = [0] * len(files)
        self.samples = [(str(path), 0) for path in files]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return load_image(self.samples[index][0]), 0


def group_shares(weights: Tensor, assignment: Tensor, num_groups: int) -> Tensor:
    """Weights of the tokens in their groups, divided by the groups' sums.

    Args:
        weights: (B, N) non-negative; a group whose weights sum to 0 counts as equal weights.
        assignment: (B, N) int64 group in 0 .. K-1, or -1.
        num_groups: groups K.

    Returns:
        (B, N) float64; the shares of a group sum to 1, and a dropped token has 0.
    """
    weights = weights.double()
    group = assignment.clamp(min=0)
    total = group_sums(weights, assignment, num_groups).gather(1, group)  # (B, K) -> (B, N)
    count = group_sums(torch.ones_like(weights), assignment, num_groups).gather(1, group)
    share = torch.where(total > 0, weights / total, 1 / count)
    return torch.where(assignment >= 0, share, 0.0)


@torch.no_grad()
def follow_patches(
    model: BATVisionTransformer, images: Tensor, names: Sequence[str]
) -> pd.DataFrame:
    """Follows the patches of a batch through the model.

    The weights are those with which the method merges. EViT's fused token is a sum with weights
    that do not add up to 1; its shares are the importances divided by their sum.

    Args:
        model: in evaluation mode.
        images: (B, 3, H, W) normalised images.
        names: of the images.

    Returns:
        A row a patch, with the columns of tokens.csv; what a dropped patch does not have is
        missing, and so is lost_at where the patch still has its own token at the end.
    """
    with common.block_outputs(model) as outputs:
        model(images)
    reduced = [output for output in outputs if isinstance(output, ReducedTokens)]
    traces = trace_patches([output.assignment.cpu() for output in reduced], model.stages())
    num_patches, num_columns = model.patch_embed.num_patches, model.patch_embed.grid_size[1]
    patch = np.tile(np.arange(num_patches), len(images))
    columns = {
        "image": np.repeat(names, num_patches),
        "row": patch // num_columns,
        "column": patch % num_columns,
    }
    token = torch.arange(num_patches).expand(len(images), -1)  # (B, N_0) that each patch sits in
    lost_at = torch.ones_like(token)
    final_weight = torch.ones(token.shape, dtype=torch.float64)
    for stage, (output, trace) in enumerate(zip(reduced, traces, strict=True), 1):
        share = group_shares(output.weights, output.assignment, output.sizes.shape[1])
        weight = _look_up(share, token).masked_fill(trace.group < 0, torch.nan)
        columns[f"stage{stage}_kind"] = KIND_NAMES[trace.kind.flatten().numpy()]
        columns[f"stage{stage}_group"] = _integers(trace.group, trace.group >= 0)
        columns[f"stage{stage}_importance"] = _look_up(output.importance, token).flatten().numpy()
        columns[f"stage{stage}_weight"] = weight.flatten().numpy()
        lost_at = lost_at + (trace.kind == PatchKind.SINGLE)  # shared once, never single again
        final_weight = final_weight * weight
        token = trace.group
    columns["lost_at"] = _integers(lost_at, lost_at <= len(traces))
    columns["final_token"] = _integers(token, token >= 0)
    columns["final_weight"] = final_weight.flatten().numpy()
    return pd.DataFrame(columns)


def _look_up(values: Tensor, token_idx: Tensor) -> Tensor:
    """(B, N_0) float64 values (B, N) of the tokens token_idx (B, N_0); NaN where that is -1."""
    values = values.cpu().double().gather(1, token_idx.clamp(min=0))
    return values.masked_fill(token_idx < 0, torch.nan)


def _integers(values: Tensor, known: Tensor) -> pd.Series:
    """A column of integers (B, N_0), missing where they are not known."""
    return pd.Series(values.flatten().numpy()).astype("Int64").where(known.flatten().numpy())


def sum_patches(table: pd.DataFrame, num_stages: int) -> pd.DataFrame:
    """Per patch of the grid, sum and count over images of each importance and of lost_at.

    A patch that keeps its own token counts as lost at stage S + 1.
    """
    names = [f"stage{stage}_importance" for stage in range(1, num_stages + 1)]
    table = table.assign(lost_at=table.lost_at.fillna(num_stages + 1))
    return table.groupby(["row", "column"])[[*names, "lost_at"]].agg(["sum", "count"])


@styled
def plot_patches(
    importance: np.ndarray, lost_at: np.ndarray, blocks: Sequence[int], num_images: int
) -> Figure:
    """Heat maps over the patch grid: importance at each stage, and when patches lost their token.

    Args:
        importance: (S, rows, columns) mean class-token attention; NaN: no token there any more.
        lost_at: (rows, columns) mean stage at which the patch lost its own token; S + 1: never.
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


def get_parser() -> ArgumentParser:
    """The parser of this script."""
    parser = common.tool_parser("tokens", HELP, batch_size=16)
    add = parser.add_argument_group("what to follow").add_argument
    add(
        "--data-path", required=True,
        help="an image, a folder of images (searched recursively), or a text file with one path a "
        "line",
    )  # fmt: skip
    add("--eval-crop-ratio", type=float, default=0.875, help="crop of the resized image, in (0, 1]")
    add("--bad-images", choices=("error", "skip"), default="skip",
        help="an unreadable image ends the run, or is left out and named")  # fmt: skip
    add("--num-images", type=common.at_least(1), metavar="N",
        help="follow the first N images; default: all")  # fmt: skip
    return parser


def run(args: Namespace) -> int:
    """Follows the images, writes the table and the figure, and returns the exit code."""
    root = Path(args.data_path).expanduser()
    files = list_images(root)[: args.num_images]
    names = [str(path.relative_to(root)) if root.is_dir() else path.name for path in files]
    device = common.find_device(args)
    model = common.load_model(args, args.checkpoint, device)
    img_size = model.patch_embed.img_size
    dataset = SampleDataset(
        ImageFiles(files),
        build_transform(False, args, img_size),
        image_size=img_size,
        bad_images=args.bad_images,
    )
    stem = check_writable(args.output_dir) / "tokens"
    sums, bad = 0, []
    batches = common.readable_batches(dataset, range(len(files)), args, device=device, bad=bad)
    partial = stem.with_name("tokens.csv.partial")
    try:
        with open(partial, "w", newline="", encoding="utf-8") as file:
            for images, good in batches:
                table = follow_patches(model, images, [names[index] for index in good])
                table.to_csv(file, index=False, header=file.tell() == 0)
                sums = sums + sum_patches(table, len(model.reduction_loc))
        partial.replace(stem.with_name("tokens.csv"))
    finally:
        partial.unlink(missing_ok=True)
    means = sums.xs("sum", axis=1, level=1) / sums.xs("count", axis=1, level=1)
    maps = means.to_numpy(float).T.reshape(-1, *model.patch_embed.grid_size)
    figure = plot_patches(maps[:-1], maps[-1], model.reduction_loc, len(files) - len(bad))
    save_figure(figure, stem)
    logger.info(f"wrote tokens.csv, .png and .pdf to {args.output_dir}")
    return common.report_bad_images(dataset, bad, len(files))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    return run_script(get_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
