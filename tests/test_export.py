"""Exported files against the model.

The ONNX half needs requirements-export.txt and is skipped without; then the torch.export half takes
all keep rates instead of one.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import build_tiny, draw_batch
from timm.layers import resample_abs_pos_embed
from tool_helpers import refusal, write_checkpoint
from torch import Tensor, nn

from models.reduction import bat_assignment
from tools import export
from tools.common import load_model

HAS_ONNX = not export.missing_extras()
needs_onnx = pytest.mark.skipif(
    not HAS_ONNX, reason="optional: pip install -r requirements-export.txt"
)
FORMATS = ["pt2", pytest.param("onnx", marks=needs_onnx)]
KEEP_RATES = (0.7, 0.1)
CASES = [("pt2", rate) for rate in (KEEP_RATES[:1] if HAS_ONNX else KEEP_RATES)]
CASES += [pytest.param("onnx", rate, marks=needs_onnx) for rate in KEEP_RATES]
IMG_SIZE = (32, 48)
SMALL = {"img_size": IMG_SIZE, "depth": 2, "reduction_loc": (1,)}
SMALL_FLAGS = ["--input-size", "32", "48", "--reduction-loc", "1", "--nb-classes", "4"]
SMALL_FLAGS += ["--model", "bat_deit_tiny_patch16_224", "--model-kwargs"]
SMALL_FLAGS += ["patch_size=8", "embed_dim=32", "depth=2", "num_heads=2"]


def write(model: nn.Module, path: Path) -> nn.Module:
    """Exports the logits and the assignments of a model; returns what was exported."""
    module = export.ExportedModel(model, assignments=True).eval()
    export.export_file(module, torch.zeros(2, 3, *model.patch_embed.img_size), path)
    return module


@torch.no_grad()
def agrees(module: nn.Module, path: Path, inputs: Tensor) -> bool:
    """Whether a file has the module's logits and its very assignments."""
    (logits, *assignments), (own, *own_assignments) = export.load_file(path)(inputs), module(inputs)
    pairs = zip(assignments, own_assignments, strict=True)
    return (logits - own).abs().max() <= 1e-4 and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("suffix", "keep_rate"), CASES)
def test_file_agrees_with_model(tmp_path: Path, suffix: str, keep_rate: float) -> None:
    path = tmp_path / f"model.{suffix}"
    module = write(build_tiny(**SMALL, keep_rate=keep_rate), path)
    for batch_size in (1, 5):
        assert agrees(module, path, draw_batch(batch_size, 3, *IMG_SIZE))


def test_every_method_in_one_graph(tmp_path: Path) -> None:
    methods = ("evit", "tome", "random", "dpcknn")
    model = build_tiny(img_size=IMG_SIZE, depth=4, reduction_loc=(0, 1, 2, 3), keep_rate=0.8)
    for block, method in zip(model.blocks, methods, strict=True):
        block.settings = dataclasses.replace(block.settings, reduction=method)
    path = tmp_path / ("model.onnx" if HAS_ONNX else "model.pt2")
    assert agrees(write(model, path), path, draw_batch(3, 3, *IMG_SIZE))


