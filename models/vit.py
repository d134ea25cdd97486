"""Any plain Vision Transformer of timm, made to reduce its tokens in place.

`make_reducing` keeps the model object, its modules and its parameters. Chosen blocks get a subclass
of their own class, which runs the stage of `models/reduction.py` between the attention residual and
the MLP; the model gets a subclass of its class, which carries sizes, assignments and rotary
embeddings from block to block. All other modules are timm's own.
"""

from collections.abc import Sequence

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
from .reduction import (
    MERGE_WEIGHTS,
    ReducedTokens,
    Stage,
    StageInfo,
    TokenBudget,
    check_fraction,
    get_reduction,
    heaviest_members,
    reduce_tokens,
)
from .trace import unmerge

IMPORTANCES = ("class", "received")
# The keywords of `make_reducing`, which the registered models take beside timm's.
REDUCTION_KEYWORDS = (
    "keep_rate", "reduction", "reduction_loc", "cluster_ratio", "match_ratio", "merge_weights",
    "reduction_seed", "importance",
)  # fmt: skip
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


def attend(
    attn: nn.Module, x: Tensor, *, rope: Tensor | None, importance: str
) -> tuple[Tensor, Tensor]:
    """One of timm's attentions, and beside its fused kernel the importance of every token.

    Adapted from timm (Apache-2.0): the forward methods of `Attention` and `AttentionRope`
    (timm/layers/attention.py) and of `EvaAttention` (timm/models/eva.py). Modifications: one
    function for all three; the importance comes from the same queries and keys; masks are left out.

    Args:
        attn: the module.
        x: (B, L, D) normalised tokens.
        rope: rotary embedding of the patch tokens, (N, D') or one per image; None for none.
        importance: one of IMPORTANCES.

    Returns:
        (B, L, D) what is added to the tokens, and (B, L) float32 importance.
    """
    q, k, v = project(attn, x)
    if rope is not None:
        prefix, half = attn.num_prefix_tokens, attn.rotate_half
        q, k = (
            torch.cat([y[:, :, :prefix], apply_rot_embed_cat(y[:, :, prefix:], rope, half=half)], 2)
            for y in (q, k)
        )
        q, k = q.type_as(v), k.type_as(v)
    if (groups := q.shape[1] // k.shape[1]) > 1:  # fewer heads of keys than of queries
        k, v = (y.repeat_interleave(groups, dim=1) for y in (k, v))
    row = find_importance(q, k, attn.scale, importance)
    dropout = attn.attn_drop.p if attn.training else 0.0
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    y = attn.norm(y.transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        y = y * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(y)), row


def find_importance(q: Tensor, k: Tensor, scale: float, importance: str) -> Tensor:
    """(B, L) float32 importance of every token, from queries and keys (B, H, L, D / H)."""
    if importance == "class":
        return class_token_importance(q[:, :, :1], k, scale)
    return attention_received(q, k, scale)


# Blocks -----------------------------------------------------------------------------------------


class ReductionSettings:
    """What a reducing model and its reducing blocks hold alike: keywords of `make_reducing`."""

    reduction: str
    cluster_ratio: float
    match_ratio: float
    merge_weights: str
    reduction_seed: int
    importance: str  # one of IMPORTANCES


class ReducingBlock(ReductionSettings):
    """What a reducing block is beside timm's: a stage between its attention and its MLP.

    Subclasses also inherit from timm's class, in whose arithmetic they have two halves:
    `attend(x, rope)` gives the tokens (B, L, D) after the attention residual and their importance
    (B, L), `feed_forward(x)` the tokens after the MLP and its residual.
    """

    stage: int  # 0, 1, ...: which of the model's stages this block holds
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
        entry = get_reduction(self.reduction)
        return entry.budget(num_tokens, self.keep_rate, self.cluster_ratio, self.match_ratio)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, sizes: Tensor | None = None
    ) -> ReducedTokens:
        """Runs the block and says where its tokens went.

        Args:
            x: (B, L, D) prefix tokens and N patch tokens.
            rope: rotary embedding of the patch tokens, or None.
            sizes: (B, N) number of patches that each patch token stands for; None: one each.

        Returns:
            What the stage gives, with the prefix tokens in front: tokens (B, prefix + K, D).
        """
        x, importance = self.attend(x, rope)
        reduced = self.reduce(x, importance, sizes)
        return reduced._replace(tokens=self.feed_forward(reduced.tokens))

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


