"""Where every patch went: the assignments of the stages, composed.

Letters: B batch, N_0 patches of the image, N tokens entering a stage, K tokens leaving it.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from .clustering import gather_tokens
from .reduction import StageInfo, group_sums


class PatchKind(IntEnum):
    """How the token that a patch sits in was made; the codes that `PatchTrace.kind` holds."""

    DROPPED = 0  # the patch sits in no token any more
    SINGLE = 1  # a token that stands for this patch alone
    PAIR = 2  # two or more patches, merged by matching alone, at one stage or several
    CLUSTER = 3  # two or more patches, merged by clustering alone, at one stage or several
    MIXED = 4  # both matching and clustering took part
    WAITING = 5  # the patch is unchanged and takes no part until a later stage (Evo-ViT)


class PatchTrace(NamedTuple):
    """All patches of a batch of images, after one stage."""

    group: Tensor  # (B, N_0) int64: the token that the patch sits in, 0 .. K-1; -1: none
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
        composed.append(follow(composed[-1], assignment, -1) if composed else assignment.clone())
    return composed


def unmerge(tokens: Tensor, assignments: Sequence[Tensor], *, waits: bool = False) -> Tensor:
    """Puts tokens back on the patches that they stand for.

    Args:
        tokens: (B, K, D) patch tokens after the last of the stages.
        assignments: as in `compose_assignments`; none: the tokens are the patches.
        waits: of a method whose tokens wait (Evo-ViT), which has put them back itself.

    Returns:
        (B, N_0, D) the token of each patch; 0 where the patch was dropped. Differentiable.
    """
    if waits or not assignments:
        return tokens
    group = compose_assignments(assignments)[-1]  # (B, N_0)
    features = gather_tokens(tokens, group.clamp(min=0))
    return torch.where((group >= 0).unsqueeze(-1), features, 0.0).to(tokens.dtype)


def trace_patches(assignments: Sequence[Tensor], stages: Sequence[StageInfo]) -> list[PatchTrace]:
    """Says for every patch and stage in which token it sits and what kind of token that is.

    An output token that one token entered keeps that token's kind. Where several entered, the
    place says how they are merged: by clustering in a stage's last `num_clusters` outputs, by
    matching in the others. Single patches and tokens of that kind become `CLUSTER` or `PAIR`
    accordingly; with a token of another kind among them they become `MIXED`.

    Args:
        assignments: one (B, N) int64 tensor per stage, as `forward_with_assignments` returns them.
        stages: `model.stages()`, of which `num_outputs`, `num_clusters` and `waits` are read.

    Returns:
        One trace per stage.
    """
    if any(stage.waits for stage in stages):
        return [_trace_waiting(assignment) for assignment in assignments]
    traces: list[PatchTrace] = []
    token_kind = None  # (B, N) PatchKind of each token entering the stage
    for group, assignment, stage in zip(
        compose_assignments(assignments), assignments, stages, strict=True
    ):
        if token_kind is None:
            token_kind = torch.full_like(assignment, PatchKind.SINGLE)
        token_size = group_sums(torch.ones_like(group), group, stage.num_outputs)  # (B, K)
        token_kind = _output_kinds(assignment, token_kind, stage)  # (B, N) -> (B, K)
        kind = follow(group, token_kind, int(PatchKind.DROPPED))
        traces.append(PatchTrace(group=group, kind=kind, size=follow(group, token_size, 0)))
    return traces


def _trace_waiting(assignment: Tensor) -> PatchTrace:
    """Every patch stands for itself, active or waiting."""
    kind = torch.where(assignment < 0, int(PatchKind.WAITING), int(PatchKind.SINGLE))
    return PatchTrace(assignment, kind, torch.ones_like(assignment))


def follow(index: Tensor, table: Tensor, missing: float) -> Tensor:
    """Looks up (B, N) indices in a (B, K) table; -1 becomes `missing`."""
    values = table.gather(1, index.clamp(min=0))  # (B, K) -> (B, N)
    return torch.where(index >= 0, values, missing)


def _output_kinds(assignment: Tensor, token_kind: Tensor, stage: StageInfo) -> Tensor:
    """(B, K) `PatchKind` of each output token of one stage, as `trace_patches` defines it.

    Args:
        assignment: (B, N) int64, the stage's own assignment.
        token_kind: (B, N) int64, the kinds of the tokens that enter.
        stage: the stage's counts.
    """
    num_outputs = stage.num_outputs
    is_clustered = assignment >= num_outputs - stage.num_clusters  # (B, N)
    made = torch.where(is_clustered, int(PatchKind.CLUSTER), int(PatchKind.PAIR))
    fits = (token_kind == PatchKind.SINGLE) | (token_kind == made)
    num_members = group_sums(torch.ones_like(assignment), assignment, num_outputs)  # (B, K)
    is_merged = follow(assignment, num_members, 0) > 1  # (B, N)
    kind = torch.where(is_merged, torch.where(fits, made, int(PatchKind.MIXED)), token_kind)

    slots = torch.where(assignment >= 0, assignment, num_outputs)
    output_kind = kind.new_full((assignment.shape[0], num_outputs + 1), PatchKind.DROPPED)
    return output_kind.scatter_reduce(1, slots, kind, "amax")[:, :num_outputs]  # MIXED is highest
