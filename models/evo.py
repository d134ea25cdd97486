"""Evo-ViT's slow-fast tokens (Xu et al., AAAI 2022, arXiv 2108.01390): nothing is dropped for good.

Before a stage all patches compete and the K of highest score become active; the others wait
unchanged and compete again at the next stage. As in the released code for DeiT, waiting tokens are
kept as they are: the paper's representative token, which would update them, is left out there.

Letters: B batch, N_0 patches of the image, K active ones, D channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .clustering import gather_tokens
from .reduction import last_members

TRADE_OFF = 0.5  # weight of a block's attention in the score, after the first stage


class SlowFast(NamedTuple):
    """The patches of a batch of images, of which some are active."""

    grid: Tensor  # (B, N_0, D) every patch as it was when it was last written back
    active: Tensor  # (B, K) int64 index of the active ones, without gradients
    score: Tensor  # (B, N_0) float32, without gradients

    @classmethod
    def start(cls, patches: Tensor) -> "SlowFast":
        """All patches (B, N_0, D) are active, without a score."""
        active = torch.arange(patches.shape[1], device=patches.device)
        score = torch.zeros_like(patches[..., 0], dtype=torch.float32)
        return cls(patches, active.expand(patches.shape[0], -1), score)

    def write_back(self, patches: Tensor) -> Tensor:
        """(B, N_0, D) the grid with the active patches (B, K, D) in their places."""
        place = self.active.unsqueeze(-1).expand_as(patches)
        return self.grid.to(patches.dtype).scatter(1, place, patches)

    def select(self, patches: Tensor, assignment: Tensor, kept: int) -> tuple["SlowFast", Tensor]:
        """Writes the active patches back and takes others.

        Args:
            patches: (B, K, D) the patches that have been active.
            assignment: (B, N_0) place of each patch among the `kept` active ones, or -1.
            kept: how many become active.

        Returns:
            The new state, and the (B, kept, D) patches that are active now.
        """
        grid = self.write_back(patches)
        active = last_members(assignment, kept)
        return SlowFast(grid, active, self.score), gather_tokens(grid, active)

    def update_score(self, row: Tensor, *, trade_off: float) -> "SlowFast":
        """Mixes a block's class-token attention (B, K) into the scores of the active patches.

        The mean over heads stands for the published sum: only the order counts.
        """
        before = self.score.gather(1, self.active)
        mixed = (1 - trade_off) * before + trade_off * row.detach().float()
        return self._replace(score=self.score.scatter(1, self.active, mixed))
