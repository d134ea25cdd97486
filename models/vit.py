"""A Vision Transformer of timm whose chosen blocks reduce their tokens.

Parameter names are timm's, so DeiT checkpoints load unchanged, both ways. A reducing block is
timm's block with the stage of `models/reduction.py` between its attention and its MLP; every other
block is timm's own.
"""

from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .clustering import class_token_importance
from .reduction import (
    MERGE_WEIGHTS,
    ReducedTokens,
    Stage,
    TokenBudget,
    check_fraction,
    get_reduction,
    reduce_tokens,
)

# Attention pooling is left out: timm counts on the patch grid in it, which is gone here.
GLOBAL_POOLS = ("token", "avg", "max", "avgmax", "")


class ImportanceAttention(Attention):
    """timm's attention with the class token's attention row computed beside the fused kernel.

    Adapted from timm (Apache-2.0), timm/layers/attention.py: Attention.forward. Modifications:
    the softmax row of token 0 is computed from the same projected queries and keys, O(L) beside the
    kernel's O(L^2); masks are left out.
    """

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention output (B, L, D) and importance (B, L) of the tokens x (B, L, D)."""
        batch, length, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, L, D / H) each
        q, k = self.q_norm(q), self.k_norm(k)
        importance = class_token_importance(q[:, :, :1], k, self.scale)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        x = self.norm(x.transpose(1, 2).reshape(batch, length, self.attn_dim))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x)), importance


class BATBlock(Block):
    """timm's block with a reduction stage between the attention residual and the MLP."""

    def __init__(
        self,
        *args,
        stage: int,
        num_prefix_tokens: int,
        reduction: str,
        keep_rate: float,
        cluster_ratio: float,
        match_ratio: float,
        merge_weights: str,
        reduction_seed: int,
        **kwargs,
    ) -> None:
        """Builds the block; arguments not listed are timm's, or `BATVisionTransformer`'s.

        Args:
            *args: timm's block arguments.
            stage: 0, 1, ...: which of the model's stages this block holds.
            num_prefix_tokens: class, distillation and register tokens, which are never reduced.
            **kwargs: timm's block arguments.
        """
        super().__init__(*args, **{**kwargs, "attn_layer": ImportanceAttention})
        self.stage = stage
        self.num_prefix_tokens = num_prefix_tokens
        self.reduction = reduction
        self.keep_rate = keep_rate
        self.cluster_ratio = cluster_ratio
        self.match_ratio = match_ratio
        self.merge_weights = merge_weights
        self.reduction_seed = reduction_seed

    @property
    def keep_rate(self) -> float:
        """Share of the patch tokens that leave the block, in (0, 1]."""
        numerator, denominator = self._keep_ratio
        return numerator / denominator

    @keep_rate.setter
    def keep_rate(self, value: float) -> None:
        # Exactly the float, as two integers: torch.compile takes a float that changes for a symbol,
        # with which one graph takes minutes, but integers of a module for constants.
        self._keep_ratio = float(value).as_integer_ratio()

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> ReducedTokens:
        """Runs the block and says where its tokens went.

        Args:
            x: (B, L, D) prefix tokens and N patch tokens.
            sizes: (B, N) number of patches that each patch token stands for; None: one each.

        Returns:
            What the stage gives, with the prefix tokens in front: tokens (B, prefix + K, D).
        """
        attended, importance = self.attn.attend(self.norm1(x))
        x = x + self.drop_path1(self.ls1(attended))
        reduced = self.reduce(x, importance, sizes)
        x = reduced.tokens  # (B, prefix + K, D)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return reduced._replace(tokens=x)

    def reduce(self, x: Tensor, importance: Tensor, sizes: Tensor | None) -> ReducedTokens:
        """The stage alone, between attention and MLP; as `forward`, with importance (B, L)."""
        prefix, patches = x.split([self.num_prefix_tokens, x.shape[1] - self.num_prefix_tokens], 1)
        if sizes is None:
            sizes = torch.ones_like(patches[..., 0], dtype=torch.float32)  # (B, N)
        reduced = reduce_tokens(
            Stage(
                x=patches,
                importance=importance[:, self.num_prefix_tokens :],
                sizes=sizes,
                index=self.stage,
                seed=self.reduction_seed,
            ),
            self.reduction,
            self.keep_rate,
            cluster_ratio=self.cluster_ratio,
            match_ratio=self.match_ratio,
            merge_weights=self.merge_weights,
        )
        return reduced._replace(tokens=torch.cat([prefix, reduced.tokens], dim=1))


