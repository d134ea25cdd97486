"""What happened to every patch of an image: stage by stage, and in which token it ended.

    python -m tools.tokens --checkpoint best.pth --data-path FOLDER

Letters: B batch, S stages, N_0 patches of the image, N tokens entering a stage, K leaving it.
Exit codes: 0 done, 1 images could not be read (they are named and counted), 2 bad input.
"""

import os
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

from arguments import ArgumentParser, add_image_arguments, at_least, data_config
from datasets import SampleDataset, build_transform
from inputs.images import list_images, load_image
from models import ReducingTransformer
from models.reduction import group_shares, group_sums
from models.trace import PatchKind, follow, trace_patches
from tools import common
from tools.figures import new_figure, save_figure, styled
from utils import check_writable, run_script

HELP = """Says for every patch of every image what became of it. tokens.csv has a row a patch, with
lost_at, the first stage (from 1) after which no token stands for the patch alone, and for each
stage: the kind of token that the patch is in afterwards (single; pair and cluster by how it was
merged; mixed after both; dropped; with evo waiting), the number of that token, the importance that
the patch's token had before, and that token's weight in the one it went into; final_weight is the
product of the weights: with what share the patch is in final_token; these shares sum to 1 over the
patches of a final token. For evit's fused token, a sum, weights are importances divided by their
sum. Writes tokens.csv, and tokens.png and .pdf with the means over the images; blocks are counted
from 0."""
KIND_NAMES = np.array([kind.name.lower() for kind in PatchKind])


class ImageFiles:
    """Image files as the source of a `SampleDataset`."""

    classes = ("image",)

    def __init__(self, files: Sequence[Path], max_image_pixels: int) -> None:
        self.samples = [(str(path), 0) for path in files]
        self.targets = [0] * len(files)
        self.max_image_pixels = max_image_pixels

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return load_image(self.samples[index][0], self.max_image_pixels), 0


@torch.no_grad()
def follow_patches(
    model: ReducingTransformer, images: Tensor, names: Sequence[str]
) -> pd.DataFrame:
    """Follows the patches of images (B, 3, H, W) through a model in evaluation mode.

    The weights are those with which the method merges. EViT's fused token is a sum with weights
    that do not add up to 1; its shares are the importances divided by their sum.

    Returns:
        A row a patch, with the columns of tokens.csv; what a dropped patch does not have is
        missing, and so is lost_at where the patch still has its own token at the end.
    """
    _, reduced = model.forward_with_stages(images)
    traces = trace_patches([output.assignment.cpu() for output in reduced], model.stages())
    waits = model.settings.method.waits
    num_patches, num_columns = model.patch_embed.num_patches, model.patch_embed.grid_size[1]
    patch = np.tile(np.arange(num_patches), len(images))
    columns = {
        "image": np.repeat(names, num_patches),
        "row": patch // num_columns,
        "column": patch % num_columns,
    }
    own_token = torch.arange(num_patches).expand(len(images), -1)
    token = own_token  # (B, N_0) that each patch sits in
    lost_at = torch.ones_like(token)
    final_weight = torch.ones(token.shape, dtype=torch.float64)
    for stage, (output, trace) in enumerate(zip(reduced, traces, strict=True), 1):
        weights, num_tokens = output.weights.double(), output.sizes.shape[1]
        num_members = group_sums(torch.ones_like(weights), output.assignment, num_tokens)
        share = group_shares(weights, output.assignment, num_members)
        weight = follow(token, share.cpu(), torch.nan).masked_fill(trace.group < 0, torch.nan)
        importance = follow(token, output.importance.cpu().double(), torch.nan)
        columns[f"stage{stage}_kind"] = KIND_NAMES[trace.kind.flatten().numpy()]
        columns[f"stage{stage}_group"] = _integers(trace.group, trace.group >= 0)
        columns[f"stage{stage}_importance"] = importance.flatten().numpy()
        columns[f"stage{stage}_weight"] = weight.flatten().numpy()
        is_alone = (trace.kind == PatchKind.SINGLE) | (trace.kind == PatchKind.WAITING)
        lost_at = lost_at + is_alone  # shared once, never alone again
        if not waits:
            final_weight = final_weight * weight
            token = trace.group
    columns["lost_at"] = _integers(lost_at, lost_at <= len(traces))
    columns["final_token"] = _integers(token, token >= 0)
    columns["final_weight"] = final_weight.flatten().numpy()
    return pd.DataFrame(columns)


