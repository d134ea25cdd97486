"""The registered models: DeiT (Touvron et al., arXiv 2012.12877) with BAT's reduction.

They are timm's, passed through `make_reducing`, and take the keywords of both.
"""

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from .vit import REDUCTION_KEYWORDS, ReducingVisionTransformer, make_reducing

# `pretrained=True` loads DeiT's ImageNet-1k weights: BAT has no parameter of its own. Images are
# cropped for the evaluation as in DeiT's own code; timm's setting of 0.9 is another.
default_cfgs = generate_default_cfgs({
    f"bat_{name}.fb_in1k": get_pretrained_cfg(f"{name}.fb_in1k").to_dict() | {"crop_pct": 0.875}
    for name in ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
})  # fmt: skip


def _create_bat(variant: str, pretrained: bool, **kwargs) -> ReducingVisionTransformer:
    reduction = {name: kwargs.pop(name) for name in REDUCTION_KEYWORDS if name in kwargs}
    model = build_model_with_cfg(
        VisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **({"patch_size": 16, "depth": 12} | kwargs),
    )
    return make_reducing(model, **reduction, check=False)


@register_model
def bat_deit_tiny_patch16_224(pretrained: bool = False, **kwargs) -> ReducingVisionTransformer:
    """DeiT-Ti."""
    model_args = {"embed_dim": 192, "num_heads": 3} | kwargs
    return _create_bat("bat_deit_tiny_patch16_224", pretrained, **model_args)


@register_model
def bat_deit_small_patch16_224(pretrained: bool = False, **kwargs) -> ReducingVisionTransformer:
    """DeiT-S."""
    model_args = {"embed_dim": 384, "num_heads": 6} | kwargs
    return _create_bat("bat_deit_small_patch16_224", pretrained, **model_args)


@register_model
def bat_deit_base_patch16_224(pretrained: bool = False, **kwargs) -> ReducingVisionTransformer:
    """DeiT-B."""
    model_args = {"embed_dim": 768, "num_heads": 12} | kwargs
    return _create_bat("bat_deit_base_patch16_224", pretrained, **model_args)