class StageInfo(NamedTuple):
    """What one stage of a model does.

    Attributes:
        block: index of its block.
        num_tokens: patch tokens N that enter.
        keep_rate: the block's keep rate.
        budget: how the tokens that leave are spent.
        num_outputs: patch tokens that leave: K, or K + 1 with a fused token.
        num_clusters: how many of the last output tokens are clusters.
    """

    block: int
    num_tokens: int
    keep_rate: float
    budget: TokenBudget
    num_outputs: int
    num_clusters: int


class BATVisionTransformer(VisionTransformer):
    """timm's Vision Transformer whose blocks at `reduction_loc` reduce the patch tokens."""

    def __init__(
        self,
        *args,
        keep_rate: float | Sequence[float] = 0.7,
        reduction: str = "bat",
        reduction_loc: Sequence[int] = (3, 6, 9),
        cluster_ratio: float = 0.4,
        match_ratio: float = 0.1,
        merge_weights: str = "importance",
        reduction_seed: int = 0,
        depth: int = 12,
        **kwargs,
    ) -> None:
        """Builds the transformer.

        Args:
            *args: timm's VisionTransformer arguments.
            keep_rate: share of the patch tokens that leave a reducing block, in (0, 1]; one value,
                or one per reducing block.
            reduction: a name in REDUCTIONS.
            reduction_loc: indices of the reducing blocks.
            cluster_ratio: share of the kept tokens spent on clusters, in [0, 1].
            match_ratio: matched pairs per kept token that is not a cluster, in [0, 1].
            merge_weights: "importance" or "mean" (ablation).
            reduction_seed: seed of methods with a random choice.
            depth: number of blocks.
            **kwargs: timm's VisionTransformer arguments.

        Raises:
            ValueError: an argument is outside its range, or the model has no class token.
        """
        reduction_loc = tuple(sorted(reduction_loc))
        outside = [index for index in reduction_loc if not 0 <= index < depth]
        if outside or len(set(reduction_loc)) != len(reduction_loc):
            raise ValueError(
                f"reduction_loc must be different block indices in 0 .. {depth - 1}, "
                f"got {list(reduction_loc)}"
            )
        get_reduction(reduction)
        if not isinstance(reduction_seed, int):
            raise ValueError(f"reduction_seed must be an integer, got {reduction_seed!r}")
        check_fraction("cluster_ratio", cluster_ratio, zero=True)
        check_fraction("match_ratio", match_ratio, zero=True)
        if merge_weights not in MERGE_WEIGHTS:
            raise ValueError(f"merge_weights must be one of {MERGE_WEIGHTS}, got '{merge_weights}'")
        if not kwargs.get("class_token", True):
            raise ValueError("class_token must be True: its attention is the importance")
        if kwargs.get("global_pool", "token") not in GLOBAL_POOLS:
            raise ValueError(
                f"global_pool must be one of {GLOBAL_POOLS}, got '{kwargs['global_pool']}'"
            )
        keep_rates = expand_keep_rate(keep_rate, len(reduction_loc))
        block_index = count()

        def make_block(**block_kwargs) -> Block:
            index = next(block_index)
            if index not in reduction_loc:
                return Block(**block_kwargs)
            stage = reduction_loc.index(index)
            return BATBlock(
                stage=stage,
                num_prefix_tokens=1 + kwargs.get("reg_tokens", 0),
                reduction=reduction,
                keep_rate=keep_rates[stage],
                cluster_ratio=cluster_ratio,
                match_ratio=match_ratio,
                merge_weights=merge_weights,
                reduction_seed=reduction_seed,
                **block_kwargs,
            )

        super().__init__(*args, depth=depth, block_fn=make_block, **kwargs)
        self.reduction = reduction
        self.reduction_loc = reduction_loc
        self.cluster_ratio = cluster_ratio
        self.match_ratio = match_ratio
        self.merge_weights = merge_weights
        self.reduction_seed = reduction_seed

    @property
    def keep_rates(self) -> tuple[float, ...]:
        """The keep rate of each reducing block."""
        return tuple(self.blocks[index].keep_rate for index in self.reduction_loc)

    def reduction_settings(self) -> dict:
        """The keywords of `BATVisionTransformer` that make this reduction, none left out."""
        rates = self.keep_rates
        return {
            "keep_rate": rates[0] if len(set(rates)) == 1 else rates,
            "reduction": self.reduction,
            "reduction_loc": self.reduction_loc,
            "cluster_ratio": self.cluster_ratio,
            "match_ratio": self.match_ratio,
            "merge_weights": self.merge_weights,
            "reduction_seed": self.reduction_seed,
        }

    def set_keep_rate(self, keep_rate: float | Sequence[float]) -> None:
        """Changes the keep rate, of all reducing blocks or of each; bad values change nothing."""
        keep_rates = expand_keep_rate(keep_rate, len(self.reduction_loc))
        for index, value in zip(self.reduction_loc, keep_rates, strict=True):
            self.blocks[index].keep_rate = value

    def set_reduction(self, reduction: str) -> None:
        """Changes the method, a name in REDUCTIONS."""
        get_reduction(reduction)
        for index in self.reduction_loc:
            self.blocks[index].reduction = reduction
        self.reduction = reduction

    def stages(self) -> tuple[StageInfo, ...]:
        """Describes every stage, for images of the model's own size."""
        num_tokens = self.patch_embed.num_patches
        stages = []
        for index in self.reduction_loc:
            block = self.blocks[index]
            entry = get_reduction(block.reduction)
            budget = entry.budget(
                num_tokens, block.keep_rate, block.cluster_ratio, block.match_ratio
            )
            outputs = entry.num_outputs(budget)
            clusters = entry.num_clusters(budget)
            stages.append(StageInfo(index, num_tokens, block.keep_rate, budget, outputs, clusters))
            num_tokens = outputs
        return tuple(stages)

    def _run_blocks(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Embeds images x (B, 3, height, width), runs the blocks, and keeps the assignments."""
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        sizes = None
        assignments = []
        for block in self.blocks:
            run = (
                partial(checkpoint, block, use_reentrant=False)
                if self.grad_checkpointing
                else block
            )
            if isinstance(block, BATBlock):
                reduced = run(x, sizes)
                x, sizes = reduced.tokens, reduced.sizes
                assignments.append(reduced.assignment)
            else:
                x = run(x)
        return self.norm(x), assignments

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Images x (B, 3, height, width) to the last tokens (B, prefix + K, D), as in timm."""
        if attn_mask is not None or is_causal:
            raise ValueError("a reducing model takes no attention mask: its tokens change places")
        return self._run_blocks(x)[0]

    def forward_intermediates(self, *args, **kwargs) -> None:
        """Raises ValueError: the feature maps of timm's models do not exist in a reducing one."""
        raise ValueError(
            "a reducing model has no feature maps; forward_with_assignments says where tokens went"
        )

    def forward_with_assignments(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and where every token went.

        Args:
            x: (B, 3, height, width) normalised images.

        Returns:
            (B, num_classes) logits, and one (B, N_i) int64 assignment per reducing block: the
            output index of each patch token that entered it, or -1 if it was dropped.
        """
        x, assignments = self._run_blocks(x)
        return self.forward_head(x), assignments


def expand_keep_rate(keep_rate: float | Sequence[float], num_stages: int) -> tuple[float, ...]:
    """One keep rate per stage; ValueError for a value outside (0, 1] or a wrong number of them."""
    values = (keep_rate,) if isinstance(keep_rate, (int, float)) else tuple(keep_rate)
    for value in values:
        check_fraction("keep_rate", value, zero=False)
    if len(values) == 1:
        values = values * num_stages
    if len(values) != num_stages:
        raise ValueError(
            f"keep_rate needs 1 value or {num_stages} (one per reducing block), got {len(values)}"
        )
    return tuple(float(value) for value in values)
