"""Token reduction as pure tensor functions: budgets, assignments and merging.

One stage turns N patch tokens into K. Every input token goes to at most one output token, so a
stage is an assignment (B, N) int64 (output index, or -1 for a dropped token) and its result is
``W @ x`` with a row-stochastic W (B, K, N) that has at most one non-zero entry per column. A method
is a function that returns an assignment, and one line of `REDUCTIONS`; merging, tracing and drawing
are shared.

Letters: B batch, H heads, N patch tokens entering a stage, K output tokens, A attentive tokens,
M inattentive tokens, C clusters, P pairs, D channels.

All arithmetic is float32, whatever the autocast type; all shapes follow from N and the keep rate,
never from the data; equal values are ordered by index.

Source: "Beyond Attentive Tokens: Incorporating Token Importance and Diversity for Efficient Vision
Transformers", CVPR 2023, arXiv 2211.11315; the baselines name theirs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .clustering import (
    density_peaks,
    descending_rank,
    gather_tokens,
    in_blocks,
    match_pairs,
    match_patches,
    matmul_float32,
)

# The values that settings of `ReductionSettings` may have.
CHOICES = {
    "merge_weights": ("importance", "mean", "size"),
    "features": ("tokens", "keys"),
    "proportional_attention": ("auto", "on", "off"),
    "evo_readout": ("class", "mean"),
    "importance": (None, "class", "received"),
}


# How many tokens a stage keeps, and how it spends them -------------------------------------------


class TokenBudget(NamedTuple):
    """How many tokens of a stage play which part; ``attentive - pairs + clusters == kept``.

    Attributes:
        kept: output tokens K.
        clusters: clusters C made of the inattentive tokens.
        pairs: attentive tokens P that are merged into a look-alike.
        attentive: attentive tokens A.
        inattentive: inattentive tokens M = N - A.
    """

    kept: int
    clusters: int
    pairs: int
    attentive: int
    inattentive: int

    @property
    def keeps_all(self) -> bool:
        """Whether the stage is the identity."""
        return self.kept == self.attentive + self.inattentive


def check_fraction(name: str, value: float, *, zero: bool) -> None:
    """Raises ValueError unless the value lies in [0, 1], or in (0, 1] when zero is not allowed."""
    if not (0 <= value <= 1) or (value == 0 and not zero):
        raise ValueError(f"{name} must be in {'[' if zero else '('}0, 1], got {value}")


def token_budget(
    num_tokens: int, keep_rate: float, cluster_ratio: float = 0.4, match_ratio: float = 0.1
) -> TokenBudget:
    """Splits the K tokens that a keep rate allows into unmerged, matched and clustered ones.

    Args:
        num_tokens: patch tokens N that enter the stage, at least 1.
        keep_rate: K / N, in (0, 1]; K is rounded up.
        cluster_ratio: share of K spent on clusters, in [0, 1]; 0 drops the inattentive tokens.
        match_ratio: pairs per token that is not a cluster, in [0, 1].

    Returns:
        The budget; (N, 0, 0, N, 0) when the stage keeps everything.

    Raises:
        ValueError: an argument is outside its range.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    check_fraction("keep_rate", keep_rate, zero=False)
    check_fraction("cluster_ratio", cluster_ratio, zero=True)
    check_fraction("match_ratio", match_ratio, zero=True)
    kept = max(1, math.ceil(keep_rate * num_tokens - 1e-9))
    if kept >= num_tokens:
        return plain_budget(num_tokens, num_tokens)
    clusters = 0
    if cluster_ratio > 0:
        clusters = min(max(1, _round_half_up(cluster_ratio * kept)), max(kept - 1, 1))
    plain = kept - clusters
    pairs = min(_round_half_up(match_ratio * plain), num_tokens - kept, plain)
    attentive = plain + pairs
    return TokenBudget(kept, clusters, pairs, attentive, num_tokens - attentive)


def plain_budget(num_tokens: int, kept: int) -> TokenBudget:
    """The budget of K kept tokens of N without clusters and pairs."""
    return TokenBudget(kept, 0, 0, kept, num_tokens - kept)


