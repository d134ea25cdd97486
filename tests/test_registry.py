"""Every plain ViT that timm registers, built small: reducing ones keep timm's arithmetic."""

import copy

import pytest
import timm
import torch
from conftest import draw_batch, randomise
from torch import nn

from models import make_reducing
from models.vit import ReducingTransformer

MODULES = ("vision_transformer", "deit", "eva")
NAMES = [name for module in MODULES for name in timm.list_models(module=module)]
IMG_SIZE = (40, 32)  # 5 x 4 patches
SMALL = {
    "img_size": IMG_SIZE, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 2,
    "num_classes": 5,
}  # fmt: skip
# What cannot reduce, with the reason: differential attention is a difference of two matrices.
REFUSED = {
    "vit_dlittle_patch16_reg1_gap_256": "block 0 has a DiffAttention, whose importance is not",
    "vit_dwee_patch16_reg1_gap_256": "block 0 has a DiffAttention, whose importance is not",
    "vit_dpwee_patch16_reg1_gap_256": "block 0 is a DiffParallelScalingBlock, which cannot",
}


def build_small(name: str) -> nn.Module:
    # Sapiens2 lists the heads of keys by block; other factories take no such keyword.
    kwargs = SMALL | ({"num_kv_heads": (2, 1, 1, 2)} if "sapiens2" in name else {})
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **kwargs))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
@torch.no_grad()
def test_registered_model_reduces(name: str) -> None:
    dense = build_small(name)
    images = draw_batch(2, 3, *IMG_SIZE)
    model = make_reducing(copy.deepcopy(dense), keep_rate=1.0)
    expected = dense(images)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
    features = dense.forward_features(images)
    torch.testing.assert_close(model.forward_features(images), features, rtol=0, atol=1e-5)

    model.set_keep_rate(0.7)
    outputs, assignments = model.forward_with_assignments(images)
    assert [stage.block for stage in model.stages()] == [1, 2, 3]
    assert [stage.num_outputs for stage in model.stages()] == [14, 10, 7]
    assert [assignment.shape for assignment in assignments] == [(2, 20), (2, 14), (2, 10)]
    assert model.forward_features(images).shape == (2, model.num_prefix_tokens + 7, 128)
    assert outputs.shape == expected.shape and outputs.isfinite().all()
    assert not torch.allclose(outputs, expected, rtol=0, atol=1e-4), "reducing must matter"

    ours, theirs = model.state_dict(), dense.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", [name for name in REFUSED if name in NAMES])
def test_refused_model_says_why_and_stays(name: str) -> None:
    model = build_small(name)
    with pytest.raises(ValueError, match=REFUSED[name]):
        make_reducing(model)
    assert not isinstance(model, ReducingTransformer)


def test_nine_of_ten_names_reduce() -> None:
    assert len(NAMES) >= 229, "timm 1.0.28 registers so many"
    assert len(REFUSED) <= len(NAMES) / 10
