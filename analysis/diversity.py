"""How different the tokens of a block are, and how much attention the attentive tokens carry.

Letters: B batch, N tokens, D channels; X (N, D) holds the patch tokens of one image, one a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from analysis.tokens import stage_importance
from models import BATVisionTransformer
from models.bat import BATBlock
from models.reduction import ReducedTokens

TINY = 1e-30  # keeps 0 / 0 at 0


def relative_distance(x: Tensor) -> Tensor:
    """Distance to the nearest matrix of equal rows: ||X - 1 m^T||_F / ||X||_F, m the mean token.

    Of all matrices 1 v^T, whose rows are equal and whose rank is thus 1, the one with v = m is
    nearest in the Frobenius norm. X - 1 v^T is the residual of Dong, Cordonnier and Loukas,
    "Attention is not all you need: pure attention loses rank doubly exponentially with depth"
    (ICML 2021, arXiv 2103.03404).

    Args:
        x: (B, N, D) tokens.

    Returns:
        (B,) float64 in [0, 1]: 0 for identical tokens, 1 for tokens of mean 0; 0 if all are 0.
    """
    x = x.double()
    residual = x - x.mean(dim=1, keepdim=True)
    return residual.norm(dim=(1, 2)) / x.norm(dim=(1, 2)).clamp(min=TINY)


def mean_cosine(x: Tensor) -> Tensor:
    """Mean of cos(x_i, x_j) = x_i . x_j / (||x_i|| ||x_j||) over all pairs of different tokens.

    With unit vectors u_i this is (||sum u_i||^2 - sum ||u_i||^2) / (N (N - 1)).

    Args:
        x: (B, N, D) tokens.

    Returns:
        (B,) float64 in [-1 / (N - 1), 1]: 1 for identical tokens, 0 for orthogonal ones; a token
        that is 0 has cosine 0 to all others; NaN for N = 1.
    """
    x = x.double()
    num_tokens = x.shape[1]
    unit = x / x.norm(dim=2, keepdim=True).clamp(min=TINY)
    if num_tokens == 1:
        return x.new_full((len(x),), torch.nan)
    pairs = unit.sum(dim=1).square().sum(dim=1) - unit.square().sum(dim=(1, 2))
    return pairs / (num_tokens * (num_tokens - 1))


def effective_rank(x: Tensor) -> Tensor:
    """Effective rank: exp(H), H = -sum p_k ln p_k, p_k = s_k / sum s of the singular values s.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007).
    The tokens are not centred.

    Args:
        x: (B, N, D) tokens.

    Returns:
        (B,) float64 from 1 (all tokens parallel) to min(N, D) (e.g. orthogonal, of equal length).
    """
    singular = torch.linalg.svdvals(x.double())  # (B, min(N, D))
    p = singular / singular.sum(dim=1, keepdim=True).clamp(min=TINY)
    return torch.special.entr(p).sum(dim=1).exp()  # entr(p) = -p ln p, and 0 at p = 0


def attention_share(importance: Tensor, num_attentive: int) -> Tensor:
    """Share of the class token's attention to patch tokens that the most attended ones carry.

    Args:
        importance: (B, N) class-token attention to the patch tokens.
        num_attentive: how many of the most attended tokens count.

    Returns:
        (B,) float64 in [0, 1].
    """
    importance = importance.double()
    top = importance.topk(num_attentive, dim=1).values.sum(dim=1)
    return top / importance.sum(dim=1).clamp(min=TINY)


MEASURES = {
    "relative_distance": relative_distance,
    "mean_cosine": mean_cosine,
    "effective_rank": effective_rank,
}
ATTENTION_SHARE = "attention_share"


class BlockRecord(NamedTuple):
    """One block on one batch.

    Attributes:
        num_tokens: patch tokens that leave the block.
        num_attentive: attentive tokens of a reducing block, see `num_attentive_tokens`; else 0.
        values: measure -> (B,) float64 on the CPU; the attention share in reducing blocks alone.
    """

    num_tokens: int
    num_attentive: int
    values: dict[str, Tensor]


def num_attentive_tokens(model: BATVisionTransformer) -> dict[int, int]:
    """How many of the most attended tokens count as attentive, by index of the reducing block.

    For BAT these are its attentive tokens (A of `token_budget`), for every other method the K
    most attended tokens, whether it picks them (topk, evit) or not (dpcknn, tome, random).
    A stage that keeps everything has all N.
    """
    return {
        stage.block: stage.budget.attentive if model.reduction == "bat" else stage.budget.kept
        for stage in model.stages()
    }


@contextmanager
def record_blocks(model: BATVisionTransformer) -> Iterator[list[BlockRecord]]:
    """Gives a list to which every forward pass inside appends one record a block."""
    records = []
    attentive = num_attentive_tokens(model)
    block_idx = {block: index for index, block in enumerate(model.blocks)}

    def note(block: nn.Module, inputs: tuple, output: Tensor | ReducedTokens) -> None:
        tokens = output.tokens if isinstance(output, ReducedTokens) else output
        patches = tokens[:, model.num_prefix_tokens :]
        values = {name: measure(patches).cpu() for name, measure in MEASURES.items()}
        count = 0
        if isinstance(block, BATBlock):
            count = attentive[block_idx[block]]
            share = attention_share(stage_importance(block, inputs[0]), count)
            values[ATTENTION_SHARE] = share.cpu()
        records.append(BlockRecord(patches.shape[1], count, values))

    handles = [block.register_forward_hook(note) for block in model.blocks]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_methods(
    model: BATVisionTransformer, reductions: Sequence[str], batches: Iterable[Tensor]
) -> list[dict]:
    """Measures every block under every method, on the same images.

    Args:
        model: in evaluation mode; its method is switched, its keep rates stay.
        reductions: names in REDUCTIONS.
        batches: (B, 3, H, W) normalised images on the model's device.

    Returns:
        One row of plain values a method and block: reduction, block (from 0), num_tokens that
        leave it, num_attentive (None outside reducing blocks), num_images, and of each measure the
        mean over the images and the standard deviation (None where it is not defined).
    """
    passes: dict[str, list[list[BlockRecord]]] = {name: [] for name in reductions}
    for images in batches:
        for reduction in reductions:
            model.set_reduction(reduction)
            with record_blocks(model) as records:
                model(images)
            passes[reduction].append(records)
    return [
        _row(reduction, block, [records[block] for records in passes[reduction]])
        for reduction in reductions
        for block in range(len(model.blocks))
    ]


def _row(reduction: str, block: int, records: Sequence[BlockRecord]) -> dict:
    """Mean and standard deviation of one block over all batches."""
    row = {
        "reduction": reduction,
        "block": block,
        "num_tokens": records[0].num_tokens,
        "num_attentive": records[0].num_attentive or None,
    }
    for name in (*MEASURES, ATTENTION_SHARE):
        values = [record.values[name] for record in records if name in record.values]
        over_images = torch.cat(values) if values else torch.tensor([torch.nan])
        mean, std = over_images.mean().item(), over_images.std(correction=0).item()
        row |= {name: None if mean != mean else mean, f"{name}_std": None if std != std else std}
    row["num_images"] = sum(len(record.values["effective_rank"]) for record in records)
    return row
