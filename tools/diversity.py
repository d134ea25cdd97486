"""How different the tokens of a block are, and how much attention the attentive tokens carry.

    python -m tools.diversity --checkpoint best.pth --data-path data/demo

Letters: B batch, N tokens, D channels; X (N, D) holds the patch tokens of one image, one a row.
Exit codes: 0 done, 1 images could not be read (they are named and counted), 2 bad input.
"""

import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from arguments import ArgumentParser, at_least, data_config
from datasets import build_dataset
from models import ReducingTransformer
from tools import common
from tools.figures import below_figure, method_style, new_figure, save_figure, styled
from utils import check_writable, run_script

TINY = 1e-30  # keeps 0 / 0 at 0
HELP = """Measures the patch tokens X (one a row) that leave each block: the relative distance to
equal tokens ||X - 1 m^T||_F / ||X||_F with m the mean token; the mean cosine of all pairs of
tokens; the effective rank, exp of the entropy of the normalised singular values (Roy and Vetterli
2007); and for each reducing block the share of the class token's attention to patch tokens that the
attentive ones carry: BAT's attentive tokens, for other methods the K most attended tokens, K being
how many the keep rate leaves; evo is measured on its active tokens, without that share. Writes
diversity.csv, .png and .pdf; blocks are counted from 0."""


def relative_distance(x: Tensor) -> Tensor:
    """Distance to the nearest matrix of equal rows: ||X - 1 m^T||_F / ||X||_F, m the mean token.

    Of all matrices 1 v^T, whose rows are equal and whose rank is thus 1, the one with v = m is
    nearest in the Frobenius norm. X - 1 v^T is the residual of Dong, Cordonnier and Loukas,
    "Attention is not all you need: pure attention loses rank doubly exponentially with depth"
    (ICML 2021, arXiv 2103.03404).

    Returns:
        (B,) float64 in [0, 1], for tokens x (B, N, D): 0 for identical tokens, 1 for tokens of mean
        0; 0 if all are 0.
    """
    x = x.double()
    residual = x - x.mean(dim=1, keepdim=True)
    return residual.norm(dim=(1, 2)) / x.norm(dim=(1, 2)).clamp(min=TINY)


def mean_cosine(x: Tensor) -> Tensor:
    """Mean of cos(x_i, x_j) = x_i . x_j / (||x_i|| ||x_j||) over all pairs of different tokens.

    With unit vectors u_i this is (||sum u_i||^2 - sum ||u_i||^2) / (N (N - 1)).

    Returns:
        (B,) float64 in [-1 / (N - 1), 1], for tokens x (B, N, D): 1 for identical tokens, 0 for
        orthogonal ones; a token that is 0 has cosine 0 to all others; NaN for N = 1.
    """
    unit = F.normalize(x.double(), dim=2, eps=TINY)
    num_tokens = x.shape[1]
    if num_tokens == 1:
        return unit.new_full((len(x),), torch.nan)
    pairs = unit.sum(dim=1).square().sum(dim=1) - unit.square().sum(dim=(1, 2))
    return pairs / (num_tokens * (num_tokens - 1))


def effective_rank(x: Tensor) -> Tensor:
    """Effective rank: exp(H), H = -sum p_k ln p_k, p_k = s_k / sum s of the singular values s.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007).
    The tokens are not centred.

    Returns:
        (B,) float64, for tokens x (B, N, D): from 1 (all of them parallel) to min(N, D) (e.g.
        orthogonal, of equal length).
    """
    singular = torch.linalg.svdvals(x.double())  # (B, min(N, D))
    p = F.normalize(singular, p=1, dim=1, eps=TINY)
    return torch.special.entr(p).sum(dim=1).exp()  # entr(p) = -p ln p, and 0 at p = 0


def attention_share(importance: Tensor, num_attentive: int) -> Tensor:
    """Share (B,) of the attention, importance (B, N), that the most attended tokens carry."""
    shares = F.normalize(importance.double(), p=1, dim=1, eps=TINY)
    return shares.topk(num_attentive, dim=1).values.sum(dim=1)


MEASURES = {own.__name__: own for own in (relative_distance, mean_cosine, effective_rank)}
MEASURE_LABELS = {
    "relative_distance": "relative distance to\nequal tokens",
    "mean_cosine": "mean cosine of\ntoken pairs",
    "effective_rank": "effective rank",
    "attention_share": "attention on attentive\ntokens* (%)",
}


def num_attentive_tokens(model: ReducingTransformer) -> dict[int, int]:
    """How many of the most attended tokens count as attentive, by index of the reducing block.

    For BAT these are its attentive tokens (A of `token_budget`), for every other method the K
    most attended tokens, whether it picks them (topk, evit) or not (dpcknn, tome, random).
    A stage that keeps everything has all N.
    """
    return {
        stage.block: stage.budget.attentive if model.reduction == "bat" else stage.budget.kept
        for stage in model.stages()
    }