def _round_half_up(value: float) -> int:
    return math.floor(value + 0.5 + 1e-9)


# Merging -----------------------------------------------------------------------------------------


def group_matrix(values: Tensor, assignment: Tensor, groups: slice) -> Tensor:
    """Rows of the matrix that sums tokens over groups, each token times its value.

    Args:
        values: (B, N) one number per token.
        assignment: (B, N) int64 group of each token, or -1 for none.
        groups: which rows.

    Returns:
        (B, groups, N) the value of token n in the row of its group, 0 elsewhere.
    """
    batch, num_tokens = assignment.shape
    size = groups.stop - groups.start
    is_other = (assignment < groups.start) | (assignment >= groups.stop)
    row = torch.where(is_other, size, assignment - groups.start)  # the others: an extra row
    matrix = values.new_zeros(batch, size + 1, num_tokens)
    return matrix.scatter_(1, row.unsqueeze(1), values.unsqueeze(1))[:, :size]


def group_sums(values: Tensor, assignment: Tensor, num_groups: int) -> Tensor:
    """Sums one number per token over every group, always in the order of the tokens.

    Args:
        values: (B, N) numbers.
        assignment: (B, N) int64 group of each token in 0 .. K-1, or -1 for none.
        num_groups: groups K.

    Returns:
        (B, K) the sums; 0 for an empty group.
    """

    def sums(groups: slice) -> Tensor:
        return group_matrix(values, assignment, groups).sum(dim=-1)

    return in_blocks(sums, num_groups, values.shape[1])


def merge_tokens(
    x: Tensor, weights: Tensor, assignment: Tensor, num_groups: int, normalize: bool = True
) -> Tensor:
    """Turns every group into one token: the weighted mean (or sum) of its members.

    A matrix product with rows of W (B, K, N) instead of a scatter: deterministic on every device. A
    token alone in its group passes through bit for bit; dropped tokens contribute nothing.
    Gradients flow through x and the weights.

    Args:
        x: (B, N, D) tokens.
        weights: (B, N) non-negative weights; a group whose weights sum to 0 takes the plain mean.
        assignment: (B, N) int64 group of each token in 0 .. K-1, or -1 for a dropped token.
        num_groups: output tokens K.
        normalize: False gives the weighted sum, with no special case for a sum of 0.

    Returns:
        (B, K, D) output tokens in the dtype of x; an empty group is 0.
    """
    weights = weights.float()
    num_members = group_sums(torch.ones_like(weights), assignment, num_groups)  # (B, K)
    if normalize:
        weights = group_shares(weights, assignment, num_members)
    last = last_members(assignment, num_groups)
    lone = gather_tokens(x, last)  # (B, K, D) used only where the group has no other member
    if not normalize:
        lone = (lone * weights.gather(1, last).unsqueeze(-1)).to(x.dtype)
    is_lone, values = (num_members == 1).unsqueeze(-1), x.float()

    def merge(groups: slice) -> Tensor:
        matrix = group_matrix(weights, assignment, groups)  # (B, groups, N)
        merged = matmul_float32(matrix, values).to(x.dtype)  # (B, groups, D)
        return torch.where(is_lone[:, groups], lone[:, groups], merged)

    return in_blocks(merge, num_groups, x.shape[1])  # (B, K, D)


def group_shares(weights: Tensor, assignment: Tensor, num_members: Tensor) -> Tensor:
    """(B, N) weights divided by the sum of their group; equal shares where that sum is 0.

    `num_members` (B, K) counts the tokens of each group. A dropped token's share means nothing.
    """
    token_group = assignment.clamp(min=0)
    total = group_sums(weights, assignment, num_members.shape[1]).gather(1, token_group)  # (B, N)
    equal_share = 1 / num_members.gather(1, token_group).clamp(min=1)
    return torch.where(total == 0, equal_share, weights / torch.where(total == 0, 1.0, total))


