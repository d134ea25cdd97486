"""What happened to every patch of an image: stage by stage, and in which token it ended.

Letters: B batch, S stages, N_0 patches of the image, N tokens entering a stage, K leaving it.
"""

import csv
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from images import BadImageError, load_image
from models import REDUCTIONS, BATVisionTransformer
from models.bat import BATBlock
from models.grouping import group_sums
from models.reduction import ReducedTokens, StageInputs
from models.trace import PatchKind, trace_patches
from utils import logger


class StageRecord(NamedTuple):
    """What one stage did to a batch.

    Attributes:
        importance: (B, N) float32 class-token attention to the patch tokens that entered.
        share: (B, N) float64 weight of each of them in its output token; 0 where it was dropped.
        assignment: (B, N) int64 output token of each, or -1.
    """

    importance: Tensor
    share: Tensor
    assignment: Tensor


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


def stage_importance(block: BATBlock, x: Tensor) -> Tensor:
    """(B, N) class-token attention to the patch tokens of a block's input x (B, prefix + N, D).

    A block does not hand its attention out, so this row is computed once more, in the same way.
    """
    return block.attn.attend(block.norm1(x)).importance[:, block.num_prefix_tokens :]


@contextmanager
def record_stages(model: BATVisionTransformer) -> Iterator[list[StageRecord]]:
    """Gives a list to which every forward pass inside appends one record a reducing block."""
    records = []

    def note(block: BATBlock, inputs: tuple, output: ReducedTokens) -> None:
        x, sizes = inputs
        patches = x[:, block.num_prefix_tokens :]
        importance = stage_importance(block, x)
        sizes = torch.ones_like(importance) if sizes is None else sizes
        # The weights follow from importance, sizes and counts; the tokens give their number only.
        stage = StageInputs(
            patches,
            importance,
            sizes,
            block.keep_rate,
            block.cluster_ratio,
            block.match_ratio,
            block.merge_weights,
            block.stage,
            block.reduction_seed,
        )
        weights = REDUCTIONS[block.reduction].weights(stage, output.assignment)
        share = group_shares(weights, output.assignment, output.sizes.shape[1])
        records.append(StageRecord(importance, share, output.assignment))

    blocks = [block for block in model.blocks if isinstance(block, BATBlock)]
    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


class PatchHistory(NamedTuple):
    """Every patch of a batch, after every stage; all on the CPU.

    Attributes:
        kind: (B, S, N_0) int64 `PatchKind` of the token that the patch sits in after the stage.
        group: (B, S, N_0) int64 index of that token; -1: dropped.
        importance: (B, S, N_0) float64 class-token attention, in the stage's block, to the token
            that the patch sat in before; NaN: dropped earlier.
        weight: (B, S, N_0) float64 share of that earlier token in the token it went into; NaN:
            dropped here or earlier.
        lost_at: (B, N_0) int64 first stage, from 1, after which no token stands for the patch
            alone; S + 1: it still has its own.
        final_token: (B, N_0) int64 `group` of the last stage.
        final_weight: (B, N_0) float64 product of the weights: with what share the patch is in its
            final token; the shares of a final token sum to 1; NaN: dropped.
    """

    kind: Tensor
    group: Tensor
    importance: Tensor
    weight: Tensor
    lost_at: Tensor
    final_token: Tensor
    final_weight: Tensor


@torch.no_grad()
def trace_batch(model: BATVisionTransformer, images: Tensor) -> PatchHistory:
    """Follows the patches of normalised images (B, 3, H, W) through the model.

    The weights are those with which the method merges. EViT's fused token is a sum with weights
    that do not add up to 1; its shares are the importances divided by their sum.
    """
    with record_stages(model) as records:
        model(images)
    records = [StageRecord(*(part.cpu() for part in record)) for record in records]
    traces = trace_patches([record.assignment for record in records], model.stages())
    num_patches = records[0].assignment.shape[1] if records else model.patch_embed.num_patches
    before = torch.arange(num_patches).expand(len(images), -1)  # (B, N_0) token of each patch
    final_weight = torch.ones(before.shape, dtype=torch.float64)
    importance, weight = [], []
    for record, trace in zip(records, traces, strict=True):
        importance.append(_look_up(record.importance.double(), before))
        weight.append(_look_up(record.share, before).masked_fill(trace.group < 0, torch.nan))
        final_weight = final_weight * weight[-1]
        before = trace.group
    kind = _stack([trace.kind for trace in traces], before)
    return PatchHistory(
        kind,
        _stack([trace.group for trace in traces], before),
        _stack(importance, final_weight),
        _stack(weight, final_weight),
        1 + (kind == PatchKind.SINGLE).sum(dim=1),  # a token shared once is never single again
        before,
        final_weight,
    )


