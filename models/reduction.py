"""Token reduction as pure tensor functions: budgets, assignments and merging.

One stage turns N patch tokens into K. Every input token goes to at most one output token, so a
stage is an assignment (B, N) int64 (output index, or -1 for a dropped token) and its result is
``W @ x`` with a row-stochastic W (B, K, N) that has at most one non-zero entry per column. A method
is a function that returns an assignment; merging, tracing and drawing are shared.

Letters: B batch, H heads, N patch tokens entering a stage, K output tokens, A attentive tokens,
M inattentive tokens, C clusters, P pairs, D channels.

All arithmetic is float32, whatever the autocast type; all shapes follow from N and the keep rate,
never from the data; equal values are ordered by index. This file imports torch only.

Source: "Beyond Attentive Tokens: Incorporating Token Importance and Diversity for Efficient Vision
Transformers", CVPR 2023, arXiv 2211.11315; the baselines name theirs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .budget import TokenBudget, token_budget
from .grouping import (
    density_peaks,
    descending_rank,
    gather_tokens,
    group_sums,
    match_pairs,
    merge_tokens,
)

__all__ = [
    "MERGE_WEIGHTS",
    "REDUCTIONS",
    "ReducedTokens",
    "Reduction",
    "StageInputs",
    "TokenBudget",
    "bat_assignment",
    "density_peaks",
    "dpcknn_assignment",
    "evit_assignment",
    "match_pairs",
    "merge_tokens",
    "random_assignment",
    "reduce_tokens",
    "stage_counts",
    "token_budget",
    "tome_assignment",
    "topk_assignment",
]

MERGE_WEIGHTS = ("importance", "mean")


def importance_order(importance: Tensor) -> Tensor:
    """(B, N) int64 token indices by falling importance; equal values keep index order."""
    return importance.detach().argsort(dim=-1, descending=True, stable=True)


def identity_assignment(x: Tensor) -> Tensor:
    """(B, N) every token of x (B, N, D) is its own group."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)


def bat_assignment(
    x: Tensor,
    importance: Tensor,
    keep_rate: float,
    cluster_ratio: float = 0.4,
    match_ratio: float = 0.1,
) -> Tensor:
    """BAT: keep the attentive tokens, match look-alikes, cluster the inattentive ones.

    Args:
        x: (B, N, D) patch tokens.
        importance: (B, N) class-token attention to each of them.
        keep_rate: K / N, in (0, 1].
        cluster_ratio: share of K spent on clusters, in [0, 1]; 0 drops the inattentive tokens.
        match_ratio: pairs per token that is not a cluster, in [0, 1].

    Returns:
        (B, N) int64 groups in 0 .. K-1, or -1 for dropped tokens: first the attentive groups by the
        rank of the token that stays, then the clusters by score. Ties keep index order.

    Raises:
        ValueError: a rate or ratio is outside its range.
    """
    budget = token_budget(x.shape[1], keep_rate, cluster_ratio, match_ratio)
    if budget.kept >= x.shape[1]:
        return identity_assignment(x)
    order = importance_order(importance)  # (B, N)
    ordered = gather_tokens(x.detach(), order)  # (B, N, D)
    groups = match_pairs(ordered[:, : budget.attentive], budget.pairs)  # (B, A)
    inattentive = ordered[:, budget.attentive :]  # (B, M, D)
    if budget.clusters > 0:
        clusters = density_peaks(inattentive, budget.clusters) + (budget.kept - budget.clusters)
    else:
        clusters = torch.full(inattentive.shape[:2], -1, device=x.device)  # (B, M)
    groups = torch.cat([groups, clusters], dim=1)  # (B, N) in importance order
    return torch.empty_like(groups).scatter(1, order, groups)


def topk_assignment(x: Tensor, importance: Tensor, keep_rate: float) -> Tensor:
    """Pruning: the K most attended tokens stay, the rest are dropped.

    Args:
        x: (B, N, D) patch tokens.
        importance: (B, N) class-token attention to each of them.
        keep_rate: K / N, in (0, 1].

    Returns:
        (B, N) int64 importance rank in 0 .. K-1, or -1.
    """
    kept = token_budget(x.shape[1], keep_rate).kept
    if kept >= x.shape[1]:
        return identity_assignment(x)
    rank = descending_rank(importance.detach())
    return rank.masked_fill(rank >= kept, -1)


def evit_assignment(x: Tensor, importance: Tensor, keep_rate: float) -> Tensor:
    """EViT (Liang et al., ICLR 2022): the K most attended stay, the rest are fused.

    Args:
        x: (B, N, D) patch tokens.
        importance: (B, N) class-token attention to each of them.
        keep_rate: K / N, in (0, 1]; with K = N nothing is fused.

    Returns:
        (B, N) int64 importance rank in 0 .. K-1, or K for the tokens of the fused one.
    """
    kept = token_budget(x.shape[1], keep_rate).kept
    if kept >= x.shape[1]:
        return identity_assignment(x)
    return descending_rank(importance.detach()).clamp(max=kept)


