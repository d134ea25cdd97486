"""Any plain Vision Transformer of timm, made to reduce its tokens in place.

`make_reducing` keeps the model object, its modules and its parameters. The blocks get a subclass of
their own class, which in chosen ones runs the stage of `models/reduction.py` between the attention
residual and the MLP; the model gets a subclass of its class, which carries sizes, assignments and
rotary embeddings from block to block. All other modules are timm's own.
"""

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    AttentionRope,
    PatchEmbed,
    apply_rot_embed_cat,
)
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .clustering import attention_received, class_token_importance
from .evo import TRADE_OFF, SlowFast
from .reduction import (
    ReducedTokens,
    ReductionSettings,
    Stage,
    StageInfo,
    TokenBudget,
    assign_tokens,
    check_fraction,
    heaviest_members,
    reduce_tokens,
)
from .trace import unmerge

# The keywords of `make_reducing`, which the registered models take beside timm's.
REDUCTION_KEYWORDS = ("keep_rate", "reduction_loc", *(f.name for f in fields(ReductionSettings)))
CHECK_TOLERANCE = 1e-5  # of the largest output, in float32

# Attention --------------------------------------------------------------------------------------


def project(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, L, D / H), keys and values of one of timm's attentions, not yet rotated."""
    if attn.qkv is None:
        parts = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
        q, k, v = (part.unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for part in parts)
    else:
        if getattr(attn, "q_bias", None) is None:
            qkv = attn.qkv(x)
        else:
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
            qkv = F.linear(x, attn.qkv.weight, bias)
        q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


class Attended(NamedTuple):
    """What an attention gives: beside its own output what a stage may look at."""

    y: Tensor  # (B, L, D) what is added to the tokens
    importance: Tensor  # (B, L) float32
    keys: Tensor  # (B, H, L, D / H) before any rotation
    values: Tensor  # (B, H, L, D / H)