class ReducingPreNormBlock(ReducingBlock, Block):
    def attend(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        y, row = attend(self.attn, self.norm1(x), rope=rope, importance=self.importance)
        return x + self.drop_path1(self.ls1(y)), row

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ReducingResPostBlock(ReducingBlock, ResPostBlock):
    def attend(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        y, row = attend(self.attn, x, rope=rope, importance=self.importance)
        return x + self.drop_path1(self.norm1(y)), row

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class ReducingEvaBlock(ReducingBlock, EvaBlock):
    def attend(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        y, row = attend(self.attn, self.norm1(x), rope=rope, importance=self.importance)
        return x + self.drop_path1(y if self.gamma_1 is None else self.gamma_1 * y), row

    def feed_forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm2(x))
        return x + self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)


class ReducingEvaBlockPostNorm(ReducingBlock, EvaBlockPostNorm):
    attend = ReducingResPostBlock.attend
    feed_forward = ReducingResPostBlock.feed_forward


class ReducingParallelThingsBlock(ReducingBlock, ParallelThingsBlock):
    def attend(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs, rows = [], []
        for branch in self.attns:
            y, row = attend(branch.attn, branch.norm(x), rope=rope, importance=self.importance)
            outputs.append(branch.drop_path(branch.ls(y)))
            rows.append(row)
        return x + torch.stack(outputs).sum(dim=0), torch.stack(rows).mean(dim=0)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + torch.stack([branch(x) for branch in self.ffns]).sum(dim=0)


class ReducingParallelScalingBlock(ReducingBlock, ParallelScalingBlock):
    """Attention and MLP stand side by side, so that the stage comes after both.

    timm's own forward runs the block; queries and keys are computed once more for the importance.
    """

    def attend(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        start, width = self.in_split[:2]
        rows = slice(start, start + 2 * width)  # of the queries and keys
        bias = None if self.in_proj.bias is None else self.in_proj.bias[rows]
        qk = F.linear(self.in_norm(x), self.in_proj.weight[rows], bias)
        q, k = qk.unflatten(2, (2, self.num_heads, self.head_dim)).unbind(2)
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)  # (B, H, L, D / H)
        row = find_importance(q, k, self.scale, self.importance)
        return ParallelScalingBlock.forward(self, x), row

    def feed_forward(self, x: Tensor) -> Tensor:
        return x


# Models -----------------------------------------------------------------------------------------


class ReducingTransformer(ReductionSettings):
    """What a reducing model is beside timm's; `make_reducing` makes it."""

    @property
    def reduction_loc(self) -> tuple[int, ...]:
        """Indices of the reducing blocks."""
        blocks = enumerate(self.blocks)
        return tuple(index for index, block in blocks if isinstance(block, ReducingBlock))

    @property
    def keep_rates(self) -> tuple[float, ...]:
        """The keep rate of each reducing block."""
        return tuple(self.blocks[index].keep_rate for index in self.reduction_loc)

    def reduction_settings(self) -> dict:
        """The keywords of `make_reducing` that make this reduction, none left out."""
        rates = self.keep_rates
        settings = {name: getattr(self, name) for name in REDUCTION_KEYWORDS[1:]}
        return {"keep_rate": rates[0] if len(set(rates)) == 1 else rates} | settings

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
            entry, budget = get_reduction(block.reduction), block.budget(num_tokens)
            outputs, clusters = entry.num_outputs(budget), entry.num_clusters(budget)
            stages.append(StageInfo(index, num_tokens, block.keep_rate, budget, outputs, clusters))
            num_tokens = outputs
        return tuple(stages)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, height, width) to tokens (B, L, D) and their rotary embedding, if any."""
        x, rope = self._pos_embed(self.patch_embed(x)), None
        if isinstance(self, Eva):
            x, rope = x
        else:
            x = self.patch_drop(x)
        return self.norm_pre(x), rope

    def run_blocks(
        self, x: Tensor, take: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None, list[Tensor], list[tuple[Tensor, int]]]:
        """Runs images (B, 3, height, width) through all blocks.

        Args:
            x: the images.
            take: indices of blocks whose tokens are kept.

        Returns:
            (B, prefix + K, D) last tokens, not normalised; (B, K) how many patches the patch tokens
            stand for, None: one each; one (B, N_i) assignment per reducing block; and, for `take`,
            tokens with the number of assignments before them.
        """
        x, rope = self.embed(x)
        is_mixed = rope is not None and getattr(self, "rope_mixed", False)  # one a block
        sizes, assignments, taken = None, [], []
        for index, block in enumerate(self.blocks):
            arguments = [x] if rope is None else [x, rope[index] if is_mixed else rope]
            if isinstance(block, ReducingBlock):
                arguments = [*arguments, None, sizes] if rope is None else [*arguments, sizes]
            if self.grad_checkpointing:
                result = checkpoint(block, *arguments, use_reentrant=False)
            else:
                result = block(*arguments)
            if isinstance(block, ReducingBlock):
                assignments.append(result.assignment)
                if not block.budget(result.assignment.shape[1]).keeps_all:
                    sizes = result.sizes
                    rope = rotate_as_heaviest(rope, result, is_mixed=is_mixed)
                result = result.tokens
            x = result
            if index in take:
                taken.append((x, len(assignments)))
        return x, sizes, assignments, taken

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Images x (B, 3, height, width) to the last tokens (B, prefix + K, D), as in timm."""
        _refuse_masks(attn_mask, is_causal)
        return self.norm(self.run_blocks(x)[0])

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
        return x if pre_logits else self.head(x)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Images x (B, 3, height, width) to logits (B, num_classes), as in timm."""
        _refuse_masks(attn_mask, is_causal)
        return self.forward_with_assignments(x)[0]

    def forward_with_assignments(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and where every token went.

        Args:
            x: (B, 3, height, width) normalised images.

        Returns:
            (B, num_classes) logits, and one (B, N_i) int64 assignment per reducing block: the
            output index of each patch token that entered it, or -1 if it was dropped.
        """
        x, sizes, assignments, _ = self.run_blocks(x)
        return self.forward_head(self.norm(x), sizes=sizes), assignments

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
        x, _, assignments, taken = self.run_blocks(x, take)
        maps, prefixes = [], []
        for tokens, num_stages in taken:
            tokens = self.norm(tokens) if norm else tokens
            prefixes.append(tokens[:, : self.num_prefix_tokens])
            features = unmerge(tokens[:, self.num_prefix_tokens :], assignments[:num_stages])
            if output_fmt == "NCHW":  # (B, N_0, D) -> (B, D, rows, columns)
                features = features.transpose(1, 2).unflatten(2, (rows, columns)).contiguous()
            maps.append(features)
        return_prefix_tokens = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result = {"image_intermediates": maps}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else result | {"image_features": self.norm(x)}
        maps = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps
        return maps if intermediates_only else (self.norm(x), maps)


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("a reducing model takes no attention mask: its tokens change places")


def rotate_as_heaviest(
    rope: Tensor | None, reduced: ReducedTokens, *, is_mixed: bool
) -> Tensor | None:
    """Rotary embeddings of merged tokens: each has that of the heaviest member of its group.

    Args:
        rope: (N, E), or per image (B, 1, N, E); mixed, one a block: (blocks, H, N, E), or per image
            (blocks, B, H, N, E); None for none.
        reduced: what a stage of these N tokens gave.
        is_mixed: whether there is one a block.

    Returns:
        (B, 1, K, E), or (blocks, B, H, K, E) if mixed.
    """
    if rope is None:
        return None
    member = heaviest_members(reduced.assignment, reduced.weights, reduced.sizes.shape[1])  # (B, K)
    batch, num_groups = member.shape
    if is_mixed:
        rope = (rope if rope.ndim == 5 else rope.unsqueeze(1)).expand(-1, batch, -1, -1, -1)
        index = member.view(1, batch, 1, num_groups, 1)
    else:
        rope = (rope if rope.ndim == 4 else rope[None, None]).expand(batch, -1, -1, -1)
        index = member.view(batch, 1, num_groups, 1)
    return rope.gather(-2, index.expand(*rope.shape[:-2], num_groups, rope.shape[-1]))


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
    reduction: str = "bat",
    reduction_loc: Sequence[int] | None = None,
    cluster_ratio: float = 0.4,
    match_ratio: float = 0.1,
    merge_weights: str = "importance",
    reduction_seed: int = 0,
    importance: str | None = None,
    check: bool = True,
) -> nn.Module:
    """Makes a plain Vision Transformer of timm reduce its tokens.

    Args:
        model: of timm's classes VisionTransformer, VisionTransformerDistilled or Eva; changed in
            place, its modules and parameters stay.
        keep_rate: share of the patch tokens that leave a reducing block, in (0, 1]; one value, or
            one per reducing block.
        reduction: a name in REDUCTIONS.
        reduction_loc: indices of the reducing blocks; None: L/4, L/2 and 3L/4 of L blocks.
        cluster_ratio: share of the kept tokens spent on clusters, in [0, 1].
        match_ratio: matched pairs per kept token that is not a cluster, in [0, 1].
        merge_weights: "importance" or "mean" (ablation).
        reduction_seed: seed of methods with a random choice.
        importance: "class": the class token's attention to each patch token; "received": the
            attention that it gets from all tokens; None: "class" where there is a class token.
        check: run one random image through the model before and after.

    Returns:
        The same object, now a `ReducingTransformer`.

    Raises:
        ValueError: the model is of another kind, or an argument is outside its range; the model is
            as it was.
    """
    check_convertible(model)
    if importance is None:
        importance = "received" if model.cls_token is None else "class"
    if importance not in IMPORTANCES:
        raise ValueError(f"importance must be one of {IMPORTANCES}, got '{importance}'")
    if importance == "class" and model.cls_token is None:
        raise ValueError("importance 'class' needs a class token, and this model has none")
    reduction_loc = check_locations(reduction_loc, len(model.blocks))
    check_blocks(model, reduction_loc)
    get_reduction(reduction)
    if not isinstance(reduction_seed, int):
        raise ValueError(f"reduction_seed must be an integer, got {reduction_seed!r}")
    check_fraction("cluster_ratio", cluster_ratio, zero=True)
    check_fraction("match_ratio", match_ratio, zero=True)
    if merge_weights not in MERGE_WEIGHTS:
        raise ValueError(f"merge_weights must be one of {MERGE_WEIGHTS}, got '{merge_weights}'")
    rates = expand_keep_rate(keep_rate, len(reduction_loc))
    keep_rates = dict(zip(reduction_loc, rates, strict=True))
    settings = {
        "reduction": reduction,
        "cluster_ratio": cluster_ratio,
        "match_ratio": match_ratio,
        "merge_weights": merge_weights,
        "reduction_seed": reduction_seed,
        "importance": importance,
    }
    convert(model, keep_rates, settings, check=check)
    return model