def dpcknn_assignment(x: Tensor, keep_rate: float) -> Tensor:
    """DPC-KNN (Zeng et al., TCFormer, CVPR 2022): density peaks over all tokens, K clusters.

    Args:
        x: (B, N, D) patch tokens.
        keep_rate: K / N, in (0, 1].

    Returns:
        (B, N) int64 cluster in 0 .. K-1, by falling score.
    """
    kept = token_budget(x.shape[1], keep_rate).kept
    if kept >= x.shape[1]:
        return identity_assignment(x)
    return density_peaks(x, kept)


def tome_assignment(x: Tensor, sizes: Tensor, keep_rate: float) -> Tensor:
    """ToMe (Bolya et al., ICLR 2023): bipartite matching over all tokens.

    One step merges at most floor(N / 2) tokens, so a lower keep rate repeats the step on the merged
    tokens (means weighted by size) until K are left.

    Args:
        x: (B, N, D) patch tokens, in input order.
        sizes: (B, N) number of patches that each of them stands for.
        keep_rate: K / N, in (0, 1].

    Returns:
        (B, N) int64 group in 0 .. K-1, by ascending input order of the token that stays.
    """
    kept = token_budget(x.shape[1], keep_rate).kept
    assignment = identity_assignment(x)
    while x.shape[1] > kept:
        num_tokens = x.shape[1]
        step = match_pairs(x, min(num_tokens - kept, num_tokens // 2))  # (B, num_tokens)
        num_groups = max(kept, num_tokens - num_tokens // 2)
        assignment = step.gather(1, assignment)  # (B, N)
        x = merge_tokens(x, sizes, step, num_groups)  # (B, num_groups, D)
        sizes = group_sums(sizes, step, num_groups)
    return assignment


def random_assignment(x: Tensor, keep_rate: float, *, stage: int, seed: int) -> Tensor:
    """Control: K tokens stay by one permutation per (seed, stage, N), the same for every image.

    The permutation sorts a hash of the token index in 64-bit integer arithmetic, so it is the same
    on every device and is a constant of a compiled or exported graph.

    Args:
        x: (B, N, D) patch tokens.
        keep_rate: K / N, in (0, 1].
        stage: index of the stage.
        seed: chooses among the permutations.

    Returns:
        (B, N) int64 position of the token in the permutation when below K, else -1.
    """
    kept = token_budget(x.shape[1], keep_rate).kept
    if kept >= x.shape[1]:
        return identity_assignment(x)
    prime = 2_147_483_647  # 2^31 - 1: every product below stays under 2^62
    key = torch.arange(1, x.shape[1] + 1, device=x.device)
    for constant in (seed, stage, x.shape[1], 48_271, 69_621):
        factor = (constant + 16_807) % prime
        key = ((key * key) % prime + key * factor + factor) % prime
    rank = key.argsort(stable=True).argsort()  # (N,)
    return rank.masked_fill(rank >= kept, -1).expand(x.shape[0], -1)


def importance_weights(inputs: "StageInputs", assignment: Tensor) -> Tensor:
    """(B, N) weights inside a group: the importances, or ones for `merge_weights='mean'`."""
    if inputs.merge_weights == "mean":
        return torch.ones_like(inputs.importance)
    return inputs.importance


def mean_weights(inputs: "StageInputs", assignment: Tensor) -> Tensor:
    """(B, N) ones: groups become plain means."""
    return torch.ones_like(inputs.importance)


def size_weights(inputs: "StageInputs", assignment: Tensor) -> Tensor:
    """(B, N) the number of patches that each token stands for."""
    return inputs.sizes


def fused_weights(inputs: "StageInputs", assignment: Tensor) -> Tensor:
    """(B, N) EViT's: 1 for a token that stays, its importance for a token of the fused one."""
    kept = token_budget(inputs.x.shape[1], inputs.keep_rate).kept
    return torch.where(assignment < kept, torch.ones_like(inputs.importance), inputs.importance)


class StageInputs(NamedTuple):
    """Everything a method may look at when it decides about one stage.

    Attributes:
        x: (B, N, D) patch tokens after the attention residual.
        importance: (B, N) float32 class-token attention to each of them.
        sizes: (B, N) float32 number of patches that each token stands for.
        keep_rate: K / N, in (0, 1].
        cluster_ratio: see `token_budget`.
        match_ratio: see `token_budget`.
        merge_weights: "importance" or "mean" (ablation), where the method weights by importance.
        stage: 0, 1, ...: which of the model's stages this is.
        seed: for methods with a random choice.
    """

    x: Tensor
    importance: Tensor
    sizes: Tensor
    keep_rate: float
    cluster_ratio: float = 0.4
    match_ratio: float = 0.1
    merge_weights: str = "importance"
    stage: int = 0
    seed: int = 0


class Reduction(NamedTuple):
    """A method: how it assigns tokens to groups, and what a group becomes.

    Attributes:
        assign: stage inputs -> (B, N) assignment; called without gradients.
        weights: stage inputs and assignment -> (B, N) weights of the tokens in their groups.
        num_clusters: budget -> how many of the last output groups are clusters.
        num_fused: output tokens beside the K of the budget.
        normalize: False: groups are weighted sums instead of means.
    """

    assign: Callable[[StageInputs], Tensor]
    weights: Callable[[StageInputs, Tensor], Tensor] = importance_weights
    num_clusters: Callable[[TokenBudget], int] = lambda budget: 0
    num_fused: int = 0
    normalize: bool = True


REDUCTIONS: dict[str, Reduction] = {
    "none": Reduction(lambda s: identity_assignment(s.x)),
    "topk": Reduction(lambda s: topk_assignment(s.x, s.importance, s.keep_rate)),
    "evit": Reduction(
        lambda s: evit_assignment(s.x, s.importance, s.keep_rate),
        weights=fused_weights,
        num_clusters=lambda budget: 1,
        num_fused=1,
        normalize=False,
    ),
    "dpcknn": Reduction(
        lambda s: dpcknn_assignment(s.x, s.keep_rate),
        weights=mean_weights,
        num_clusters=lambda budget: budget.kept,
    ),
    "tome": Reduction(lambda s: tome_assignment(s.x, s.sizes, s.keep_rate), weights=size_weights),
    "random": Reduction(lambda s: random_assignment(s.x, s.keep_rate, stage=s.stage, seed=s.seed)),
    "bat": Reduction(
        lambda s: bat_assignment(s.x, s.importance, s.keep_rate, s.cluster_ratio, s.match_ratio),
        num_clusters=lambda budget: budget.clusters,
    ),
}


class ReducedTokens(NamedTuple):
    """Result of one stage.

    Attributes:
        tokens: (B, K, D) output tokens in the dtype of the input.
        sizes: (B, K) float32 number of patches that each of them stands for.
        assignment: (B, N) int64 output index of each input token, or -1.
    """

    tokens: Tensor
    sizes: Tensor
    assignment: Tensor


class StageCounts(NamedTuple):
    """What a stage makes of its tokens.

    Attributes:
        budget: the token budget; (N, 0, 0, N, 0) when the stage is the identity.
        num_outputs: tokens that leave the stage: K, plus the method's fused token if it has one.
        num_clusters: how many of the last output tokens are clusters.
    """

    budget: TokenBudget
    num_outputs: int
    num_clusters: int


def stage_counts(
    method: str, num_tokens: int, keep_rate: float, *, cluster_ratio: float, match_ratio: float
) -> StageCounts:
    """Counts tokens for one stage of a method; see `token_budget` for the arguments.

    Raises:
        ValueError: the method is unknown, or an argument is outside its range.
    """
    if method not in REDUCTIONS:
        raise ValueError(f"unknown reduction '{method}'; choose from {', '.join(REDUCTIONS)}")
    rate = 1.0 if method == "none" else keep_rate
    budget = token_budget(num_tokens, rate, cluster_ratio, match_ratio)
    if budget.kept >= num_tokens:
        return StageCounts(budget, num_tokens, 0)
    entry = REDUCTIONS[method]
    return StageCounts(budget, budget.kept + entry.num_fused, entry.num_clusters(budget))


def reduce_tokens(inputs: StageInputs, method: str) -> ReducedTokens:
    """Runs one stage: decide the groups without gradients, then merge with them.

    Args:
        inputs: the tokens and the stage's settings.
        method: a name in REDUCTIONS.

    Returns:
        The tokens that leave the stage; the input itself when the stage keeps everything.

    Raises:
        ValueError: the method is unknown, or a rate or ratio is outside its range.
    """
    counts = stage_counts(
        method,
        inputs.x.shape[1],
        inputs.keep_rate,
        cluster_ratio=inputs.cluster_ratio,
        match_ratio=inputs.match_ratio,
    )
    if counts.budget.kept >= inputs.x.shape[1]:
        return ReducedTokens(inputs.x, inputs.sizes, identity_assignment(inputs.x))
    entry = REDUCTIONS[method]
    decide = inputs._replace(
        x=inputs.x.detach().float(), importance=inputs.importance.detach().float()
    )
    assignment = entry.assign(decide)
    weights = entry.weights(inputs, assignment)
    num_groups = counts.num_outputs
    tokens = merge_tokens(inputs.x, weights, assignment, num_groups, normalize=entry.normalize)
    return ReducedTokens(tokens, group_sums(inputs.sizes, assignment, num_groups), assignment)