def measure_images(model: ReducingTransformer, name: str, images: Tensor) -> pd.DataFrame:
    """Measures every block on images (B, 3, H, W): a row a block and image, of a named method."""
    with common.block_outputs(model) as outputs:
        model(images)
    attentive = num_attentive_tokens(model)
    tables = []
    for block, output in enumerate(outputs):
        reduces = output.assignment is not None
        patches = output.tokens[:, model.num_prefix_tokens :]
        share = attention_share(output.importance, attentive[block]).cpu() if reduces else np.nan
        values = {name: measure(patches).cpu() for name, measure in MEASURES.items()}
        facts = {
            "reduction": name,
            "block": block,
            "num_tokens": patches.shape[1],
            "num_attentive": attentive[block] if reduces else 0,
        }
        tables.append(pd.DataFrame(facts | values | {"attention_share": share}))
    return pd.concat(tables)


@torch.no_grad()
def measure_methods(
    contender: common.Contender, reductions: Sequence[str], batches: Iterable[Tensor]
) -> pd.DataFrame:
    """Measures every block of a model under every method, on the same images (B, 3, H, W).

    The model, in evaluation mode, is switched to each method; its keep rates stay.

    Returns:
        One row a method and block: reduction, block (from 0), num_tokens that leave it,
        num_attentive (missing outside reducing blocks), of each measure the mean over the images
        and the standard deviation (missing where it is not defined), and num_images.
    """
    tables = []
    for images in batches:
        for reduction in reductions:
            tables.append(measure_images(contender.switch(reduction), reduction, images))
    keys = ["reduction", "block", "num_tokens", "num_attentive"]
    groups = pd.concat(tables).groupby(keys, sort=False)
    mean, std = groups.mean(), groups.std(ddof=0).add_suffix("_std")
    columns = [name for pair in zip(mean, std, strict=True) for name in pair]
    table = mean.join(std)[columns].assign(num_images=groups.size()).reset_index()
    table["num_attentive"] = table.num_attentive.replace(0, pd.NA).astype("Int64")
    return table


@styled
def plot_diversity(table: pd.DataFrame) -> Figure:
    """A panel a measure: its mean over the images against the block, a line a method.

    Lines carry the method as their gid, panels the measure as their label. The deviations between
    images, which all methods share, would hide the lines; they are in the table.
    """
    figure = new_figure(4.0)
    panels = figure.subplots(2, 2, sharex=True)
    methods = table.reduction.unique()
    for axes, (measure, title) in zip(panels.flat, MEASURE_LABELS.items(), strict=True):
        axes.set_label(measure)
        axes.set_title(title)
        is_share = measure == "attention_share"
        for method in methods:
            if is_share and method == "none":
                continue  # every token is kept: 100 % by definition
            own = table[(table.reduction == method) & table[measure].notna()]
            style = method_style(method) | {"markersize": 3, "zorder": 2 + (method == "bat")}
            axes.plot(own.block, own[measure] * (100 if is_share else 1), gid=method, **style)
        for block in table.block[table.attention_share.notna()].unique():
            axes.axvline(block, color="#999999", linestyle=(0, (1, 2)), linewidth=0.8, zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[1]:
        axes.set_xlabel("block index (from 0)")
    below_figure(
        figure,
        [Line2D([], [], **method_style(name)) for name in methods],
        "dotted: reducing blocks.  * BAT: its attentive tokens;\n"
        "other methods: as many most attended ones as they keep",
    )
    return figure


def get_args_parser() -> ArgumentParser:
    parser, add = common.comparison_parser("diversity", HELP, batch_size=16)
    add("--num-images", type=at_least(1), default=64, metavar="N",
        help="images to measure, spread evenly over the validation images")  # fmt: skip
    return parser


def run(args: Namespace) -> int:
    """Measures, writes the table and the figure, and returns the exit code."""
    device = common.find_device(args)
    contender = common.load_contender(args, args.checkpoint, device)
    model = contender.model
    config = data_config(args, model.patch_embed.img_size, model.pretrained_cfg)
    dataset, _ = build_dataset(False, args, config)
    stem = check_writable(args.output_dir) / "diversity"
    count = min(args.num_images, len(dataset))
    indices = [number * len(dataset) // count for number in range(count)]
    bad: list[int] = []
    batches = common.readable_batches(dataset, indices, args, bad, device)
    table = measure_methods(contender, args.reductions, (images for images, _ in batches))
    common.write_table(table, stem.with_name("diversity.csv"))
    save_figure(plot_diversity(table), stem)
    common.say_written(stem, ".csv", ".png", ".pdf")
    return common.report_bad_images(dataset, bad, count)


def main(argv: list[str] | None = None) -> int:
    return run_script(get_args_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
