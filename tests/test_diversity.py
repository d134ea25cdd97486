"""Measures of diversity against closed forms and slow loops; the table and the figure."""

import csv
import math

import numpy as np
import pytest
import timm
import torch
from data_helpers import write_image_folder

import analyze
import models
from analysis.diversity import (
    ATTENTION_SHARE,
    MEASURES,
    attention_share,
    effective_rank,
    mean_cosine,
    measure_methods,
    num_attentive_tokens,
    relative_distance,
)
from analysis.figures import MEASURE_LABELS, METHODS, plot_diversity
from analysis.tokens import stage_importance

MODEL_ARGS = {
    "model_name": "bat_deit_tiny_patch16_224",
    "img_size": (32, 48),
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 2,
    "reduction_loc": (1, 2),
    "keep_rate": 0.6,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model(**MODEL_ARGS).eval()


def images(count, seed=0):
    return torch.randn(count, 3, 32, 48, generator=torch.Generator().manual_seed(seed))


def test_identical_tokens():
    token = torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(0))
    x = token.expand(-1, 10, -1)
    assert relative_distance(x).tolist() == pytest.approx([0.0] * 3, abs=1e-7)
    assert mean_cosine(x).tolist() == pytest.approx([1.0] * 3)
    assert effective_rank(x).tolist() == pytest.approx([1.0] * 3, abs=1e-6)


@pytest.mark.parametrize("num_tokens, channels", [(8, 8), (5, 12)])
def test_orthogonal_tokens(num_tokens, channels):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2, channels, channels, generator=generator)).Q
    x = 3 * basis[:, :num_tokens]
    assert effective_rank(x).tolist() == pytest.approx([num_tokens] * 2, rel=1e-6)
    assert mean_cosine(x).tolist() == pytest.approx([0.0] * 2, abs=1e-6)
    # The mean of n orthonormal tokens has length 1 / sqrt(n).
    assert relative_distance(x).tolist() == pytest.approx([math.sqrt(1 - 1 / num_tokens)] * 2)


def test_opposite_tokens():
    x = torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])
    assert relative_distance(x).item() == pytest.approx(1.0)
    assert mean_cosine(x).item() == pytest.approx(-1.0)
    assert effective_rank(x).item() == pytest.approx(1.0)


def test_effective_rank_of_known_singular_values():
    x = torch.zeros(1, 4, 3)
    x[0, 0, 0], x[0, 1, 1] = 3.0, 1.0  # p = (3/4, 1/4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(x).item() == pytest.approx(math.exp(entropy))


def test_zero_and_single_tokens():
    zero = torch.zeros(1, 3, 4)
    assert relative_distance(zero).item() == mean_cosine(zero).item() == 0.0
    assert effective_rank(zero).item() == 1.0
    assert mean_cosine(torch.ones(1, 1, 4)).isnan().all()
    assert relative_distance(torch.ones(1, 1, 4)).item() == 0.0


def test_measures_against_loops():
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1)).double() + 0.5
    for b, tokens in enumerate(x.numpy()):
        mean = sum(tokens) / len(tokens)
        residual = sum(((token - mean) ** 2).sum() for token in tokens)
        expected = math.sqrt(residual / (tokens**2).sum())
        assert relative_distance(x)[b].item() == pytest.approx(expected)
        # No other row vector is nearer than the mean.
        for shift in np.eye(5) * 1e-3:
            other = sum(((token - mean - shift) ** 2).sum() for token in tokens)
            assert other > residual
        cosines = [
            (tokens[i] @ tokens[j]) / np.linalg.norm(tokens[i]) / np.linalg.norm(tokens[j])
            for i in range(7)
            for j in range(7)
            if i != j
        ]
        assert mean_cosine(x)[b].item() == pytest.approx(np.mean(cosines))


def test_measures_ignore_order_and_scale():
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(2))
    for measure in MEASURES.values():
        torch.testing.assert_close(measure(x[:, torch.randperm(9)] * 5), measure(x))


def test_attention_share():
    importance = torch.tensor([[0.1, 0.3, 0.0, 0.2], [0.25, 0.25, 0.25, 0.25]])
    assert attention_share(importance, 2).tolist() == pytest.approx([5 / 6, 0.5])
    assert attention_share(importance, 4).tolist() == pytest.approx([1.0, 1.0])