def timm_class(module: nn.Module) -> type[nn.Module]:
    """timm's class of a reducing model or block; any other module's own."""
    return TIMM_CLASSES.get(type(module), type(module))


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


def check_blocks(model: nn.Module, reduction_loc: Sequence[int]) -> None:
    """ValueError naming a reducing block or its attention whose arithmetic is not known."""
    for index in reduction_loc:
        block = model.blocks[index]
        if timm_class(block) not in BLOCKS:
            raise ValueError(f"block {index} is a {type(block).__name__}, which cannot reduce")
        attns = [branch.attn for branch in getattr(block, "attns", ())]
        attns += [block.attn] if hasattr(block, "attn") else []
        for attn in attns:
            if type(attn) not in ATTENTIONS:
                kind = type(attn).__name__
                raise ValueError(f"block {index} has a {kind}, whose importance is not known")


def convert(model: nn.Module, keep_rates: dict[int, float], settings: dict, *, check: bool) -> None:
    """Gives the model and its reducing blocks their classes; an error leaves them as they were.

    Args:
        model: a model that passed the checks, reducing already or not.
        keep_rates: keep rate by index of the reducing block, in rising order.
        settings: what the model and all its reducing blocks hold.
        check: as in `make_reducing`.
    """
    saved = [(module, type(module), dict(vars(module))) for module in (model, *model.blocks)]
    try:
        restore_timm(model)
        before = run_one_image(model) if check else None
        own = settings | {"num_prefix_tokens": model.num_prefix_tokens}
        for stage, (index, keep_rate) in enumerate(keep_rates.items()):
            block = model.blocks[index]
            block.__class__ = BLOCKS[type(block)]
            for name, value in (own | {"stage": stage, "keep_rate": keep_rate}).items():
                setattr(block, name, value)
        model.__class__ = MODELS[type(model)]
        for name, value in settings.items():
            setattr(model, name, value)
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
    stages = model.stages()
    if stages and num_tokens != stages[-1].num_outputs:
        raise ValueError(f"{num_tokens} patch tokens are left, not {stages[-1].num_outputs}")


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