def heaviest_members(assignment: Tensor, weights: Tensor, num_groups: int) -> Tensor:
    """(B, K) index of the member of each group with the greatest weight; ties: the lower index.

    Takes assignments and weights (B, N); no weight is negative.
    """

    def heaviest(groups: slice) -> Tensor:
        group = torch.arange(groups.start, groups.stop, device=assignment.device)
        is_member = assignment.unsqueeze(1) == group.view(1, -1, 1)  # (B, groups, N)
        return torch.where(is_member, weights.unsqueeze(1), -1.0).max(dim=-1).indices

    return in_blocks(heaviest, num_groups, assignment.shape[1])


def last_members(assignment: Tensor, num_groups: int) -> Tensor:
    """(B, K) index of a member of each group; of several, an arbitrary one."""
    position = torch.arange(assignment.shape[1], device=assignment.device).expand_as(assignment)
    slots = torch.where(assignment < 0, num_groups, assignment)  # dropped tokens: an extra slot
    members = assignment.new_zeros(assignment.shape[0], num_groups + 1)
    return members.scatter(1, slots, position)[:, :num_groups]


# Settings ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReductionSettings:
    """How a model reduces its tokens, beside where (`reduction_loc`) and to how many (`keep_rate`).

    The defaults are BAT's best off the shelf (log/settings_study). What is known of the paper is
    nearer to a cluster ratio of 0.4 and a match ratio of 0.1 without proportional attention.

    Attributes:
        reduction: the method, a name in REDUCTIONS.
        cluster_ratio: share of the kept tokens that BAT spends on clusters, in [0, 1].
        match_ratio: BAT's matched pairs per kept token that is not a cluster, in [0, 1].
        merge_weights: of tokens in a group, for methods without weights of their own: one of
            CHOICES.
        features: what clustering and matching compare, tokens or keys: the tokens, or the keys of
            the block's attention (mean over heads, before any rotation).
        density_neighbors: tokens that a density is the mean over, itself included; 0: all.
        proportional_attention: whether a key's logits get the logarithm of the number of patches
            that its token stands for, in all blocks after the first stage (ToMe, section 3); "auto"
            is the method's own.
        tome_r: tokens that each stage removes instead of 1 - keep_rate, ToMe's r, at most half of
            them; makes `tome` the published method; for `tome` and `ppt`.
        ppt_threshold: variance of the scores from which on PPT prunes an image's tokens.
        evo_readout: what Evo-ViT classifies: "class", the class token, as in DeiT; "mean", the mean
            of all patch tokens, and in training the class token too, by a second head.
        reduction_seed: random seed of methods with a random choice.
        importance: "class": the class token's attention to a patch token; "received": the attention
            that it gets from all tokens; None: "class" where there is a class token.
    """

    reduction: str = "bat"
    cluster_ratio: float = 0.0
    match_ratio: float = 0.5
    merge_weights: str = "importance"
    features: str = "tokens"
    density_neighbors: int = 5
    proportional_attention: str = "auto"
    tome_r: int | None = None
    ppt_threshold: float = 7e-5
    evo_readout: str = "class"
    reduction_seed: int = 0
    importance: str | None = None

    def __post_init__(self) -> None:
        method = get_reduction(self.reduction)
        check_fraction("cluster_ratio", self.cluster_ratio, zero=True)
        check_fraction("match_ratio", self.match_ratio, zero=True)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("density_neighbors", "reduction_seed"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(
                    f"{name} must be an integer, at least 0, got {getattr(self, name)!r}"
                )
        if self.tome_r is not None:
            if not method.takes_r:
                raise ValueError(f"tome_r is for tome and ppt, not for '{self.reduction}'")
            if type(self.tome_r) is not int or self.tome_r < 1:
                raise ValueError(f"tome_r must be an integer, at least 1, got {self.tome_r!r}")
        if not 0 <= self.ppt_threshold < math.inf:
            raise ValueError(f"ppt_threshold must be at least 0, got {self.ppt_threshold}")
        if self.evo_readout == "mean" and not method.waits:
            raise ValueError(f"evo_readout 'mean' is for evo, not for '{self.reduction}'")

    @property
    def method(self) -> "Reduction":
        """The registered method."""
        return get_reduction(self.reduction)

    @property
    def is_proportional(self) -> bool:
        """Whether attention is proportional to the patches that a token stands for."""
        if self.proportional_attention != "auto":
            return self.proportional_attention == "on"
        return self.method.is_proportional

    def budget(self, num_tokens: int, keep_rate: float) -> TokenBudget:
        """How a stage that this many tokens enter spends those that leave; rate 1 keeps all."""
        if not self.method.reduces or keep_rate == 1:
            return plain_budget(num_tokens, num_tokens)
        if self.tome_r is not None:
            return plain_budget(num_tokens, num_tokens - min(self.tome_r, num_tokens // 2))
        if self.method.trusted and not self.method.splits:
            return token_budget(num_tokens, keep_rate, 0, 0)
        return token_budget(num_tokens, keep_rate, self.cluster_ratio, self.match_ratio)


# Methods: assign(stage, budget) -> (B, N) --------------------------------------------------------


class Stage(NamedTuple):
    """What a method may look at when it assigns the tokens of one stage.

    Attributes:
        x: (B, N, D) float32 patch tokens after the attention residual.
        importance: (B, N) float32 class-token attention to each of them.
        sizes: (B, N) float32 number of patches that each of them stands for.
        settings: of the reduction.
        keys: (B, H, N, D / H) their keys in the block's attention, before any rotation, and
        values: (B, H, N, D / H) their values; None where there is no attention.
        index: 0, 1, ...: which of the model's stages this is.
        num_prefix_tokens: class, distillation and register tokens in front of them.
    """

    x: Tensor
    importance: Tensor
    sizes: Tensor
    settings: ReductionSettings
    keys: Tensor | None = None
    values: Tensor | None = None
    index: int = 0
    num_prefix_tokens: int = 1

    @property
    def mean_keys(self) -> Tensor:
        """(B, N, D / H) float32 keys, averaged over heads."""
        return self.keys.float().mean(dim=1)

    @property
    def features(self) -> Tensor:
        """(B, N, *) what clustering and matching compare."""
        return self.mean_keys if self.settings.features == "keys" else self.x

    @property
    def neighbors(self) -> int:
        """Tokens that a density is the mean over."""
        return self.settings.density_neighbors or self.x.shape[1]


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
    """`assign_bat` of tokens x (B, N, D) and their importance (B, N); see `token_budget`."""
    budget = token_budget(x.shape[1], keep_rate, cluster_ratio, match_ratio)
    if budget.keeps_all:
        return identity_assignment(x)
    importance, settings = importance.detach(), ReductionSettings()
    stage = Stage(x.detach(), importance, torch.ones_like(importance), settings=settings)
    return assign_bat(stage, budget)


def assign_bat(stage: Stage, budget: TokenBudget) -> Tensor:
    """BAT: keep the attentive tokens, match look-alikes, cluster the inattentive ones.

    Returns:
        (B, N) groups in 0 .. K-1, or -1 for dropped tokens (without clusters): first the attentive
        groups by the rank of the token that stays, then the clusters by score. Ties keep index
        order.
    """
    order = stage.importance.argsort(dim=-1, descending=True, stable=True)  # (B, N)
    attentive, inattentive = order.split([budget.attentive, budget.inattentive], dim=1)
    features = stage.features
    groups = match_pairs(gather_tokens(features, attentive), budget.pairs)  # (B, A)
    if budget.clusters > 0:
        tokens = gather_tokens(features, inattentive)  # (B, M, *)
        clusters = density_peaks(tokens, budget.clusters, stage.neighbors)
        clusters = clusters + (budget.kept - budget.clusters)
    else:
        clusters = torch.full_like(inattentive, -1)  # (B, M)
    groups = torch.cat([groups, clusters], dim=1)  # (B, N) in importance order
    return torch.empty_like(groups).scatter(1, order, groups)


def assign_topk(stage: Stage, budget: TokenBudget) -> Tensor:
    """(B, N) pruning: importance rank of the K most attended tokens, -1 for the rest."""
    rank = descending_rank(stage.importance)
    return rank.masked_fill(rank >= budget.kept, -1)


def assign_evit(stage: Stage, budget: TokenBudget) -> Tensor:
    """(B, N) EViT (Liang et al., ICLR 2022): the K most attended stay, group K fuses the rest."""
    return descending_rank(stage.importance).clamp(max=budget.kept)


def assign_dpcknn(stage: Stage, budget: TokenBudget) -> Tensor:
    """(B, N) DPC-KNN (Zeng et al., TCFormer, CVPR 2022): K clusters, by falling score."""
    return density_peaks(stage.features, budget.kept, stage.neighbors)


def assign_tome(stage: Stage, budget: TokenBudget) -> Tensor:
    """(B, N) ToMe (Bolya et al., ICLR 2023): bipartite matching over all tokens.

    With `tome_r` as published: on keys, in the published order of outputs. Without it a variant
    with the locations and budget of the other methods: on tokens, even patches into odd ones,
    outputs in the order of the tokens that stay.
    """
    if stage.settings.tome_r is not None:
        return _match_repeatedly(stage, budget.kept, stage.mean_keys, match_published(stage))
    return _match_repeatedly(stage, budget.kept, stage.features, match_pairs)


def match_published(stage: Stage) -> Callable[[Tensor, int], Tensor]:
    """ToMe's step; even places of the whole sequence, prefix tokens included, are sources."""
    return partial(match_patches, num_prefix_tokens=stage.num_prefix_tokens)


def _match_repeatedly(
    stage: Stage, kept: int, features: Tensor, match: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """(B, N) assignment by `match`, repeated on the groups' means (by size) till K are left.

    One step merges at most floor(N / 2) tokens.
    """
    sizes, assignment = stage.sizes, identity_assignment(features)
    while (num_tokens := features.shape[1]) > kept:
        step = match(features, min(num_tokens - kept, num_tokens // 2))  # (B, num_tokens)
        num_groups = max(kept, num_tokens - num_tokens // 2)
        assignment = step.gather(1, assignment)  # (B, N)
        features = merge_tokens(features, sizes, step, num_groups)  # (B, num_groups, *)
        sizes = group_sums(sizes, step, num_groups)
    return assignment


def assign_ppt(stage: Stage, budget: TokenBudget) -> Tensor:
    """(B, N) PPT (Wu et al., arXiv 2310.01812, section 3.3): prune or pool, by image and stage.

    A token's score is its importance times the norm of its value, divided by the sum of them. If
    the variance of the scores is at least `ppt_threshold`, the K tokens of highest score stay, in
    that order; otherwise N - K tokens are merged as in ToMe, on keys.
    """
    norms = stage.values.float().square().sum(dim=(1, 3)).sqrt()  # (B, N)
    scores = stage.importance * norms
    scores = scores / scores.sum(dim=1, keepdim=True)
    rank = descending_rank(scores)
    pruned = rank.masked_fill(rank >= budget.kept, -1)
    pooled = _match_repeatedly(stage, budget.kept, stage.mean_keys, match_published(stage))
    prunes = scores.var(dim=1, keepdim=True) >= stage.settings.ppt_threshold  # (B, 1)
    return torch.where(prunes, pruned, pooled)


def assign_random(stage: Stage, budget: TokenBudget) -> Tensor:
    """(B, N) control: K tokens stay by one permutation per (seed, stage, N), for every image.

    The permutation sorts a hash of the token index in 64-bit integer arithmetic, so it is the same
    on every device and is a constant of a compiled or exported graph.
    """
    batch, num_tokens, _ = stage.x.shape
    prime = 2_147_483_647  # 2^31 - 1: every product below stays under 2^62
    key = torch.arange(1, num_tokens + 1, device=stage.x.device)
    for constant in (stage.settings.reduction_seed, stage.index, num_tokens, 48_271, 69_621):
        factor = (constant + 16_807) % prime
        key = ((key * key) % prime + key * factor + factor) % prime
    rank = key.argsort(stable=True).argsort()  # (N,)
    return rank.masked_fill(rank >= budget.kept, -1).expand(batch, -1)


def fused_weights(stage: Stage, budget: TokenBudget, assignment: Tensor) -> Tensor:
    """(B, N) EViT's: 1 for a token that stays, its importance for a token of the fused one."""
    return torch.where(assignment < budget.kept, 1.0, stage.importance)


# Weights of the tokens in their groups: (stage, budget, assignment) -> (B, N).
WEIGHTS = {
    "importance": lambda stage, budget, assignment: stage.importance,
    "mean": lambda stage, budget, assignment: torch.ones_like(stage.importance),
    "size": lambda stage, budget, assignment: stage.sizes,
}


class Reduction(NamedTuple):
    """A method: how it assigns tokens to groups, and what a group becomes.

    Attributes:
        assign: stage and budget -> (B, N) int64 output index of each token, or -1; called without
            gradients, and only where tokens have to go.
        weights: stage, budget and assignment -> (B, N) weights of the tokens in their groups; None:
            what the setting `merge_weights` says.
        clusters: budget -> how many of the last output tokens are clusters.
        num_fused: output tokens beside the K of the budget.
        normalize: False: groups are weighted sums instead of means.
        splits: whether it spends its tokens on clusters and pairs, by the two ratios.
        reduces: False: every token is kept at any keep rate.
        is_proportional: whether `proportional_attention="auto"` is on.
        takes_r: whether the setting `tome_r` can replace the keep rate.
        waits: tokens that are not kept wait, for a later stage or the end; see `models.evo`.
        trusted: its assignments are not checked, as those of the built-in methods.
    """

    assign: Callable[[Stage, TokenBudget], Tensor]
    weights: Callable[[Stage, TokenBudget, Tensor], Tensor] | None = None
    clusters: Callable[[TokenBudget], int] = lambda budget: 0
    num_fused: int = 0
    normalize: bool = True
    splits: bool = False
    reduces: bool = True
    is_proportional: bool = False
    takes_r: bool = False
    waits: bool = False
    trusted: bool = False

    def num_outputs(self, budget: TokenBudget) -> int:
        """Tokens that leave a stage: K, plus the fused one."""
        return budget.kept + (0 if budget.keeps_all else self.num_fused)

    def num_clusters(self, budget: TokenBudget) -> int:
        """How many of the last output tokens are clusters."""
        return 0 if budget.keeps_all else self.clusters(budget)


REDUCTIONS: dict[str, Reduction] = {
    "none": Reduction(lambda stage, budget: identity_assignment(stage.x), reduces=False),
    "topk": Reduction(assign_topk),
    "evit": Reduction(
        assign_evit, fused_weights, clusters=lambda budget: 1, num_fused=1, normalize=False
    ),
    "dpcknn": Reduction(
        assign_dpcknn, WEIGHTS["mean"], clusters=lambda budget: budget.kept, is_proportional=True
    ),
    "tome": Reduction(assign_tome, WEIGHTS["size"], takes_r=True, is_proportional=True),
    "random": Reduction(assign_random),
    # Evo-ViT (Xu et al., AAAI 2022): all patches compete, by the score of `models.evo`.
    "evo": Reduction(assign_topk, waits=True),
    "ppt": Reduction(assign_ppt, WEIGHTS["size"], takes_r=True, is_proportional=True),
    "bat": Reduction(
        assign_bat, clusters=lambda budget: budget.clusters, splits=True, is_proportional=True
    ),
}
REDUCTIONS = {name: method._replace(trusted=True) for name, method in REDUCTIONS.items()}


def get_reduction(name: str) -> Reduction:
    """The registered method of that name; ValueError when there is none."""
    if name not in REDUCTIONS:
        raise ValueError(f"unknown reduction '{name}'; choose from {', '.join(REDUCTIONS)}")
    return REDUCTIONS[name]


class AssignmentError(ValueError):
    """A method of one's own gave no valid assignment."""

    is_bad_input = True


def check_assignment(method: str, assignment: Tensor, shape: torch.Size, num_groups: int) -> None:
    """Raises `AssignmentError` unless a method gave what it has to.

    While compiling or exporting, and on the meta device, there are no values to look at.

    Args:
        method: its name, for the message.
        assignment: what it gave.
        shape: (B, N) of the stage.
        num_groups: output tokens K.
    """
    problem = ""
    if not isinstance(assignment, Tensor) or assignment.dtype != torch.int64:
        problem = f"a {getattr(assignment, 'dtype', type(assignment).__name__)}"
    elif assignment.shape != shape:
        problem = f"of shape {tuple(assignment.shape)}"
    elif not (torch.compiler.is_compiling() or assignment.is_meta):
        wrong = assignment[(assignment < -1) | (assignment >= num_groups)].tolist()
        if wrong:
            problem = f"with an index {wrong[0]}"
        elif not group_sums(torch.ones_like(assignment), assignment, num_groups).all():
            problem = "with an empty group"
    if problem:
        raise AssignmentError(
            f"reduction '{method}' gave an assignment {problem}; it must be int64 (B, N) = "
            f"{tuple(shape)}: every group 0 .. {num_groups - 1} in every image, -1: dropped"
        )


# One stage ---------------------------------------------------------------------------------------


class StageInfo(NamedTuple):
    """What one stage of a model does.

    Attributes:
        block: index of its block.
        num_tokens: patch tokens N that enter.
        keep_rate: the block's keep rate.
        budget: how the tokens that leave are spent.
        num_outputs: patch tokens that leave: K, or K + 1 with a fused token.
        num_clusters: how many of the last output tokens are clusters.
        waits: tokens that do not leave wait; N counts all patches of the image.
    """

    block: int
    num_tokens: int
    keep_rate: float
    budget: TokenBudget
    num_outputs: int
    num_clusters: int
    waits: bool = False


class ReducedTokens(NamedTuple):
    """Result of one stage, or of a block without one (None: there is no such thing).

    Attributes:
        tokens: (B, K, D) output tokens in the dtype of the input.
        sizes: (B, K) float32 number of patches that each of them stands for.
        assignment: (B, N) int64 output index of each input token, or -1.
        importance: (B, N) float32 class-token attention to each input token.
        weights: (B, N) weight of each input token in its group, before normalisation.
    """

    tokens: Tensor | None
    sizes: Tensor | None = None
    assignment: Tensor | None = None
    importance: Tensor | None = None
    weights: Tensor | None = None


def assign_tokens(stage: Stage, keep_rate: float) -> tuple[Tensor, TokenBudget]:
    """Decides, without gradients, where the tokens of a stage go.

    Returns:
        (B, N) int64 output index of each token, or -1, and the budget that this spends.

    Raises:
        AssignmentError: a method of one's own gives no valid assignment.
    """
    settings, method = stage.settings, stage.settings.method
    budget = settings.budget(stage.x.shape[1], keep_rate)
    if budget.keeps_all:
        return identity_assignment(stage.x), budget
    with torch.no_grad():
        fixed = stage._replace(x=stage.x.float(), importance=stage.importance.float())
        assignment = method.assign(fixed, budget)
    if not method.trusted:
        shape, num_groups = stage.importance.shape, method.num_outputs(budget)
        check_assignment(settings.reduction, assignment, shape, num_groups)
    return assignment, budget


def reduce_tokens(stage: Stage, keep_rate: float) -> ReducedTokens:
    """Runs one stage: decide the groups without gradients, then merge with them.

    Args:
        stage: the tokens, in any float type, and what belongs to them.
        keep_rate: see `token_budget`.

    Returns:
        The tokens that leave the stage; the input itself when the stage keeps everything.

    Raises:
        ValueError: the method gives no assignment, or the rate is outside its range.
    """
    assignment, budget = assign_tokens(stage, keep_rate)
    method = stage.settings.method
    if budget.keeps_all:
        ones = torch.ones_like(stage.importance)
        return ReducedTokens(stage.x, stage.sizes, assignment, stage.importance, ones)
    weigh = method.weights or WEIGHTS[stage.settings.merge_weights]
    weights = weigh(stage, budget, assignment)
    num_groups = method.num_outputs(budget)
    tokens = merge_tokens(stage.x, weights, assignment, num_groups, method.normalize)
    sizes = group_sums(stage.sizes, assignment, num_groups)
    return ReducedTokens(tokens, sizes, assignment, stage.importance, weights)
