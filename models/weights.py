"""What the weights of a plain Vision Transformer show: its settings, and timm's names for them."""

from collections.abc import Mapping
from math import isqrt

import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from .reduction import ReductionSettings
from .vit import REDUCTION_KEYWORDS

# Keywords of timm.create_model that name the weights of a model, which a checkpoint has itself.
WEIGHT_SOURCES = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
)  # fmt: skip
# Evo-ViT's lists of modules, and what they are in timm's blocks.
EVO_GROUPS = {"projs": "attn.proj", "norms": "norm1"}
# What those weights are: the published preset.
EVO_SETTINGS = {
    "reduction": "evo", "keep_rate": 0.5, "reduction_loc": (4, 8), "evo_readout": "mean",
}  # fmt: skip
# By convention these have 16 heads, and all others a head for 64 channels.
WIDTHS_OF_16_HEADS = (1152, 1280, 1408, 1664)


def shown_settings(weights: Mapping[str, Tensor]) -> dict:
    """Keywords of timm's VisionTransformer beside its defaults; {} for another model's weights.

    Read are the layouts of timm (DeiT, DeiT-III, DINOv2 with and without registers and their like)
    and of facebook's DeiT-III and DINOv2.
    """
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    names, block = shapes.keys(), "blocks.0."
    kernel = shapes.get("patch_embed.proj.weight", ())
    if len(kernel) != 4 or f"{block}attn.qkv.weight" not in names:
        return {}
    width, in_chans, *patch = kernel
    hidden = shapes.get(f"{block}mlp.fc1.weight", (4 * width,))[0]
    ratios = hidden / width, (hidden + 0.5) / width  # timm rounds the product down
    head_width = width // 16 if width in WIDTHS_OF_16_HEADS else 64
    head_width = shapes.get(f"{block}attn.q_norm.weight", (head_width,))[0]
    num_registers = shapes.get("reg_token", shapes.get("register_tokens", (1, 0)))[1]
    has_layer_scale = not names.isdisjoint({f"{block}ls1.gamma", f"{block}gamma_1"})
    # A square of patches has positions, and beside it all other tokens, or all but the registers,
    # or none: only DeiT-III (which has LayerScale) and models with registers have it so. DeiT's 25
    # are 4 x 6 patches and the class token.
    length = shapes.get("pos_embed", (1, -1))[1]
    num_prefix = len({"cls_token", "dist_token"} & names)
    counts = (0,) if has_layer_scale or num_registers else ()
    counts += (num_prefix, num_prefix + num_registers)
    placed = next((n for n in counts if isqrt(max(0, length - n)) ** 2 == length - n), length)
    side = isqrt(max(0, length - placed))
    settings = (
        ("embed_dim", width, True),
        ("depth", len({name.split(".")[1] for name in names if name.startswith("blocks.")}), True),
        ("num_heads", width // head_width, width % head_width == 0),
        ("patch_size", patch[0] if patch[0] == patch[1] else tuple(patch), True),
        ("img_size", (side * patch[0], side * patch[1]), side > 0),
        ("mlp_ratio", max(ratios, key=lambda r: int(width * r) == hidden), hidden != 4 * width),
        ("init_values", 1e-5, has_layer_scale),
        ("no_embed_class", True, placed == 0 or "register_tokens" in names),
        ("reg_tokens", num_registers, num_registers > 0),
        ("qkv_bias", False, f"{block}attn.qkv.bias" not in names),
        ("proj_bias", False, f"{block}attn.proj.bias" not in names),
        ("qk_norm", True, f"{block}attn.q_norm.weight" in names),
        ("scale_attn_norm", True, f"{block}attn.norm.weight" in names),
        ("scale_mlp_norm", True, f"{block}mlp.norm.weight" in names),
        ("pre_norm", True, "norm_pre.weight" in names),
        ("class_token", False, "cls_token" not in names),
        ("global_pool", "avg", "fc_norm.weight" in names),
        ("in_chans", in_chans, in_chans != 3),
        ("num_classes", shapes.get("head.bias", (0,))[0], "head.bias" in names),
    )
    return {name: value for name, value, is_shown in settings if is_shown}


def from_evo_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an Evo-ViT on DeiT under timm's names, any others as they are.

    Its readout of the mean patch has timm's names norm and head, that of the class token keeps its
    own, norm_cls and head_cls (which the published evaluation removes).
    """
    if "qks.0.qk.weight" not in weights:
        return weights
    renamed = {}
    for name, value in weights.items():
        group, _, rest = name.partition(".")
        number, _, rest = rest.partition(".")
        if group == "qks":
            kind = rest.rpartition(".")[2]
            qkv = torch.cat([value, weights[f"vs.{number}.v.{kind}"]])
            renamed[f"blocks.{number}.attn.qkv.{kind}"] = qkv
        elif group in EVO_GROUPS:
            renamed[f"blocks.{number}.{EVO_GROUPS[group]}.{rest}"] = value
        elif group != "vs":
            renamed[name] = value
    return renamed


def merged_settings(stored: Mapping, changes: Mapping) -> dict:
    """The stored keywords of a model with others over them.

    What is stored is kept, but for what no longer fits:
    - A model of another name has its own settings; only where the stored ones have no name, all
      but its size are kept, and of these one of timm's names takes no more than the input size, the
      classes and the reduction.
    - Where the method changes, or begins or ceases to remove `tome_r` tokens, only the keep rate,
      the blocks (not ToMe's, which are all), the importance and the random seed of the reduction
      are kept.
    - A keep rate ends `tome_r`.
    """
    stored, name = dict(stored), changes.get("model_name")
    if name not in (None, stored.get("model_name")):
        kept = (
            set() if "model_name" in stored else stored.keys() - {"embed_dim", "depth", "num_heads"}
        )
        if not name.startswith("bat_"):
            kept &= {"img_size", "num_classes", *REDUCTION_KEYWORDS}
        stored = {key: value for key, value in stored.items() if key in kept}
    before = stored.get("reduction", ReductionSettings.reduction)
    after = changes.get("reduction", before)
    had_r = stored.get("tome_r") is not None
    keeps_r = had_r and before == after and "keep_rate" not in changes
    has_r = changes.get("tome_r") is not None or keeps_r
    if before != after or had_r != has_r:
        left = set(REDUCTION_KEYWORDS) - {"reduction", "keep_rate", "importance", "reduction_seed"}
        if had_r == has_r or "tome" not in (before, after):
            left.remove("reduction_loc")
        if has_r and not had_r:  # a keep rate of 1 would keep all tokens
            left.add("keep_rate")
        stored = {key: value for key, value in stored.items() if key not in left}
    return stored | dict(changes)


def with_timms_names(weights: dict[str, Tensor], shown: dict) -> dict[str, Tensor]:
    """The weights of facebook's DeiT-III or DINOv2 under timm's names, any others as they are.

    Args:
        weights: tensors by parameter name.
        shown: their `shown_settings`.

    Returns:
        The same tensors; with registers facebook's position of the class token goes into the token.
    """
    if not shown or not {"mask_token", "blocks.0.gamma_1"} & weights.keys():
        return weights
    with torch.device("meta"):  # a model of the weights' own grid, so that nothing is resampled
        model = VisionTransformer(**shown | {"depth": 1, "num_heads": 1, "qk_norm": False})
    return checkpoint_filter_fn(dict(weights), model, adapt_layer_scale=True)
