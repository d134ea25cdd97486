"""Following patches: weights that add up, against products of matrices; table and heat maps."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build_tiny, draw_batch
from data_helpers import random_image
from tool_helpers import CPU_FLAGS, refusal, run_tool, write_checkpoint

import models
from models.reduction import merge_tokens
from models.trace import PatchKind, trace_patches
from tools import tokens
from tools.tokens import follow_patches, plot_patches

NUM_IMAGES, NUM_PATCHES, COLUMNS = 4, 24, 6
IMAGES = draw_batch(NUM_IMAGES, 3, 32, 48)
CHANGES = {"img_size": (32, 48), "depth": 5, "reduction_loc": (1, 2, 3), "keep_rate": 0.7}
STAGES = (1, 2, 3)


@pytest.fixture
def model():
    return build_tiny(**CHANGES)


def follow(model):
    """The table of the images, and a function that gives a column of it as (B, N_0)."""
    table = follow_patches(model, IMAGES, ["a", "b", "c", "d"])
    return table, lambda name: table[name].to_numpy(float, na_value=np.nan).reshape(NUM_IMAGES, -1)


@torch.no_grad()
def stages_of(model):
    """What each reducing block gives for the images, and its shares."""
    _, outputs = model.forward_with_stages(IMAGES)
    return [(output, shares_of(output.weights, output.assignment)) for output in outputs]


def shares_of(weights, assignment):
    """Each weight over the sum of its group, by a loop; equal ones where that is 0; 0: dropped."""
    shares = torch.zeros(assignment.shape, dtype=torch.float64)
    for image, groups in enumerate(assignment):
        for group in groups.unique():
            members = groups == group
            own = weights[image, members].double()
            own = own / own.sum() if own.sum() > 0 else torch.ones_like(own) / len(own)
            shares[image, members] = 0 if group < 0 else own
    return shares


@pytest.mark.parametrize("reduction", models.REDUCTIONS)
@pytest.mark.parametrize("merge_weights", ["importance", "mean"])
def test_weights_of_a_final_token_sum_to_one(model, reduction, merge_weights):
    model.set_reduction(reduction, merge_weights=merge_weights)
    table, column = follow(model)
    dropped = table.final_token.isna()
    assert dropped.any() == (reduction in ("topk", "random")) or reduction == "ppt"
    assert table.final_weight[dropped].isna().all() and (table.final_weight[~dropped] >= 0).all()
    sums = table.groupby(["image", "final_token"]).final_weight.sum()
    np.testing.assert_allclose(sums, 1.0)
    _, assignments = model.forward_with_assignments(IMAGES)
    composed = models.trace.compose_assignments(assignments)[-1]
    if reduction == "evo":  # all patches are there in the end, each in its place
        composed = np.tile(np.arange(NUM_PATCHES), (NUM_IMAGES, 1))
    np.testing.assert_array_equal(np.nan_to_num(column("final_token"), nan=-1), composed)


@pytest.mark.parametrize("reduction", ["bat", "evit", "dpcknn", "tome", "topk"])
def test_shares_are_those_of_the_merge(model, reduction, monkeypatch):
    """Each stage's share is the entry of W that the block multiplied its tokens with."""
    matrices = []

    def spy(x, weights, assignment, num_groups, normalize=True):
        one_hot = torch.eye(x.shape[1]).expand(len(x), -1, -1)
        matrices.append(merge_tokens(one_hot, weights, assignment, num_groups, normalize))
        return merge_tokens(x, weights, assignment, num_groups, normalize)

    monkeypatch.setattr(models.reduction, "merge_tokens", spy)
    model.set_reduction(reduction)
    for _, share in stages_of(model):
        # ToMe's own steps merge as well, on the way to an assignment: the stage's merge comes last.
        *_, matrix = (entry for entry in matrices if entry.shape[2] == share.shape[1])
        matrix = matrix / matrix.sum(dim=2, keepdim=True)  # EViT's fused row alone is not 1 yet
        torch.testing.assert_close(matrix.sum(dim=1), share.float())


def test_final_weights_are_the_product_of_the_stage_matrices(model):
    product = torch.eye(NUM_PATCHES, dtype=torch.float64).expand(NUM_IMAGES, -1, -1)
    for output, share in stages_of(model):
        group = torch.arange(output.sizes.shape[1])[:, None]
        matrix = torch.where(output.assignment[:, None] == group, share[:, None], 0.0)
        product = matrix @ product  # (4, K, 24)
    _, column = follow(model)
    final = torch.from_numpy(column("final_token")).long()
    expected = product.gather(1, final[:, None]).squeeze(1)
    np.testing.assert_allclose(column("final_weight"), expected)
    np.testing.assert_allclose(product.sum(dim=2), 1.0)


def test_importance_is_that_of_the_token_before(model):
    model.set_reduction("topk")
    (first, _), (second, _), _ = stages_of(model)
    _, column = follow(model)
    importance = column("stage1_importance")
    np.testing.assert_array_equal(importance, first.importance)
    token = first.assignment
    expected = second.importance.gather(1, token.clamp(min=0)).masked_fill(token < 0, torch.nan)
    np.testing.assert_array_equal(column("stage2_importance"), expected)
    # Of the patches that stay in the first stage, all are more important than those that go.
    stays = ~np.isnan(column("stage1_group"))
    for own, kept in zip(importance, stays, strict=True):
        assert own[kept].min() >= own[~kept].max()


def test_kinds_are_those_of_the_trace(model):
    _, assignments = model.forward_with_assignments(IMAGES)
    table, _ = follow(model)
    for stage, trace in zip(STAGES, trace_patches(assignments, model.stages()), strict=True):
        kinds = [PatchKind(kind).name.lower() for kind in trace.kind.flatten().tolist()]
        assert table[f"stage{stage}_kind"].tolist() == kinds
    assert {"single", "mixed"} <= set(table.stage3_kind)