def attend(
    attn: nn.Module, x: Tensor, *, rope: Tensor | None, importance: str, bias: Tensor | None
) -> Attended:
    """One of timm's attentions, and beside its fused kernel the importance of every token.

    Adapted from timm (Apache-2.0): the forward methods of `Attention` and `AttentionRope`
    (timm/layers/attention.py) and of `EvaAttention` (timm/models/eva.py). Modifications: one
    function for all three; the importance comes from the same queries and keys; the only mask is a
    number a key.

    Args:
        attn: the module.
        x: (B, L, D) normalised tokens.
        rope: rotary embedding of the patch tokens, (N, D') or one per image; None for none.
        importance: "class" or "received".
        bias: (B, L) float32 added to the logits of each key, or None.
    """
    q, keys, values = project(attn, x)
    k, v = keys, values
    if rope is not None:
        prefix, half = attn.num_prefix_tokens, attn.rotate_half
        q, k = (
            torch.cat([y[:, :, :prefix], apply_rot_embed_cat(y[:, :, prefix:], rope, half=half)], 2)
            for y in (q, k)
        )
        q, k = q.type_as(v), k.type_as(v)
    if (groups := q.shape[1] // k.shape[1]) > 1:  # fewer heads of keys than of queries
        k, v = (y.repeat_interleave(groups, dim=1) for y in (k, v))
    row = find_importance(q, k, attn.scale, importance, bias)
    dropout = attn.attn_drop.p if attn.training else 0.0
    mask = None if bias is None else as_mask(bias, q)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    y = attn.norm(y.transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        y = y * attn.gate(x).sigmoid()
    return Attended(attn.proj_drop(attn.proj(y)), row, keys, values)


def as_mask(bias: Tensor, like: Tensor) -> Tensor:
    """(B, 1, 1, L) the bias (B, L) of each key, as the fused kernels take it.

    An additive mask, measured against the bias in an extra channel of queries and keys: on a CPU
    the mask costs nothing and the channel a fifth of the attention, its kernel being slower for
    wider heads.
    """
    return bias[:, None, None].to(like.dtype)


def find_importance(
    q: Tensor, k: Tensor, scale: float, importance: str, bias: Tensor | None = None
) -> Tensor:
    """(B, L) float32 importance of every token, from queries and keys (B, H, L, D / H)."""
    if importance == "class":
        return class_token_importance(q[:, :, :1], k, scale, bias)
    return attention_received(q, k, scale, bias)


# Blocks -----------------------------------------------------------------------------------------


class ReducingBlock:
    """What a block of a reducing model is beside timm's: maybe a stage between attention and MLP.

    Subclasses also inherit from timm's class, in whose arithmetic they have two halves:
    `attend(x, rope, bias)` gives the tokens (B, L, D) after the attention residual in an
    `Attended`, `feed_forward(x)` the tokens after the MLP and its residual.
    """

    settings: ReductionSettings  # the model's
    stage: int | None  # 0, 1, ...: which of the model's stages this block holds; None: none
    num_prefix_tokens: int  # class, distillation and register tokens, which are never reduced

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

    def budget(self, num_tokens: int) -> TokenBudget:
        """How a stage that this many patch tokens enter spends those that leave."""
        return self.settings.budget(num_tokens, self.keep_rate)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, sizes: Tensor | None = None
    ) -> ReducedTokens:
        """Runs the block and says where its tokens went.

        Args:
            x: (B, L, D) prefix tokens and N patch tokens.
            rope: rotary embedding of the patch tokens, or None.
            sizes: (B, N) number of patches that each patch token stands for; None: one each.

        Returns:
            What the stage gives, with the prefix tokens in front: tokens (B, prefix + K, D). Where
            there is no stage the assignment is None, and so is what nothing asks for.
        """
        bias, waits = self.attention_bias(sizes), self.settings.method.waits
        if self.stage is None and not waits:
            arguments = (x,) if rope is None else (x, rope)
            mask = {} if bias is None else {"attn_mask": as_mask(bias, x)}
            return ReducedTokens(super().forward(*arguments, **mask))
        attended = self.attend(x, rope, bias)
        if waits:  # stages of such a method stand between blocks
            row = attended.importance[:, self.num_prefix_tokens :]
            return ReducedTokens(self.feed_forward(attended.y), importance=row)
        reduced = self.reduce(attended, sizes)
        return reduced._replace(tokens=self.feed_forward(reduced.tokens))

    def attention_bias(self, sizes: Tensor | None) -> Tensor | None:
        """(B, L) what is added to the logits of each key: log sizes, where that is asked for."""
        if sizes is None or not self.settings.is_proportional:
            return None
        return F.pad(sizes.log(), (self.num_prefix_tokens, 0))

    def reduce(self, attended: Attended, sizes: Tensor | None) -> ReducedTokens:
        """The stage alone, between attention and MLP; as `forward`."""
        num_prefix = self.num_prefix_tokens
        prefix, patches = attended.y[:, :num_prefix], attended.y[:, num_prefix:]
        if sizes is None:
            sizes = torch.ones_like(patches[..., 0], dtype=torch.float32)  # (B, N)
        stage = Stage(
            x=patches,
            importance=attended.importance[:, num_prefix:],
            sizes=sizes,
            settings=self.settings,
            keys=attended.keys[:, :, num_prefix:],
            values=attended.values[:, :, num_prefix:],
            index=self.stage,
            num_prefix_tokens=num_prefix,
        )
        reduced = reduce_tokens(stage, self.keep_rate)
        return reduced._replace(tokens=torch.cat([prefix, reduced.tokens], dim=1))


class ReducingPreNormBlock(ReducingBlock, Block):
    def attend(self, x: Tensor, rope: Tensor | None, bias: Tensor | None) -> Attended:
        importance = self.settings.importance
        out = attend(self.attn, self.norm1(x), rope=rope, importance=importance, bias=bias)
        return out._replace(y=x + self.drop_path1(self.ls1(out.y)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ReducingResPostBlock(ReducingBlock, ResPostBlock):
    def attend(self, x: Tensor, rope: Tensor | None, bias: Tensor | None) -> Attended:
        out = attend(self.attn, x, rope=rope, importance=self.settings.importance, bias=bias)
        return out._replace(y=x + self.drop_path1(self.norm1(out.y)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class ReducingEvaBlock(ReducingBlock, EvaBlock):
    def attend(self, x: Tensor, rope: Tensor | None, bias: Tensor | None) -> Attended:
        importance = self.settings.importance
        out = attend(self.attn, self.norm1(x), rope=rope, importance=importance, bias=bias)
        y = out.y if self.gamma_1 is None else self.gamma_1 * out.y
        return out._replace(y=x + self.drop_path1(y))

    def feed_forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm2(x))
        return x + self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)


class ReducingEvaBlockPostNorm(ReducingBlock, EvaBlockPostNorm):
    attend = ReducingResPostBlock.attend
    feed_forward = ReducingResPostBlock.feed_forward


class ReducingParallelThingsBlock(ReducingBlock, ParallelThingsBlock):
    """Its attentions count as one with all their heads."""

    def attend(self, x: Tensor, rope: Tensor | None, bias: Tensor | None) -> Attended:
        importance = self.settings.importance
        outs = [
            attend(branch.attn, branch.norm(x), rope=rope, importance=importance, bias=bias)
            for branch in self.attns
        ]
        branches = zip(self.attns, outs, strict=True)
        y = torch.stack([branch.drop_path(branch.ls(out.y)) for branch, out in branches])
        row = torch.stack([out.importance for out in outs]).mean(dim=0)
        keys, values = (torch.cat(heads, dim=1) for heads in list(zip(*outs, strict=True))[2:])
        return Attended(x + y.sum(dim=0), row, keys, values)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + torch.stack([branch(x) for branch in self.ffns]).sum(dim=0)


class ReducingParallelScalingBlock(ReducingBlock, ParallelScalingBlock):
    """Attention and MLP stand side by side, so that the stage comes after both.

    timm's own forward runs the block; queries, keys and values are computed once more.
    """

    def attend(self, x: Tensor, rope: Tensor | None, bias: Tensor | None) -> Attended:
        start, width = self.in_split[:2]
        rows = slice(start, start + 3 * width)  # of the queries, keys and values
        qkv_bias = None if self.in_proj.bias is None else self.in_proj.bias[rows]
        qkv = F.linear(self.in_norm(x), self.in_proj.weight[rows], qkv_bias)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, self.head_dim)).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))
        row = find_importance(q, k, self.scale, self.settings.importance, bias)
        mask = None if bias is None else as_mask(bias, x)
        return Attended(ParallelScalingBlock.forward(self, x, attn_mask=mask), row, k, v)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x