def _integers(values: Tensor, known: Tensor) -> pd.Series:
    """A column of integers (B, N_0), missing where they are not known."""
    return pd.Series(values.flatten().numpy()).astype("Int64").where(known.flatten().numpy())


@styled
def plot_patches(table: pd.DataFrame, blocks: Sequence[int]) -> Figure:
    """Heat maps over the patch grid: importance at each stage, and when patches lost their token.

    Both are means over the images; where a patch has no token any more, it has no importance, and
    one that keeps its own token counts as lost at stage S + 1. `blocks` has each stage's block.
    """
    never = len(blocks) + 1
    patches = table.assign(lost_at=table.lost_at.fillna(never)).groupby(["row", "column"])
    means = patches.mean(numeric_only=True).astype(float).unstack()  # (rows, columns) each
    num_rows = (never + 1) // 2
    aspect = means.lost_at.shape[0] / means.lost_at.shape[1]
    figure = new_figure(0.3 + num_rows * (0.42 + 0.9 * min(aspect, 2.5)))
    panels = list(figure.subplots(num_rows, 2, squeeze=False).flat)
    for axes in panels[never:]:
        axes.remove()
    for stage, block in enumerate(blocks, 1):
        importance = 100 * means[f"stage{stage}_importance"]
        heat_map(panels[stage - 1], importance, f"stage {stage} (block {block})", "importance (%)")
    never_label = f"stage ({never}: never)"
    heat_map(panels[never - 1], means.lost_at, "own token lost", never_label, "cividis")
    num_images = len(table) // means.lost_at.size
    images = "1 image" if num_images == 1 else f"mean of {num_images} images"
    figure.supxlabel(f"patch column ({images})", fontsize=8)
    figure.supylabel("patch row", fontsize=8)
    return figure


def heat_map(
    axes: Axes, values: pd.DataFrame, title: str, unit: str, colours: str = "viridis"
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


def get_args_parser() -> ArgumentParser:
    parser = common.tool_parser("tokens", HELP, batch_size=16)
    add = parser.add_argument_group("what to follow").add_argument
    # fmt: off
    add("--data-path", required=True,
        help="an image, a folder of images (searched recursively), or a text file of paths")
    add_image_arguments(add)
    add("--bad-images", choices=("error", "skip"), default="skip",
        help="an unreadable image ends the run, or is left out and named")
    add("--num-images", type=at_least(1), metavar="N",
        help="follow the first N images; default: all")
    # fmt: on
    return parser


def run(args: Namespace) -> int:
    """Follows the images, writes the table and the figure, and returns the exit code."""
    root = Path(os.path.expanduser(args.data_path))
    files = list_images(root)[: args.num_images]
    names = [str(path.relative_to(root)) if root.is_dir() else path.name for path in files]
    device = common.find_device(args)
    model = common.load_model(args, args.checkpoint, device)
    config = data_config(args, model.patch_embed.img_size, model.pretrained_cfg)
    transform = build_transform(False, args, config)
    source = ImageFiles(files, args.max_image_pixels)
    dataset = SampleDataset(source, transform, config, bad_images=args.bad_images)
    stem = check_writable(args.output_dir) / "tokens"
    bad: list[int] = []
    table = pd.concat(
        follow_patches(model, images, [names[index] for index in good])
        for images, good in common.readable_batches(dataset, range(len(files)), args, bad, device)
    )
    common.write_table(table, stem.with_name("tokens.csv"))
    save_figure(plot_patches(table, model.reduction_loc), stem)
    common.say_written(stem, ".csv", ".png", ".pdf")
    return common.report_bad_images(dataset, bad, len(files))


def main(argv: list[str] | None = None) -> int:
    return run_script(get_args_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
