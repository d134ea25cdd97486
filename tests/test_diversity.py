"""Measures of diversity against closed forms and slow loops; the table and the figure."""

import math
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, build_tiny, draw_batch
from data_helpers import write_image_folder
from tool_helpers import CPU_FLAGS, refusal, run_tool, write_checkpoint

import models
from tools import diversity
from tools.common import Contender
from tools.diversity import (
    MEASURE_LABELS,
    MEASURES,
    attention_share,
    effective_rank,
    mean_cosine,
    measure_methods,
    num_attentive_tokens,
    plot_diversity,
    relative_distance,
)
from tools.figures import METHODS

CHANGES = {"img_size": (32, 48), "depth": 4, "keep_rate": 0.6}
# A small model without a checkpoint.
RANDOM_MODEL = [
    "--checkpoint", "", "--model-kwargs", "patch_size=8", "embed_dim=32", "depth=3", "num_heads=2",
    "--input-size", "32", "--reduction-loc", "1",
]  # fmt: skip


@pytest.fixture
def model():
    return build_tiny(**CHANGES)


def contender(model):
    """As a tool has loaded it from a file."""
    stored = TINY | CHANGES | {"model_name": "bat_deit_tiny_patch16_224"}
    return Contender(model, diversity.get_args_parser().parse_args([]), stored)


def orthonormal(num_tokens, channels):
    return torch.linalg.qr(torch.randn(channels, channels)).Q[:num_tokens]


SINGULAR = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # p = (3/4, 1/4)
ENTROPY = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))


@pytest.mark.parametrize(
    "tokens, distance, cosine, rank",
    [
        (torch.arange(1.0, 17).expand(10, -1), 0.0, 1.0, 1.0),  # identical
        # The mean of n orthonormal tokens has length 1 / sqrt(n).
        (3 * orthonormal(8, 8), math.sqrt(1 - 1 / 8), 0.0, 8.0),
        (orthonormal(5, 12), math.sqrt(1 - 1 / 5), 0.0, 5.0),
        (torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), 1.0, -1.0, 1.0),
        (SINGULAR, math.sqrt(0.5), 0.0, math.exp(ENTROPY)),
        (torch.zeros(3, 4), 0.0, 0.0, 1.0),
        (torch.ones(1, 4), 0.0, math.nan, 1.0),
    ],
)
def test_closed_forms(tokens, distance, cosine, rank):
    x = torch.stack([tokens, 5 * tokens.flip(0)])  # neither order nor scale counts
    approx = {"abs": 1e-6, "nan_ok": True}
    assert relative_distance(x).tolist() == pytest.approx([distance] * 2, **approx)
    assert mean_cosine(x).tolist() == pytest.approx([cosine] * 2, **approx)
    assert effective_rank(x).tolist() == pytest.approx([rank] * 2, **approx)


def test_measures_against_loops():
    x = draw_batch(2, 7, 5, seed=1).double() + 0.5
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
            (first @ second) / np.linalg.norm(first) / np.linalg.norm(second)
            for first, second in permutations(tokens, 2)
        ]
        assert mean_cosine(x)[b].item() == pytest.approx(np.mean(cosines))


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


@torch.no_grad()
def test_rows_against_separate_forward_passes(model):
    batches = [draw_batch(3, 3, 32, 48), draw_batch(2, 3, 32, 48, seed=1)]
    methods = ["none", "topk", "evit", "bat"]
    table = measure_methods(contender(model), methods, batches).set_index(["reduction", "block"])
    assert list(table.index) == [(method, block) for method in methods for block in range(4)]
    assert (table.num_images == 5).all()
    together = torch.cat(batches)
    for method in methods:
        model.set_reduction(method)
        x, sizes = model._pos_embed(model.patch_embed(together)), None
        for index, block in enumerate(model.blocks):
            row = table.loc[(method, index)]
            if index in model.reduction_loc:
                importance = block.attend(x, None, None).importance[:, 1:]
                share = attention_share(importance, int(row.num_attentive))
                assert row.attention_share == pytest.approx(share.mean().item(), rel=1e-5)
                x, sizes, *_ = block(x, None, sizes)
            else:
                assert pd.isna(row.num_attentive) and pd.isna(row.attention_share)
                x = block(x).tokens
            assert row.num_tokens == x.shape[1] - 1
            for name, measure in MEASURES.items():
                values = measure(x[:, 1:])
                assert row[name] == pytest.approx(values.mean().item(), rel=1e-5)
                std = values.std(correction=0).item()
                assert row[f"{name}_std"] == pytest.approx(std, rel=1e-3, abs=1e-9)
    assert not any(block._forward_hooks for block in model.blocks)  # nothing is left behind