# Models -----------------------------------------------------------------------------------------


class LeadingTokens(NamedTuple):
    """Tokens that no stage has reduced, as they enter a block."""

    x: Tensor  # (B, prefix + N_0, D)
    rope: Tensor | None  # their rotary embedding, if any
    block: int = 0  # index of that block


class ReducingTransformer:
    """What a reducing model is beside timm's; `make_reducing` makes it."""

    settings: ReductionSettings
    layer_wise: bool = False  # Evo-ViT's warm-up: a stage before every block from the first one on

    @property
    def reduction(self) -> str:
        """The method, a name in REDUCTIONS."""
        return self.settings.reduction

    @property
    def reduction_loc(self) -> tuple[int, ...]:
        """Indices of the blocks with a stage."""
        return tuple(i for i, block in enumerate(self.blocks) if block.stage is not None)

    @property
    def keep_rates(self) -> tuple[float, ...]:
        """The keep rate of each stage."""
        return tuple(self.blocks[index].keep_rate for index in self.reduction_loc)

    def reduction_settings(self) -> dict:
        """The keywords of `make_reducing` that make this reduction, none left out."""
        rates = self.keep_rates
        rate = rates[0] if len(set(rates)) == 1 else rates
        return {"keep_rate": rate, "reduction_loc": self.reduction_loc} | vars(self.settings)

    def set_keep_rate(self, keep_rate: float | Sequence[float]) -> None:
        """Changes the keep rate, of all stages or of each; bad values change nothing."""
        keep_rates = expand_keep_rate(keep_rate, len(self.reduction_loc))
        for index, value in zip(self.reduction_loc, keep_rates, strict=True):
            self.blocks[index].keep_rate = value

    def set_reduction(self, reduction: str, **changes: object) -> None:
        """Changes the method, a name in REDUCTIONS, and other settings of `ReductionSettings`.

        The others stay, but those that only the method of before takes, and proportional attention
        that was switched on for it: EViT's sum, for one, collapses under it.
        """
        settings = vars(self.settings)
        if reduction != self.reduction:
            settings = settings | {"tome_r": None, "evo_readout": "class"}
            if settings["proportional_attention"] == "on":
                settings["proportional_attention"] = "auto"
        where = {"reduction_loc": self.reduction_loc, "check": False}
        settings = settings | {"reduction": reduction} | changes
        make_reducing(self, self.keep_rates, **where, **settings)

    def stages(self) -> tuple[StageInfo, ...]:
        """Describes every stage, for images of the model's own size."""
        num_tokens, method = self.patch_embed.num_patches, self.settings.method
        stages = []
        for index in self.reduction_loc:
            block = self.blocks[index]
            budget = block.budget(num_tokens)
            outputs, clusters = method.num_outputs(budget), method.num_clusters(budget)
            counts = {"budget": budget, "num_outputs": outputs, "num_clusters": clusters}
            place = {"block": index, "num_tokens": num_tokens, "keep_rate": block.keep_rate}
            stages.append(StageInfo(**place, **counts, waits=method.waits))
            num_tokens = num_tokens if method.waits else outputs
        return tuple(stages)

    def embed(self, x: Tensor) -> LeadingTokens:
        """Images (B, 3, height, width) to the tokens that enter the first block."""
        x, rope = self._pos_embed(self.patch_embed(x)), None
        if isinstance(self, Eva):
            x, rope = x
        else:
            x = self.patch_drop(x)
        return LeadingTokens(self.norm_pre(x), rope)

    @property
    def num_leading_blocks(self) -> int:
        """How many blocks no setting of the reduction changes: those before the first stage."""
        first = min(self.reduction_loc, default=len(self.blocks))
        return max(0, first - self.settings.method.waits)

    def run_leading_blocks(self, x: Tensor) -> LeadingTokens:
        """Images through those blocks; what follows is `forward_with_assignments` of the result."""
        tokens, num_blocks = self.embed(x), self.num_leading_blocks
        x, rope = tokens.x, tokens.rope
        is_mixed = rope is not None and getattr(self, "rope_mixed", False)
        for index in range(num_blocks):
            x = self.blocks[index](x, rope[index] if is_mixed else rope).tokens
        return LeadingTokens(x, rope, num_blocks)

    def run_blocks(
        self, x: Tensor | LeadingTokens, take: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None, list[ReducedTokens], list[tuple[Tensor, int]]]:
        """Runs images (B, 3, height, width) through all blocks.

        Args:
            x: the images, or what the first blocks made of them.
            take: indices of blocks whose tokens are kept.

        Returns:
            (B, prefix + K, D) last tokens, not normalised; (B, K) how many patches the patch tokens
            stand for, None: one each; what each stage did, without its tokens; and, for `take`,
            tokens with the number of stages before them.
        """
        x, rope, first = x if isinstance(x, LeadingTokens) else self.embed(x)
        grid_rope, is_mixed = rope, rope is not None and getattr(self, "rope_mixed", False)
        prefix, locations = self.num_prefix_tokens, self.reduction_loc
        waiting = SlowFast.start(x[:, prefix:]) if self.settings.method.waits else None
        sizes, stages, taken = None, [], []
        for index, block in enumerate(self.blocks[first:], first):
            if waiting is not None and (index in locations or (self.layer_wise and stages)):
                x, waiting, stage = self.select(x, waiting, index)
                rope = gather_rope(grid_rope, waiting.active, is_mixed=is_mixed)
                stages += [stage] * (index in locations)
            arguments = x, rope[index] if is_mixed else rope, sizes
            if self.grad_checkpointing:
                result = checkpoint(block, *arguments, use_reentrant=False)
            else:
                result = block(*arguments)
            x = result.tokens
            if waiting is not None:
                trade_off = TRADE_OFF if stages else 1.0
                waiting = waiting.update_score(result.importance, trade_off=trade_off)
            elif result.assignment is not None:
                stages.append(result._replace(tokens=None))
                if not block.budget(result.assignment.shape[1]).keeps_all:
                    sizes = result.sizes
                    if rope is not None:
                        kept = sizes.shape[1]
                        member = heaviest_members(result.assignment, result.weights, kept)
                        rope = gather_rope(rope, member, is_mixed=is_mixed)
            if index in take:
                taken.append((self.write_back(x, waiting), len(stages)))
        return self.write_back(x, waiting), sizes, stages, taken

    def select(
        self, x: Tensor, waiting: SlowFast, index: int
    ) -> tuple[Tensor, SlowFast, ReducedTokens]:
        """Evo-ViT's stage before a block: other patches of the image become active.

        Args:
            x: (B, prefix + K, D) prefix tokens and active patches.
            waiting: all patches.
            index: of the block; in the layer-wise warm-up the stage before it counts.

        Returns:
            The prefix tokens and the patches that are active now, all patches, and what the stage
            did: its (B, N_0) assignment is the place of each patch among the active ones, or -1
            where it waits, its importance their score.
        """
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        block = self.blocks[max(location for location in self.reduction_loc if location <= index)]
        sizes = torch.ones_like(waiting.score)
        stage = Stage(waiting.grid, waiting.score, sizes, self.settings, index=block.stage)
        assignment, budget = assign_tokens(stage, block.keep_rate)
        waiting, patches = waiting.select(patches, assignment, budget.kept)
        done = ReducedTokens(None, sizes[:, : budget.kept], assignment, stage.importance, sizes)
        return torch.cat([prefix, patches], dim=1), waiting, done

    def write_back(self, x: Tensor, waiting: SlowFast | None) -> Tensor:
        """(B, prefix + N_0, D) all patches, from the active ones in x (B, prefix + K, D)."""
        if waiting is None:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        return torch.cat([prefix, waiting.write_back(patches)], dim=1)

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Images x (B, 3, height, width) to the last tokens (B, prefix + K, D), as in timm."""
        _refuse_masks(attn_mask, is_causal)
        return self.class_readout[0](self.run_blocks(x)[0])

    def pool(self, x: Tensor, pool_type: str | None = None, sizes: Tensor | None = None) -> Tensor:
        """timm's pooling, in which a token counts as often as the patches it stands for.

        Args:
            x: (B, prefix + K, D) normalised tokens.
            pool_type: instead of the model's own.
            sizes: (B, K) patches that the patch tokens stand for; None: one each.
        """
        name = self.global_pool if pool_type is None else pool_type
        attends = self.attn_pool is not None
        if sizes is None or not (attends or name in ("avg", "avgmax")):
            return super().pool(x, pool_type)
        # timm's Eva attends to the prefix tokens as well.
        with_prefix = attends if isinstance(self, Eva) else self.pool_include_prefix
        if with_prefix:
            sizes = F.pad(sizes, (self.num_prefix_tokens, 0), value=1.0)  # (B, prefix + K)
        else:
            x = x[:, self.num_prefix_tokens :]
        if attends:
            return self.attn_pool(x, attn_mask=sizes.log()[:, None, None].type_as(x))
        shares = (sizes / sizes.sum(dim=1, keepdim=True)).type_as(x)
        mean = (x * shares.unsqueeze(-1)).sum(dim=1)  # (B, D)
        return mean if name == "avg" else (x.amax(dim=1) + mean) / 2

    def forward_head(
        self, x: Tensor, pre_logits: bool = False, sizes: Tensor | None = None
    ) -> Tensor:
        """Logits of normalised tokens (B, prefix + K, D); `sizes` (B, K) as in `pool`."""
        x = self.head_drop(self.fc_norm(self.pool(x, sizes=sizes)))
        return x if pre_logits else self.class_readout[1](x)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Images x (B, 3, height, width) to logits (B, num_classes), as in timm."""
        _refuse_masks(attn_mask, is_causal)
        return self.forward_with_assignments(x)[0]

    def forward_with_assignments(self, x: Tensor | LeadingTokens) -> tuple[Tensor, list[Tensor]]:
        """Logits, and where every token went.

        Args:
            x: (B, 3, height, width) normalised images, or what `run_leading_blocks` made of them.

        Returns:
            (B, num_classes) logits, and one (B, N_i) int64 assignment per reducing block: the
            output index of each patch token that entered it, or -1 if it was dropped.
        """
        logits, stages = self.forward_with_stages(x)
        return logits, [stage.assignment for stage in stages]

    def forward_with_stages(self, x: Tensor | LeadingTokens) -> tuple[Tensor, list[ReducedTokens]]:
        """As `forward_with_assignments`, with all that each stage did but its tokens."""
        x, sizes, stages, _ = self.run_blocks(x)
        if self.settings.evo_readout == "mean":
            return self.read_mean(x), stages
        return self.forward_head(self.class_readout[0](x), sizes=sizes), stages

    @property
    def class_readout(self) -> tuple[nn.Module, nn.Module]:
        """Normalisation and head of timm's readout; with Evo-ViT's second head that is it."""
        if hasattr(self, "head_cls"):
            return self.norm_cls, self.head_cls
        return self.norm, self.head

    def read_mean(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Evo-ViT's readout of the last tokens (B, prefix + N_0, D), not normalised.

        Returns:
            (B, num_classes) logits of the mean patch; in training also those of the class token.
        """
        average = self.norm(x[:, self.num_prefix_tokens :].mean(dim=1))
        logits = self.head(self.head_drop(average))
        if not self.training:
            return logits
        return logits, self.forward_head(self.norm_cls(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> list | tuple[Tensor, list] | dict:
        """timm's feature maps, on the full grid of patches: see `models.trace.unmerge`.

        Args:
            x: (B, 3, height, width) normalised images.
            indices: blocks whose output to return: the last so many, these, or (None) all.
            return_prefix_tokens: pairs of a map and the prefix tokens (B, prefix, D) instead,
                where there are any.
            norm: apply the model's last normalisation.
            stop_early: without effect, all blocks run.
            output_fmt: "NCHW", maps (B, D, rows, columns), or "NLC", (B, N_0, D).
            intermediates_only: leave out the last tokens.
            output_dict: timm's dictionary instead of a tuple or list.
            attn_mask: refused.
            is_causal: refused.

        Returns:
            The last tokens (B, prefix + K, D), normalised, and the maps; or the maps alone.
        """
        _refuse_masks(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got '{output_fmt}'")
        take, _ = feature_take_indices(len(self.blocks), indices)
        rows, columns = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        x, _, stages, taken = self.run_blocks(x, take)
        assignments = [stage.assignment for stage in stages]
        normalize, maps, prefixes = self.class_readout[0], [], []
        for tokens, num_stages in taken:
            tokens = normalize(tokens) if norm else tokens
            prefixes.append(tokens[:, : self.num_prefix_tokens])
            patches = tokens[:, self.num_prefix_tokens :]
            waits = self.settings.method.waits
            features = unmerge(patches, assignments[:num_stages], waits=waits)
            if output_fmt == "NCHW":  # (B, N_0, D) -> (B, D, rows, columns)
                features = features.transpose(1, 2).unflatten(2, (rows, columns)).contiguous()
            maps.append(features)
        return_prefix_tokens = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result = {"image_intermediates": maps}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else result | {"image_features": normalize(x)}
        maps = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps
        return maps if intermediates_only else (normalize(x), maps)


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("a reducing model takes no attention mask: its tokens change places")


def gather_rope(rope: Tensor | None, token_idx: Tensor, *, is_mixed: bool) -> Tensor | None:
    """Rotary embeddings of some tokens of each image.

    Args:
        rope: (N, E), or per image (B, 1, N, E); mixed, one a block: (blocks, H, N, E), or per image
            (blocks, B, H, N, E); None for none.
        token_idx: (B, K) int64 indices into the N tokens.
        is_mixed: whether there is one a block.

    Returns:
        (B, 1, K, E), or (blocks, B, H, K, E) if mixed.
    """
    if rope is None:
        return None
    batch, num_tokens = token_idx.shape
    if is_mixed:
        rope = (rope if rope.ndim == 5 else rope.unsqueeze(1)).expand(-1, batch, -1, -1, -1)
        index = token_idx.view(1, batch, 1, num_tokens, 1)
    else:
        rope = (rope if rope.ndim == 4 else rope[None, None]).expand(batch, -1, -1, -1)
        index = token_idx.view(batch, 1, num_tokens, 1)
    return rope.gather(-2, index.expand(*rope.shape[:-2], num_tokens, rope.shape[-1]))


class ReducingVisionTransformer(ReducingTransformer, VisionTransformer):
    """timm's Vision Transformer, reducing."""


class ReducingVisionTransformerDistilled(ReducingTransformer, VisionTransformerDistilled):
    """timm's DeiT with a distillation token, reducing."""

    def forward_head(
        self, x: Tensor, pre_logits: bool = False, sizes: Tensor | None = None
    ) -> Tensor:
        """Both heads' logits: their mean, or a pair in distilled training."""
        return VisionTransformerDistilled.forward_head(self, x, pre_logits)


class ReducingEva(ReducingTransformer, Eva):
    """timm's EVA and its other rotary models, reducing."""


MODELS = {
    VisionTransformer: ReducingVisionTransformer,
    VisionTransformerDistilled: ReducingVisionTransformerDistilled,
    Eva: ReducingEva,
}
BLOCKS = {
    Block: ReducingPreNormBlock,
    ResPostBlock: ReducingResPostBlock,
    EvaBlock: ReducingEvaBlock,
    EvaBlockPostNorm: ReducingEvaBlockPostNorm,
    ParallelThingsBlock: ReducingParallelThingsBlock,
    ParallelScalingBlock: ReducingParallelScalingBlock,
}
ATTENTIONS = (Attention, AttentionRope, EvaAttention)
TIMM_CLASSES = {ours: theirs for table in (MODELS, BLOCKS) for theirs, ours in table.items()}


# Converting -------------------------------------------------------------------------------------


def make_reducing(
    model: nn.Module,
    keep_rate: float | Sequence[float] = 0.7,
    *,
    reduction_loc: Sequence[int] | None = None,
    check: bool = True,
    **settings: object,
) -> nn.Module:
    """Makes a plain Vision Transformer of timm reduce its tokens.

    Args:
        model: of timm's classes VisionTransformer, VisionTransformerDistilled or Eva; changed in
            place, its modules and parameters stay. `evo_readout="mean"` adds Evo-ViT's second head,
            a copy of the first, which from then on reads the class token.
        keep_rate: share of the patch tokens that leave a reducing block, in (0, 1]; one value, or
            one per reducing block.
        reduction_loc: indices of the reducing blocks; None: L/4, L/2 and 3L/4 of L blocks, and with
            ToMe's own settings all. Evo-ViT's stages stand before these blocks, not inside.
        check: run one random image through the model before and after.
        **settings: `reduction="bat"` and the other fields of `models.reduction.ReductionSettings`.

    Returns:
        The same object, now a `ReducingTransformer`.

    Raises:
        ValueError: the model is of another kind, or an argument is outside its range; the model is
            as it was.
        TypeError: there is no such setting.
    """
    check_convertible(model)
    chosen = ReductionSettings(**settings)
    has_class_token = model.cls_token is not None
    if chosen.importance is None:
        chosen = replace(chosen, importance="class" if has_class_token else "received")
    if chosen.importance == "class" and not has_class_token:
        raise ValueError("importance 'class' needs a class token, and this model has none")
    if chosen.evo_readout == "mean" and not (
        timm_class(model) is VisionTransformer
        and model.global_pool == "token"
        and model.num_classes > 0
    ):
        raise ValueError(
            "evo_readout 'mean' needs a VisionTransformer whose head reads the class token"
        )
    if reduction_loc is None and chosen.tome_r is not None and chosen.reduction == "tome":
        reduction_loc = range(len(model.blocks))
    reduction_loc = check_locations(reduction_loc, len(model.blocks))
    if chosen.method.waits and 0 in reduction_loc:
        raise ValueError("a stage of evo needs the attention of a block before it, not block 0")
    check_blocks(model)
    rates = expand_keep_rate(keep_rate, len(reduction_loc))
    convert(model, dict(zip(reduction_loc, rates, strict=True)), chosen, check=check)
    if chosen.evo_readout == "mean" and not hasattr(model, "head_cls"):
        model.norm_cls, model.head_cls = copy.deepcopy(model.norm), copy.deepcopy(model.head)
    return model


def timm_class(module: nn.Module) -> type[nn.Module]:
    """timm's class of a reducing model or block; any other module's own."""
    return TIMM_CLASSES.get(type(module), type(module))


def drop_second_head(model: nn.Module) -> None:
    """Leaves of Evo-ViT's two heads the one that timm knows, that of the class token."""
    if hasattr(model, "head_cls"):
        model.norm, model.head = model.norm_cls, model.head_cls
        del model.norm_cls, model.head_cls


def restore_timm(model: nn.Module) -> None:
    """Gives a reducing model and its blocks their timm classes back; others stay as they are."""
    for module in (model, *model.blocks):
        module.__class__ = timm_class(module)


def check_convertible(model: nn.Module) -> None:
    """ValueError naming what of the model cannot be made reducing."""
    kind = timm_class(model).__name__
    if timm_class(model) not in MODELS:
        names = ", ".join(known.__name__ for known in MODELS)
        raise ValueError(f"a {kind} cannot be made reducing; timm's {names} can")
    if type(model.patch_embed) is not PatchEmbed:
        embed = type(model.patch_embed).__name__
        raise ValueError(f"a {kind} with a {embed} has no grid of plain patches (PatchEmbed)")
    if model.attn_pool is not None and (
        type(model.attn_pool) is not AttentionPoolLatent or model.attn_pool.pos_embed is not None
    ):
        pool = type(model.attn_pool).__name__
        raise ValueError(f"the pooling {pool} counts on the whole patch grid")


def check_locations(reduction_loc: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """The reducing blocks in rising order, or by default L/4, L/2 and 3L/4; ValueError."""
    if reduction_loc is None:
        return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
    reduction_loc = tuple(sorted(reduction_loc))
    outside = [index for index in reduction_loc if index not in range(depth)]
    if outside or len(set(reduction_loc)) != len(reduction_loc):
        raise ValueError(
            f"reduction_loc must be different block indices in 0 .. {depth - 1}, "
            f"got {list(reduction_loc)}"
        )
    return reduction_loc


def check_blocks(model: nn.Module) -> None:
    """ValueError naming a block or its attention whose arithmetic is not known."""
    for index, block in enumerate(model.blocks):
        if timm_class(block) not in BLOCKS:
            raise ValueError(f"block {index} is a {type(block).__name__}, which cannot reduce")
        attns = [branch.attn for branch in getattr(block, "attns", ())]
        attns += [block.attn] if hasattr(block, "attn") else []
        for attn in attns:
            if type(attn) not in ATTENTIONS:
                kind = type(attn).__name__
                raise ValueError(f"block {index} has a {kind}, whose importance is not known")


def convert(
    model: nn.Module, keep_rates: dict[int, float], settings: ReductionSettings, *, check: bool
) -> None:
    """Gives the model and its blocks their classes; an error leaves them as they were.

    Args:
        model: a model that passed the checks, reducing already or not.
        keep_rates: keep rate by index of the reducing block, in rising order.
        settings: what the model and all its blocks hold.
        check: as in `make_reducing`.
    """
    saved = [(module, type(module), dict(vars(module))) for module in (model, *model.blocks)]
    try:
        restore_timm(model)
        before = run_one_image(model) if check else None
        stages = {index: stage for stage, index in enumerate(keep_rates)}
        for index, block in enumerate(model.blocks):
            block.__class__ = BLOCKS[type(block)]
            block.settings, block.num_prefix_tokens = settings, model.num_prefix_tokens
            block.stage, block.keep_rate = stages.get(index), keep_rates.get(index, 1.0)
        model.__class__, model.settings = MODELS[type(model)], settings
        if before is not None:
            check_conversion(model, before)
    except BaseException:
        for module, kind, attributes in saved:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
        raise


@torch.no_grad()
def run_one_image(model: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Tokens (1, L, D) and outputs of one random image in evaluation mode; None on "meta"."""
    weight = model.patch_embed.proj.weight
    if weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    shape = (1, weight.shape[1], *model.patch_embed.img_size)
    image = torch.randn(shape, generator=generator, device="cpu")
    modes = [(module, module.training) for module in model.modules()]
    try:
        tokens = model.eval().forward_features(image.to(weight))
        return tokens.float(), model.forward_head(tokens).float()
    finally:
        for module, mode in modes:
            module.training = mode


def check_conversion(model: ReducingTransformer, before: tuple[Tensor, Tensor]) -> None:
    """Compares keep rate 1 with what `run_one_image` gave before, and counts the tokens left.

    Raises:
        ValueError: they differ, or the number of tokens is not that of `stages`.
    """
    keep_rates = model.keep_rates
    model.set_keep_rate(1.0)
    dense = run_one_image(model)
    model.set_keep_rate(keep_rates)
    eps = torch.finfo(model.patch_embed.proj.weight.dtype).eps
    tolerance = CHECK_TOLERANCE * eps / torch.finfo(torch.float32).eps
    for expected, result in zip(before, dense, strict=True):
        error = (result - expected).abs().max()
        if not error <= tolerance * expected.abs().max().clamp(min=1):
            raise ValueError(
                f"a {timm_class(model).__name__} computes something else with stages that keep "
                f"everything: it differs by {error:.2g}"
            )
    num_tokens = run_one_image(model)[0].shape[1] - model.num_prefix_tokens
    expected = num_tokens
    for stage in model.stages():
        expected = stage.num_tokens if stage.waits else stage.num_outputs
    if num_tokens != expected:
        raise ValueError(f"{num_tokens} patch tokens are left, not {expected}")


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