def test_attentive_tokens_of_each_method(model):
    budget = models.reduction.token_budget(24, 0.6)
    for reduction in models.REDUCTIONS:
        model.set_reduction(reduction)
        expected = {"bat": budget.attentive, "none": 24}.get(reduction, budget.kept)
        assert num_attentive_tokens(model)[1] == expected
    assert budget.attentive < budget.kept < 24


def test_rows_against_separate_forward_passes(model):
    batches = [images(3), images(2, seed=1)]
    methods = ["none", "topk", "evit", "bat"]
    rows = measure_methods(model, methods, batches)
    assert [(row["reduction"], row["block"]) for row in rows] == [
        (method, block) for method in methods for block in range(4)
    ]
    assert all(row["num_images"] == 5 for row in rows)
    table = {(row["reduction"], row["block"]): row for row in rows}
    together = torch.cat(batches)
    for method in methods:
        model.set_reduction(method)
        with torch.no_grad():
            x, sizes = model._pos_embed(model.patch_embed(together)), None
            for index, block in enumerate(model.blocks):
                row = table[method, index]
                if index in model.reduction_loc:
                    importance = stage_importance(block, x)
                    share = attention_share(importance, row["num_attentive"])
                    assert row[ATTENTION_SHARE] == pytest.approx(share.mean().item(), rel=1e-5)
                    x, sizes, _ = block(x, sizes)
                else:
                    assert row["num_attentive"] is row[ATTENTION_SHARE] is None
                    x = block(x)
                assert row["num_tokens"] == x.shape[1] - 1
                for name, measure in MEASURES.items():
                    values = measure(x[:, 1:])
                    assert row[name] == pytest.approx(values.mean().item(), rel=1e-5)
                    std = values.std(correction=0).item()
                    assert row[f"{name}_std"] == pytest.approx(std, rel=1e-3, abs=1e-9)
    # Nothing is left behind in the model.
    assert not any(block._forward_hooks for block in model.blocks)


def test_command_and_figure(tmp_path, capsys):
    write_image_folder(tmp_path)
    (tmp_path / "val" / "ant" / "0.png").write_bytes(b"no image")
    torch.manual_seed(0)
    model = timm.create_model(**MODEL_ARGS)
    checkpoint = tmp_path / "model.pth"
    torch.save({"model": model.state_dict(), "model_args": MODEL_ARGS}, checkpoint)
    output = tmp_path / "out"
    command = [
        "diversity", "--checkpoint", str(checkpoint), "--data-path", str(tmp_path),
        "--output-dir", str(output), "--num-images", "4", "--batch-size", "3",
        "--num-workers", "0", "--device", "cpu", "--reduction", "none", "tome", "bat",
    ]  # fmt: skip
    assert analyze.main(command) == 1
    error = capsys.readouterr().err
    assert "ant/0.png" in error and "1 of 6 images" in error
    with open(output / "diversity.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["num_images"] for line in lines} == {"3"}
    assert {line["num_tokens"] for line in lines if line["reduction"] == "none"} == {"24"}
    text = ("reduction",)
    rows = [
        {
            name: value if name in text else float(value) if value else None
            for name, value in line.items()
        }
        for line in lines
    ]
    panels = {axes.get_label(): axes for axes in plot_diversity(rows).axes}
    assert set(panels) == set(MEASURE_LABELS)
    for measure, axes in panels.items():
        curves = {line.get_gid(): line for line in axes.lines if line.get_gid() in METHODS}
        share = measure == ATTENTION_SHARE
        assert set(curves) == {"tome", "bat"} | (set() if share else {"none"})
        for method, line in curves.items():
            own = [row for row in rows if row["reduction"] == method and row[measure] is not None]
            assert len(own) == (2 if share else 4)
            scale = 100 if share else 1
            np.testing.assert_allclose(line.get_xdata(), [row["block"] for row in own])
            np.testing.assert_allclose(line.get_ydata(), [scale * row[measure] for row in own])
    assert "(%)" in panels[ATTENTION_SHARE].get_title()
    assert (output / "diversity.pdf").read_bytes()[:4] == b"%PDF"