@pytest.mark.parametrize("reduction", ["none", "topk", "bat"])
def test_when_the_own_token_is_lost(model, reduction):
    model.set_reduction(reduction)
    table, _ = follow(model)
    kinds = table[[f"stage{stage}_kind" for stage in STAGES]].to_numpy()
    lost = [next((i for i, kind in enumerate(row, 1) if kind != "single"), 4) for row in kinds]
    assert table.lost_at.fillna(4).tolist() == lost
    assert table.lost_at.isna().all() == (reduction == "none")


@pytest.fixture
def flags(tmp_path):
    """A checkpoint, and a folder with three images, one of them two folders down."""
    write_checkpoint(tmp_path / "model.pth", **CHANGES)
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "b" / "c").mkdir(parents=True)
    for name in ("a.png", "b/c/d.png", "e.png"):
        random_image(rng).save(tmp_path / "in" / name)
    return [
        "--checkpoint", tmp_path / "model.pth", "--data-path", tmp_path / "in",
        "--output-dir", tmp_path / "out", "--batch-size", "2", *CPU_FLAGS,
    ]  # fmt: skip


def read_table(tmp_path):
    return pd.read_csv(tmp_path / "out" / "tokens.csv")


def test_table_of_a_folder(tmp_path, flags, capsys):
    (tmp_path / "in" / "b" / "broken.jpg").write_bytes(b"no image")
    assert run_tool(tokens.main, flags) == 1
    out, error = capsys.readouterr()
    assert "b/broken.jpg" in error and "1 of 4 images could not be read" in error
    assert f"wrote {tmp_path / 'out' / 'tokens.csv'}" in out
    table = read_table(tmp_path)
    places = [(patch // COLUMNS, patch % COLUMNS) for patch in range(NUM_PATCHES)]
    assert list(zip(table.image, table.row, table.column, strict=True)) == [
        (name, *place) for name in ("a.png", "b/c/d.png", "e.png") for place in places
    ]
    weights = table[[f"stage{stage}_weight" for stage in STAGES]]
    np.testing.assert_allclose(table.final_weight, weights.prod(axis=1))
    assert (table.final_token == table.stage3_group).all()
    np.testing.assert_allclose(table.groupby(["image", "final_token"]).final_weight.sum(), 1.0)
    assert set(table.stage1_kind) <= {"single", "pair", "cluster"}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"tokens.csv", "tokens.png", "tokens.pdf"}


def test_dropped_patches_have_empty_cells(tmp_path, flags):
    assert run_tool(tokens.main, [*flags, "--reduction", "topk", "--keep-rate", "0.5"]) == 0
    table = read_table(tmp_path)
    dropped = table[table.stage1_kind == "dropped"]
    assert len(dropped) == 3 * 12
    assert dropped.stage1_importance.notna().all() and (dropped.lost_at == 1).all()
    empty = ["stage1_group", "stage1_weight", "stage2_group", "stage2_importance",
             "stage2_weight", "final_token", "final_weight"]  # fmt: skip
    assert dropped[empty].isna().all(axis=None)
    assert "." not in (tmp_path / "out" / "tokens.csv").read_text().splitlines()[1].split(",")[4]


def test_one_image_and_a_model_without_stages(tmp_path, flags):
    write_checkpoint(tmp_path / "model.pth", **CHANGES | {"reduction_loc": ()})
    assert run_tool(tokens.main, [*flags, "--data-path", tmp_path / "in" / "a.png"]) == 0
    table = read_table(tmp_path)
    assert table.final_token.tolist() == list(range(NUM_PATCHES))
    assert set(table.image) == {"a.png"} and set(table.final_weight) == {1.0}
    assert table.lost_at.isna().all()


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--data-path", "{root}/empty"], ["no image"]),
        (["--data-path", "{root}/missing"], ["missing"]),
        (["--data-path", "{root}/bad"], ["none of the 1 images"]),
        (["--data-path", "{root}/bad", "--bad-images", "error"], ["x.png"]),
        (["--keep-rate", "0"], ["keep_rate", "(0, 1]"]),
        (["--num-images", "0"], ["--num-images", "at least 1"]),
        (["--output-dir", ""], ["--output-dir"]),
    ],
)
def test_bad_input(tmp_path, flags, capsys, changes, words):
    for name in ("empty", "bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no image")
    changes = [word.replace("{root}", str(tmp_path)) for word in changes]
    message = refusal(capsys, tokens.main, [*flags, *changes])
    assert all(word in message for word in words), message
    assert not list(tmp_path.glob("out/*"))


def test_heat_maps_show_the_means(model):
    model.set_reduction("topk")
    table, column = follow(model)
    figure = plot_patches(table, model.reduction_loc)
    maps = [axes for axes in figure.axes if axes.images]
    lost_at = np.nan_to_num(column("lost_at"), nan=4)  # one that is never lost counts as stage 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a patch that no image has any more
        means = [np.nanmean(100 * column(f"stage{i}_importance"), axis=0) for i in STAGES]
    for axes, expected in zip(maps, [*means, lost_at.mean(axis=0)], strict=True):
        shown = np.ma.filled(axes.images[0].get_array(), np.nan)
        np.testing.assert_allclose(shown, expected.reshape(-1, COLUMNS))
    titles = [f"stage {stage} (block {stage})" for stage in STAGES]
    assert [axes.get_title() for axes in maps] == [*titles, "own token lost"]
    bars = [axes.get_ylabel() for axes in figure.axes if not axes.images]
    assert bars == ["importance (%)"] * 3 + ["stage (4: never)"]
    assert "4 images" in figure.get_supxlabel()