def test_figure_shows_the_table(model):
    table = measure_methods(contender(model), ["none", "tome", "bat"], [draw_batch(2, 3, 32, 48)])
    panels = {axes.get_label(): axes for axes in plot_diversity(table).axes}
    assert set(panels) == set(MEASURE_LABELS)
    for measure, axes in panels.items():
        curves = {line.get_gid(): line for line in axes.lines if line.get_gid() in METHODS}
        is_share = measure == "attention_share"
        assert set(curves) == {"tome", "bat"} | (set() if is_share else {"none"})
        for method, line in curves.items():
            own = table[(table.reduction == method) & table[measure].notna()]
            assert len(own) == (2 if is_share else 4)
            np.testing.assert_allclose(line.get_xdata(), own.block)
            np.testing.assert_allclose(line.get_ydata(), own[measure] * (100 if is_share else 1))
    assert "(%)" in panels["attention_share"].get_title()


@pytest.fixture
def flags(tmp_path):
    """Four of six images of 4 x 6 patches; a checkpoint of the small model."""
    write_image_folder(tmp_path)
    write_checkpoint(tmp_path / "model.pth", **CHANGES)
    return [
        "--checkpoint", tmp_path / "model.pth", "--data-path", tmp_path, "--num-images", "4",
        "--output-dir", tmp_path / "out", "--batch-size", "3", *CPU_FLAGS,
        "--reduction", "none", "tome", "bat",
    ]  # fmt: skip


def test_command(tmp_path, flags, capsys):
    (tmp_path / "val" / "ant" / "0.png").write_bytes(b"no image")
    assert run_tool(diversity.main, flags) == 1
    out, error = capsys.readouterr()
    assert "ant/0.png" in error and "1 of 4 images could not be read" in error
    assert f"wrote {tmp_path / 'out' / 'diversity.csv'}" in out
    table = pd.read_csv(tmp_path / "out" / "diversity.csv")
    assert len(table) == 3 * 4 and set(table.num_images) == {3}
    assert set(table.num_tokens[table.reduction == "none"]) == {24}
    for suffix, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert (tmp_path / "out" / f"diversity.{suffix}").read_bytes().startswith(start)


def test_moving_average_and_random_weights(tmp_path, flags):
    first_block = {}
    for name, changes in (
        ("model", []), ("ema", ["--ema"]), ("random", RANDOM_MODEL), ("same", RANDOM_MODEL),
        ("other seed", [*RANDOM_MODEL, "--seed", "1"]),
    ):  # fmt: skip
        assert run_tool(diversity.main, [*flags, *changes]) == 0
        table = pd.read_csv(tmp_path / "out" / "diversity.csv")
        first_block[name] = table.effective_rank[0]
    assert first_block.pop("same") == first_block["random"]
    assert len(set(first_block.values())) == 4


def test_bad_input(tmp_path, flags, capsys):
    for changes, words in (
        (["--num-images", "0"], "--num-images: must be at least 1"),
        (["--ema", "--checkpoint", ""], "--ema needs a checkpoint"),
    ):
        assert words in refusal(capsys, diversity.main, [*flags, *changes])
    for path in (tmp_path / "val").glob("*/*.png"):
        path.write_bytes(b"no image")
    assert "none of the 4 images" in refusal(capsys, diversity.main, flags)
