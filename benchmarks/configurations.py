"""The models that a benchmark compares: timm's dense one and every reduction at every keep rate."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from builders import build_model
from models import BATVisionTransformer, count_gmacs
from utils import InputError

from .timing import Setting

DENSE = "dense"
PREFIX = "bat_"  # a reducing model's registered name is this and the name of timm's dense one


class Configuration(NamedTuple):
    """One line of a table.

    Attributes:
        reduction: a name in REDUCTIONS, or "dense" for timm's own model.
        keep_rate: share of the tokens that leave a stage; 1 for the dense model.
        model: the model, on its device.
        gmacs: multiply-accumulates of one image, in 10^9.
        tokens: patch tokens at the start and after every stage, e.g. "196>138>97>68".
    """

    reduction: str
    keep_rate: float
    model: nn.Module
    gmacs: float
    tokens: str

    def row(self) -> dict:
        """The columns that name a line."""
        return {"reduction": self.reduction, "keep": self.keep_rate, "tokens": self.tokens}


class Choice(NamedTuple):
    """Which models to compare.

    Attributes:
        model: registered name of a reducing model.
        keywords: more keywords of the model, without keep rate, reduction and image size.
        reductions: names in REDUCTIONS.
        keep_rates: each in (0, 1].
        img_sizes: (height, width) in pixels; one group of lines each.
        batch_sizes: images at a time; one group of lines each.
    """

    model: str
    keywords: dict
    reductions: Sequence[str]
    keep_rates: Sequence[float]
    img_sizes: Sequence[tuple[int, int]] = ((224, 224),)
    batch_sizes: Sequence[int] = (16,)


STAGE_KEYWORDS = ("reduction_loc", "cluster_ratio", "match_ratio", "merge_weights")


def build_dense(choice: Choice, img_size: tuple[int, int]) -> nn.Module:
    """timm's own model of the same shape, with fused attention.

    Raises:
        InputError: timm has no such model, or its fused attention is switched off.
    """
    name = choice.model.removeprefix(PREFIX)
    if not timm.is_model(name):
        raise InputError(f"timm has no dense model '{name}' to compare '{choice.model}' with")
    keywords = {k: v for k, v in choice.keywords.items() if k not in STAGE_KEYWORDS}
    model = timm.create_model(name, img_size=img_size, **keywords)
    if not all(block.attn.fused_attn for block in model.blocks):
        raise InputError("timm's fused attention is switched off: unset TIMM_FUSED_ATTN")
    return model


def build_configurations(
    choice: Choice, img_size: tuple[int, int], setting: Setting
) -> list[Configuration]:
    """The dense model and every reduction at every keep rate, all in evaluation mode.

    Args:
        choice: which models.
        img_size: (height, width) of the images, in pixels.
        setting: device and seed.

    Returns:
        The dense model first, then by keep rate.

    Raises:
        InputError: a model cannot be built.
    """
    names = [(name, rate) for rate in choice.keep_rates for name in choice.reductions]
    reducing = []
    for name, rate in names:
        torch.manual_seed(setting.seed)
        keywords = {"model_name": choice.model, "img_size": img_size} | choice.keywords
        model = build_model(keywords | {"reduction": name, "keep_rate": rate})
        reducing.append(_configuration(name, rate, model, setting))
    dense = build_dense(choice, img_size)
    return [_configuration(DENSE, 1.0, dense, setting), *reducing]


def _configuration(name: str, rate: float, model: nn.Module, setting: Setting) -> Configuration:
    gmacs = count_gmacs(model)
    return Configuration(name, rate, model.eval().to(setting.device), gmacs, stage_tokens(model))


def stage_tokens(model: nn.Module) -> str:
    """Patch tokens at the start and after every stage, e.g. "196>138>97>68"."""
    tokens = [model.patch_embed.num_patches]
    if isinstance(model, BATVisionTransformer):
        tokens += [stage.num_outputs for stage in model.stages()]
    return ">".join(map(str, tokens))


def random_images(batch_size: int, img_size: tuple[int, int], setting: Setting) -> Tensor:
    """(B, 3, height, width) of normal noise on the device: the time does not depend on the data."""
    generator = torch.Generator().manual_seed(setting.seed)
    return torch.randn(batch_size, 3, *img_size, generator=generator).to(setting.device)


def each_size(
    choice: Choice, setting: Setting
) -> Iterator[tuple[list[Configuration], Tensor, dict]]:
    """Goes through image sizes and, within them, batches.

    Args:
        choice: which models and sizes.
        setting: device and seed.

    Yields:
        The configurations, of one size the same; images (B, 3, height, width); and the columns
        that name the size and the batch.

    Raises:
        InputError: a model cannot be built.
    """
    for img_size in choice.img_sizes:
        configurations = build_configurations(choice, img_size, setting)
        for batch_size in choice.batch_sizes:
            images = random_images(batch_size, img_size, setting)
            columns = {"size": "x".join(map(str, img_size)), "batch": batch_size}
            yield configurations, images, columns


def topk_rival(configuration: Configuration, configurations: Sequence[Configuration]) -> int | None:
    """Position of the `topk` line with the same keep rate, if there is one."""
    for index, other in enumerate(configurations):
        if other.reduction == "topk" and other.keep_rate == configuration.keep_rate:
            return index
    return None
