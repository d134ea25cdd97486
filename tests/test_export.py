"""Exported files against the model.

The ONNX half needs requirements-export.txt and is skipped without; then the torch.export half takes
all keep rates instead of one.
"""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import export
from models import BATVisionTransformer
from models.reduction import bat_assignment

HAS_ONNX = all(export.is_installed(name) for name in export.EXTRAS)
needs_onnx = pytest.mark.skipif(
    not HAS_ONNX, reason="optional: pip install -r requirements-export.txt"
)
FORMATS = ["pt2", pytest.param("onnx", marks=needs_onnx)]
KEEP_RATES = (0.7, 0.4, 0.1)
CASES = [("pt2", rate) for rate in (KEEP_RATES[:1] if HAS_ONNX else KEEP_RATES)]
CASES += [pytest.param("onnx", rate, marks=needs_onnx) for rate in KEEP_RATES]
IMG_SIZE = (32, 48)
MODEL_FLAGS = ["--input-size", "32", "48", "--reduction-loc", "1", "--nb-classes", "5"]
MODEL_FLAGS += ["--model-kwargs", "patch_size=8", "embed_dim=24", "depth=2", "num_heads=2"]


def small_model(**changes: object) -> BATVisionTransformer:
    """A model of 24 patches with weights large enough that logits depend on the tokens."""
    torch.manual_seed(0)
    keywords = {
        "img_size": IMG_SIZE,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
        "reduction_loc": (1,),
    }
    model = timm.create_model("bat_deit_tiny_patch16_224", **keywords | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    return model


def write(model: BATVisionTransformer, path: Path) -> export.TracedModel:
    """Exports the logits and the assignments of a model."""
    module = export.TracedModel(model)
    images = torch.zeros(export.TRACED_BATCH, 3, *model.patch_embed.img_size)
    export.export_file(module, images, path)
    return module


def run_file(path: Path, images: Tensor) -> list[Tensor]:
    """Outputs of an exported file."""
    load = export.load_onnx if path.suffix == ".onnx" else export.load_program
    return list(load(path)(images))


@pytest.mark.parametrize(("suffix", "keep_rate"), CASES)
def test_file_agrees_with_model(tmp_path: Path, suffix: str, keep_rate: float) -> None:
    path = tmp_path / f"model.{suffix}"
    module = write(small_model(keep_rate=keep_rate), path)
    for batch_size in (1, 5):
        images = torch.randn(batch_size, 3, *IMG_SIZE)
        with torch.no_grad():
            expected = module(images)
        actual = run_file(path, images)
        assert (expected[0] - actual[0]).abs().max() <= export.MAX_DIFFERENCE
        assert len(actual) == 2
        assert torch.equal(expected[1], actual[1])


def test_every_method_in_one_graph(tmp_path: Path) -> None:
    methods = ("evit", "tome", "random", "dpcknn")
    model = small_model(depth=len(methods), reduction_loc=tuple(range(len(methods))), keep_rate=0.8)
    for block, method in zip(model.blocks, methods, strict=True):
        block.reduction = method
    path = tmp_path / ("model.onnx" if HAS_ONNX else "model.pt2")
    module = write(model, path)
    images = torch.randn(3, 3, *IMG_SIZE)
    with torch.no_grad():
        expected = module(images)
    actual = run_file(path, images)
    for a, b in zip(expected[1:], actual[1:], strict=True):
        assert torch.equal(a, b)
    assert (expected[0] - actual[0]).abs().max() <= export.MAX_DIFFERENCE


class Stage(nn.Module):
    """The choice of BAT's groups alone: tokens (B, N, D), importances (B, N) in one tensor."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Inputs (B, N, D + 1), the importance first, to an assignment (B, N)."""
        return (bat_assignment(inputs[..., 1:], inputs[..., 0], 0.5),)


@pytest.mark.parametrize("suffix", FORMATS)
def test_ties_are_broken_alike(tmp_path: Path, suffix: str) -> None:
    """Duplicate tokens and equal importances keep their order in the file, too."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(25, 9, generator=generator).abs()  # 90 tokens of 25 kinds
    inputs = kinds[torch.randint(25, (5, 90), generator=generator)]
    inputs[0] = kinds[0]
    path = tmp_path / f"stage.{suffix}"
    export.export_file(Stage(), inputs[:2], path)
    (expected,), (actual,) = Stage()(inputs), run_file(path, inputs)
    assert torch.equal(expected, actual)


def test_command_line(tmp_path: Path, capsys, monkeypatch) -> None:
    checkpoint, output = tmp_path / "best.pth", tmp_path / "model.pt2"
    torch.save({"model": small_model().state_dict()}, checkpoint)
    flags = [*MODEL_FLAGS, "--checkpoint", str(checkpoint), "--output", str(output)]
    assert export.main(flags) == 0
    text = capsys.readouterr().out
    assert "random" not in text
    assert "largest logit difference on batches of 1 and 3: 0.00e+00 (limit 0.0001)" in text
    with torch.no_grad():
        images = torch.randn(2, 3, *IMG_SIZE)
        (logits,) = export.load_program(output)(images)
        assert torch.allclose(logits, small_model()(images), atol=1e-6)


def test_disagreement_is_not_done(tmp_path: Path, capsys, monkeypatch) -> None:
    output = tmp_path / "model.pt2"
    monkeypatch.setattr(export, "export_file", lambda module, images, path: path.touch())
    difference = export.Comparison(float("nan"), 0)
    monkeypatch.setattr(export, "compare", lambda *args: difference)
    assert export.main([*MODEL_FLAGS, "--output", str(output)]) == 1
    text = capsys.readouterr().out
    assert "the weights are random" in text and "not done" in text
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "model.txt"], "must end in .onnx or .pt2"),
        (["--output", "no/such/model.pt2"], "no such folder: no/such"),
        (["--output", "m.pt2", "--ema"], "--ema needs --checkpoint"),
        (["--output", "m.pt2", "--checkpoint", "no.pth"], "no such checkpoint: no.pth"),
        (["--output", "m.pt2", "--keep-rate", "2"], "keep_rate must be in (0, 1], got 2.0"),
        (["--output", "m.onnx"], "pip install onnxruntime"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, flags, message) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "is_installed", lambda name: name != "onnxruntime")
    with pytest.raises(SystemExit) as stopped:
        export.main([*MODEL_FLAGS, *flags])
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1
    assert not list(tmp_path.iterdir())