@pytest.mark.parametrize(
    "settings",
    [
        {"reduction": "bat", "proportional_attention": "on", "density_neighbors": 0},
        {"reduction": "bat", "proportional_attention": "on", "features": "keys"},
        {"reduction": "tome", "tome_r": 3, "reduction_loc": (0, 1, 2, 3)},
        {"reduction": "ppt", "ppt_threshold": 1e-3},
        {"reduction": "evo"},
        {"reduction": "evo", "evo_readout": "mean"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_methods_as_published(tmp_path: Path, settings: dict) -> None:
    model = build_tiny(**{"img_size": IMG_SIZE, "depth": 4, "keep_rate": 0.6} | settings)
    path = tmp_path / ("model.onnx" if HAS_ONNX else "model.pt2")
    module = write(model, path)
    for batch_size in (1, 5):
        assert agrees(module, path, draw_batch(batch_size, 3, *IMG_SIZE))


class Groups(nn.Module):
    """The choice of BAT's groups alone: tokens (B, N, D), importances (B, N) in one tensor."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return (bat_assignment(inputs[..., 1:], inputs[..., 0], 0.5),)


@pytest.mark.parametrize("suffix", FORMATS)
def test_ties_are_broken_alike(tmp_path: Path, suffix: str) -> None:
    """Duplicate tokens and equal importances keep their order in the file, too."""
    kinds = draw_batch(25, 9).abs()  # 90 tokens of 25 kinds
    inputs = kinds[torch.randint(25, (5, 90), generator=torch.Generator().manual_seed(0))]
    inputs[0] = kinds[0]
    path = tmp_path / f"groups.{suffix}"
    export.export_file(Groups().eval(), inputs[:2], path)
    (expected,), (actual,) = Groups()(inputs), export.load_file(path)(inputs)
    assert torch.equal(expected, actual)


def test_average_at_another_input_size(tmp_path: Path, capsys) -> None:
    """4 x 6 patches, which are not a square, become 8 x 4: resampled from their own grid."""
    checkpoint = tmp_path / "best.pth"
    average = write_checkpoint(checkpoint, **SMALL)["model_ema"]
    output = tmp_path / "model.pt2"
    flags = ["--checkpoint", str(checkpoint), "--ema", "--input-size", "64", "32"]
    assert export.main([*flags, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "random" not in text and "an image of 64x32" in text
    assert "largest logit difference on batches of 1 and 3: 0.00e+00 (limit 0.0001)" in text

    resampled = resample_abs_pos_embed(average["pos_embed"], new_size=[8, 4], old_size=[4, 6])
    model = build_tiny(**(SMALL | {"img_size": (64, 32)}))
    model.load_state_dict(average | {"pos_embed": resampled})
    images = draw_batch(2, 3, 64, 32)
    with torch.no_grad():
        assert torch.allclose(export.load_file(output)(images)[0], model(images), atol=1e-6)


def test_weights_alone_take_the_flags(tmp_path: Path) -> None:
    path = str(tmp_path / "weights.pth")
    torch.save(build_tiny(**SMALL).state_dict(), path)
    words = [*SMALL_FLAGS, "--checkpoint", path, "--output", "m.pt2"]
    images = draw_batch(2, 3, *IMG_SIZE)
    model = load_model(export.get_args_parser().parse_args(words), path, torch.device("cpu"))
    assert torch.equal(model(images), build_tiny(**SMALL)(images))


def test_disagreement_is_not_done(tmp_path: Path, capsys, monkeypatch) -> None:
    output = tmp_path / "model.pt2"
    write_file = export.export_file

    def write_another_model(module, images, path) -> None:
        module.model.head.bias.data += 1
        write_file(module, images, path)
        module.model.head.bias.data -= 1

    monkeypatch.setattr(export, "export_file", write_another_model)
    assert export.main([*SMALL_FLAGS, "--output", str(output)]) == 1
    text = capsys.readouterr().out
    assert "the weights are random" in text and "not done" in text
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "model.txt"], "must end in .onnx or .pt2"),
        (["--output", "no/such/model.pt2"], "no such folder: no/such"),
        (["--output", "m.pt2", "--ema"], "--ema needs a checkpoint"),
        (["--output", "m.pt2", "--checkpoint", "no.pth"], "no such checkpoint: no.pth"),
        (["--output", "m.pt2", "--keep-rate", "2"], "keep_rate must be in (0, 1], got 2.0"),
        (["--output", "m.onnx"], "pip install onnxruntime"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, flags, message) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "missing_extras", lambda: ["onnxruntime"])
    assert message in refusal(capsys, export.main, [*SMALL_FLAGS, *flags])
    assert not list(tmp_path.iterdir())
