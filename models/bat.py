"""The registered models: DeiT (Touvron et al., arXiv 2012.12877) with BAT's reduction.

All take the keywords of timm's VisionTransformer and those of `BATVisionTransformer`.
"""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn

from .vit import BATVisionTransformer


def _cfg(variant: str, file: str) -> dict:
    return {
        "url": f"https://dl.fbaipublicfiles.com/deit/{file}",
        "hf_hub_id": f"timm/{variant}.fb_in1k",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


# `pretrained=True` loads DeiT's ImageNet-1k weights: BAT has no parameter of its own.
_DEIT_FILES = {
    "deit_tiny_patch16_224": "deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small_patch16_224": "deit_small_patch16_224-cd65a155.pth",
    "deit_base_patch16_224": "deit_base_patch16_224-b5f2ef4d.pth",
}
default_cfgs = generate_default_cfgs(
    {f"bat_{name}.fb_in1k": _cfg(name, file) for name, file in _DEIT_FILES.items()}
)


def _create_bat(variant: str, pretrained: bool, **kwargs) -> BATVisionTransformer:
    return build_model_with_cfg(
        BATVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **({"patch_size": 16, "depth": 12} | kwargs),
    )


@register_model
def bat_deit_tiny_patch16_224(pretrained: bool = False, **kwargs) -> BATVisionTransformer:
    """DeiT-Ti."""
    model_args = {"embed_dim": 192, "num_heads": 3} | kwargs
    return _create_bat("bat_deit_tiny_patch16_224", pretrained, **model_args)


@register_model
def bat_deit_small_patch16_224(pretrained: bool = False, **kwargs) -> BATVisionTransformer:
    """DeiT-S."""
    model_args = {"embed_dim": 384, "num_heads": 6} | kwargs
    return _create_bat("bat_deit_small_patch16_224", pretrained, **model_args)


@register_model
def bat_deit_base_patch16_224(pretrained: bool = False, **kwargs) -> BATVisionTransformer:
    """DeiT-B."""
    model_args = {"embed_dim": 768, "num_heads": 12} | kwargs
    return _create_bat("bat_deit_base_patch16_224", pretrained, **model_args)
