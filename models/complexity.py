"""Multiply-accumulates, parameters and token counts of a model.

Counted by `torch.utils.flop_counter` on the meta device, where nothing is computed: the count is
the same whatever device the model lives on. Linear layers, convolutions and matrix products count
(attention and the stages' own products included), as in the papers' GMACs.
"""

import copy
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .vit import ReducingTransformer

FLOPS_PER_GMAC = 2e9  # one multiply-accumulate counts as two operations


def count_parameters(model: nn.Module) -> int:
    """Number of scalar parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def gmacs_by_module(model: nn.Module) -> dict[str, float]:
    """Multiply-accumulates of one image's forward pass, by module.

    Args:
        model: a timm-style Vision Transformer on any device; it is not changed.

    Returns:
        GMACs by dotted module name, down to the blocks; the key "" holds the total.
    """
    # Without gradients: the counter stumbles over views of parameters, as in attention pools.
    meta = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    image = torch.empty(1, 3, *meta.patch_embed.img_size, device="meta")
    counter = FlopCounterMode(display=False, depth=2)
    # The counter knows only some of the fused attention kernels, but every matrix product.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        meta(image)
    root = type(meta).__name__
    gmacs: dict[str, float] = defaultdict(float)
    for name, operations in counter.get_flop_counts().items():
        if name == "Global":
            gmacs[""] = sum(operations.values()) / FLOPS_PER_GMAC
        elif name.startswith(f"{root}."):
            gmacs[name.removeprefix(f"{root}.")] = sum(operations.values()) / FLOPS_PER_GMAC
    return gmacs


def count_gmacs(model: nn.Module) -> float:
    """Multiply-accumulates of one image's forward pass, in 10^9; see `gmacs_by_module`."""
    return gmacs_by_module(model)[""]


def describe_rates(model: ReducingTransformer) -> str:
    """How many tokens its stages keep, in words; equal keep rates once."""
    if model.settings.tome_r is not None:
        return f"{model.settings.tome_r} tokens less a stage"
    return "keep rate " + ", ".join(f"{rate:g}" for rate in dict.fromkeys(model.keep_rates))


def describe_reduction(model: ReducingTransformer) -> str:
    """The model's reduction in one line."""
    settings = model.settings
    words = [
        f"reduction {settings.reduction}",
        f"keep rates {_join(model.keep_rates)}",
        f"blocks {_join(model.reduction_loc)}",
    ]
    if settings.method.splits:
        words += [
            f"cluster ratio {settings.cluster_ratio:g}",
            f"match ratio {settings.match_ratio:g}",
            f"merge weights {settings.merge_weights}",
        ]
    if settings.tome_r is not None:
        words[1] = describe_rates(model)
    words.append(f"proportional attention {'on' if settings.is_proportional else 'off'}")
    return ", ".join(words)


def describe(model: ReducingTransformer) -> str:
    """The model's reduction in one line, then tokens and GMACs of every block as a table."""
    gmacs = gmacs_by_module(model)
    dense_model = copy.deepcopy(model)
    dense_model.set_keep_rate(1.0)
    dense = count_gmacs(dense_model)
    columns = "{:>5}  {:>5}  {:>5}  {:>5}  {:>9}  {:>5}  {:>8}  {:>11}  {:>7}"
    names = ("block", "in", "out", "keep", "attentive", "pairs", "clusters", "inattentive", "GMACs")
    lines = [
        describe_reduction(model),
        f"parameters: {count_parameters(model):,}; prefix tokens, beside the patch tokens below: "
        f"{model.num_prefix_tokens}",
        columns.format(*names),
    ]
    stages = {stage.block: stage for stage in model.stages()}
    num_tokens = model.patch_embed.num_patches
    rest = gmacs[""]
    for index in range(len(model.blocks)):
        spent, num_outputs = [""] * 5, num_tokens
        if index in stages:
            num_tokens = stages[index].num_tokens
            budget, num_outputs = stages[index].budget, stages[index].num_outputs
            spent = [f"{stages[index].keep_rate:.3g}", budget.attentive, budget.pairs]
            spent += [budget.clusters, budget.inattentive]
        block_gmacs = gmacs[f"blocks.{index}"]
        lines.append(columns.format(index, num_tokens, num_outputs, *spent, f"{block_gmacs:.4f}"))
        rest -= block_gmacs
        num_tokens = num_outputs
    lines.append(f"embedding and head: {rest:.4f} GMACs")
    lines.append(f"total: {gmacs['']:.4f} GMACs, {gmacs[''] / dense:.1%} of the dense {dense:.4f}")
    return "\n".join(lines)


def _join(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values) or "none"


def check_adjustable(model: ReducingTransformer) -> None:
    """Raises ValueError where no keep rate changes what the model costs."""
    if model.settings.tome_r is not None:
        raise ValueError("tome_r fixes the cost: a target needs a keep rate")
    if not model.reduction_loc or not model.settings.method.reduces:
        raise ValueError("a target needs a model that reduces tokens")


def find_keep_rate(model: ReducingTransformer, target_gmacs: float) -> float:
    """The largest keep rate, to three decimals and equal in all stages, within a budget.

    A stage costs something itself, so that a keep rate just below 1 needs more GMACs than the dense
    model, which is therefore looked at first.

    Args:
        model: the model; its own keep rate is not changed.
        target_gmacs: GMACs of one image's forward pass that may be spent.

    Returns:
        The keep rate, in (0, 1].

    Raises:
        ValueError: even the smallest keep rate needs more, or the model has no stage.
    """
    check_adjustable(model)
    model = copy.deepcopy(model).to("meta")

    def gmacs_at(thousandths: int) -> float:
        model.set_keep_rate(thousandths / 1000)
        return count_gmacs(model)

    if gmacs_at(1000) <= target_gmacs:
        return 1.0
    thousandths = bisect_right(range(1, 1000), target_gmacs, key=gmacs_at)
    if thousandths == 0:
        raise ValueError(
            f"target_gmacs {target_gmacs} is below the {gmacs_at(1):.4f} of the smallest keep rate"
        )
    return thousandths / 1000