def _look_up(values: Tensor, token_idx: Tensor) -> Tensor:
    """Values (B, N) of the tokens token_idx (B, N_0); NaN where that is -1."""
    return values.gather(1, token_idx.clamp(min=0)).masked_fill(token_idx < 0, torch.nan)


def _stack(stages: Sequence[Tensor], like: Tensor) -> Tensor:
    """S tensors (B, N_0) -> (B, S, N_0), for S = 0 too."""
    return torch.stack(stages, dim=1) if stages else like.new_empty(len(like), 0, like.shape[1])


def csv_header(num_stages: int) -> list[str]:
    """Column names of `csv_rows`."""
    parts = ("kind", "group", "importance", "weight")
    stages = [f"stage{stage}_{part}" for stage in range(1, num_stages + 1) for part in parts]
    return ["image", "row", "column", *stages, "lost_at", "final_token", "final_weight"]


def csv_rows(names: Sequence[str], history: PatchHistory, num_columns: int) -> Iterable[list]:
    """One row a patch; what a dropped patch does not have is an empty cell.

    Args:
        names: of the batch's images.
        history: of the batch.
        num_columns: patches in a row of the image.
    """
    num_stages = history.kind.shape[1]
    arrays = PatchHistory(*(part.numpy() for part in history))
    for image, name in enumerate(names):
        for patch in range(arrays.lost_at.shape[1]):
            row = [name, *divmod(patch, num_columns)]
            for stage in range(num_stages):
                at = image, stage, patch
                row.append(PatchKind(arrays.kind[at]).name.lower())
                row += [_cell(arrays.group[at]), _cell(arrays.importance[at])]
                row.append(_cell(arrays.weight[at]))
            lost_at = int(arrays.lost_at[image, patch])
            row.append(lost_at if lost_at <= num_stages else "")
            row.append(_cell(arrays.final_token[image, patch]))
            row.append(_cell(arrays.final_weight[image, patch]))
            yield row


def _cell(value: np.generic) -> float | int | str:
    """A plain number; empty for -1 and NaN, which stand for a dropped patch."""
    return "" if value == -1 or np.isnan(value) else value.item()


class PatchMeans:
    """Means over images of importance and depth, patch by patch."""

    def __init__(self) -> None:
        """Starts without images."""
        self.num_images = 0
        self._importance = self._present = self._lost_at = 0.0

    def add(self, history: PatchHistory) -> None:
        """Counts a batch."""
        self.num_images += len(history.lost_at)
        self._importance = self._importance + history.importance.nansum(dim=0)
        self._present = self._present + (~history.importance.isnan()).sum(dim=0)
        self._lost_at = self._lost_at + history.lost_at.sum(dim=0).double()

    def importance(self) -> np.ndarray:
        """(S, N_0) mean over the images in which the patch was still in a token; NaN: in none."""
        return (self._importance / self._present).numpy()

    def lost_at(self) -> np.ndarray:
        """(N_0,) mean of the stage at which a patch lost its own token; S + 1 stands for never."""
        return (self._lost_at / self.num_images).numpy()


def follow_files(
    model: BATVisionTransformer,
    files: Sequence[Path],
    names: Sequence[str],
    transform: Callable[[Image.Image], Tensor],
    csv_path: Path,
    *,
    batch_size: int,
) -> PatchMeans:
    """Writes what happened to every patch of every image; unreadable files are named and left out.

    Args:
        model: in evaluation mode.
        files: the images.
        names: what the table calls them.
        transform: from an image to the model's input.
        csv_path: table to make or replace once all images are done, if any could be read.
        batch_size: images at a time.

    Returns:
        The means over the images that could be read.
    """
    device = model.head.weight.device
    means = PatchMeans()
    partial = csv_path.with_name(csv_path.name + ".partial")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(csv_header(len(model.reduction_loc)))
        for start in range(0, len(files), batch_size):
            images = {}
            stop = min(start + batch_size, len(files))
            for name, path in zip(names[start:stop], files[start:stop], strict=True):
                try:
                    images[name] = transform(load_image(str(path)))
                except BadImageError as problem:
                    print(problem, file=sys.stderr)
            if images:
                history = trace_batch(model, torch.stack(list(images.values())).to(device))
                means.add(history)
                columns = model.patch_embed.grid_size[1]
                writer.writerows(csv_rows(list(images), history, columns))
            logger.info(f"followed {stop} of {len(files)} images")
    if means.num_images:
        os.replace(partial, csv_path)
    else:
        partial.unlink()
    return means
