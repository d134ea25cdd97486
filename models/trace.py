"""Where every patch went: the assignments of the stages, composed.

Letters: B batch, N_0 patches of the image, N tokens entering a stage, K tokens leaving it.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from .reduction import group_sums
from .vit import StageInfo


class PatchKind(IntEnum):
    """What the token that a patch sits in is; the codes that `PatchTrace.kind` holds."""

    DROPPED = 0  # the patch sits in no token any more
    SINGLE = 1  # a token that stands for this patch alone
    PAIR = 2  # a token made by matching, of two or more patches
    CLUSTER = 3  # a token made by clustering, of two or more patches


class PatchTrace(NamedTuple):
    """All patches of a batch of images, after one stage."""

    group: Tensor  # (B, N_0) int64: the token that the patch sits in, 0 .. K-1; -1: dropped
    kind: Tensor  # (B, N_0) int64: `PatchKind` of that token, the same for all of its patches
    size: Tensor  # (B, N_0) int64: how many patches that token stands for; 0: dropped


def compose_assignments(assignments: Sequence[Tensor]) -> list[Tensor]:
    """Follows every patch through the stages: a1, a2[a1], a3[a2[a1]], ...

    Args:
        assignments: one (B, N) int64 tensor per stage, the output token of each input token of that
            stage, or -1 where it is dropped; the first stage's inputs are the patches.

    Returns:
        One (B, N_0) int64 tensor per stage, the token that each patch sits in after it; -1: dropped
        there or earlier.
    """
    composed: list[Tensor] = []
    for assignment in assignments:
        composed.append(_follow(composed[-1], assignment, -1) if composed else assignment.clone())
    return composed


def trace_patches(assignments: Sequence[Tensor], stages: Sequence[StageInfo]) -> list[PatchTrace]:
    """Says for every patch and stage in which token it sits and what kind of token that is.

    A stage's last `num_clusters` outputs are clusters: such a token is `CLUSTER` when it stands
    for several patches and `SINGLE` otherwise. Any other output is `PAIR` when several tokens
    entered it at this stage, and keeps the kind it came with when one did.

    Args:
        assignments: one (B, N) int64 tensor per stage, as `forward_with_assignments` returns them.
        stages: `model.stages()`, of which `num_outputs` and `num_clusters` are read.

    Returns:
        One trace per stage.
    """
    traces: list[PatchTrace] = []
    token_kind = None  # (B, N) PatchKind of each token entering the stage
    for group, assignment, stage in zip(
        compose_assignments(assignments), assignments, stages, strict=True
    ):
        if token_kind is None:
            token_kind = torch.full_like(assignment, PatchKind.SINGLE)
        token_size = group_sums(torch.ones_like(group), group, stage.num_outputs)  # (B, K)
        token_kind = _output_kinds(assignment, token_kind, token_size, stage)  # (B, N) -> (B, K)
        kind = _follow(group, token_kind, int(PatchKind.DROPPED))
        traces.append(PatchTrace(group=group, kind=kind, size=_follow(group, token_size, 0)))
    return traces


def _follow(index: Tensor, table: Tensor, missing: int) -> Tensor:
    """Looks up (B, N) indices in a (B, K) table; -1 becomes `missing`."""
    values = table.gather(1, index.clamp(min=0))  # (B, K) -> (B, N)
    return torch.where(index >= 0, values, missing)


def _output_kinds(
    assignment: Tensor, token_kind: Tensor, token_size: Tensor, stage: StageInfo
) -> Tensor:
    """(B, K) `PatchKind` of each output token of one stage.

    Args:
        assignment: (B, N) int64, the stage's own assignment.
        token_kind: (B, N) int64, the kinds of the tokens that enter.
        token_size: (B, K) int64, the patches that each output token stands for.
        stage: the stage's counts.
    """
    num_outputs = stage.num_outputs
    num_members = group_sums(torch.ones_like(assignment), assignment, num_outputs)  # (B, K)
    slots = torch.where(assignment >= 0, assignment, num_outputs)
    carried = token_kind.new_full((assignment.shape[0], num_outputs + 1), PatchKind.DROPPED)
    carried = carried.scatter_reduce(1, slots, token_kind, "amax")[:, :num_outputs]  # (B, K)
    kind = torch.where(num_members > 1, int(PatchKind.PAIR), carried)

    is_cluster = torch.arange(num_outputs, device=kind.device) >= num_outputs - stage.num_clusters
    cluster_kind = torch.where(token_size > 1, int(PatchKind.CLUSTER), int(PatchKind.SINGLE))
    cluster_kind = torch.where(token_size > 0, cluster_kind, int(PatchKind.DROPPED))
    return torch.where(is_cluster, cluster_kind, kind)
