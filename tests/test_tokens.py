"""Following patches: weights that add up, against products of matrices; table and heat maps."""

import csv

import numpy as np
import pytest
import timm
import torch
from data_helpers import random_image

import analyze
import models
from analysis.figures import plot_patches
from analysis.tokens import PatchMeans, group_shares, record_stages, trace_batch
from models.grouping import merge_tokens
from models.trace import PatchKind

ROWS, COLUMNS, NUM_PATCHES = 4, 6, 24
MODEL_ARGS = {
    "model_name": "bat_deit_tiny_patch16_224",
    "img_size": (32, 48),
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 5,
    "num_heads": 3,
    "num_classes": 3,
    "reduction_loc": (1, 2, 3),
    "keep_rate": 0.7,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = timm.create_model(**MODEL_ARGS).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 8  # attention that is far from even
    return model


def images(count=4):
    return torch.randn(count, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def test_shares_of_groups():
    assignment = torch.tensor([[0, 1, 0, -1, 2, 2]])
    weights = torch.tensor([[1.0, 5.0, 3.0, 9.0, 0.0, 0.0]])
    expected = torch.tensor([[0.25, 1.0, 0.75, 0.0, 0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(group_shares(weights, assignment, 3), expected)


@pytest.mark.parametrize("reduction", models.REDUCTIONS)
@pytest.mark.parametrize("merge_weights", ["importance", "mean"])
def test_weights_of_a_final_token_sum_to_one(model, reduction, merge_weights):
    model.set_reduction(reduction)
    for index in model.reduction_loc:
        model.blocks[index].merge_weights = merge_weights
    history = trace_batch(model, images())
    for final, weight in zip(history.final_token, history.final_weight, strict=True):
        inside = final >= 0
        assert weight[~inside].isnan().all() and (weight[inside] >= 0).all()
        sums = torch.zeros(int(final.max()) + 1, dtype=torch.float64)
        sums.scatter_add_(0, final[inside], weight[inside])
        torch.testing.assert_close(sums, torch.ones_like(sums))
    drops = reduction in ("topk", "random")
    assert (history.final_token < 0).any() == drops
    _, assignments = model.forward_with_assignments(images())
    composed = assignments[0]
    for assignment in assignments[1:]:
        following = assignment.gather(1, composed.clamp(min=0))
        composed = torch.where(composed < 0, composed, following)
    assert torch.equal(history.final_token, composed)


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
    with torch.no_grad(), record_stages(model) as records:
        model(images())
    for record in records:
        # ToMe's own steps merge as well, on the way to an assignment: the stage's merge comes last.
        *_, matrix = (entry for entry in matrices if entry.shape[2] == record.share.shape[1])
        matrix = matrix / matrix.sum(dim=2, keepdim=True)  # EViT's fused row alone is not 1 yet
        torch.testing.assert_close(matrix.sum(dim=1), record.share.float())


def test_final_weights_are_the_product_of_the_stage_matrices(model):
    model.set_reduction("bat")
    with torch.no_grad(), record_stages(model) as records:
        model(images())
    product = torch.eye(NUM_PATCHES, dtype=torch.float64).expand(4, -1, -1)
    for record, stage in zip(records, model.stages(), strict=True):
        group = torch.arange(stage.num_outputs)[:, None]
        matrix = torch.where(record.assignment[:, None] == group, record.share[:, None], 0.0)
        product = matrix @ product  # (4, K, 24)
    history = trace_batch(model, images())
    expected = product.gather(1, history.final_token[:, None]).squeeze(1)
    torch.testing.assert_close(history.final_weight, expected)
    torch.testing.assert_close(product.sum(dim=2), torch.ones(4, product.shape[1]).double())


def test_importance_is_that_of_the_token_before(model):
    model.set_reduction("topk")
    with torch.no_grad(), record_stages(model) as records:
        model(images())
    history = trace_batch(model, images())
    first, second = records[0], records[1]
    torch.testing.assert_close(history.importance[:, 0], first.importance.double())
    for b in range(4):
        for patch in range(NUM_PATCHES):
            token = int(first.assignment[b, patch])
            value = history.importance[b, 1, patch].item()
            if token < 0:
                assert np.isnan(value)
            else:
                assert value == pytest.approx(second.importance[b, token].item())
    # Of the patches that stay in the first stage, all are more important than those that go.
    stays = history.group[:, 0] >= 0
    for b in range(4):
        importance = history.importance[b, 0]
        assert importance[stays[b]].min() >= importance[~stays[b]].max()


def test_when_the_own_token_is_lost(model):
    for reduction in ("none", "topk", "bat"):
        model.set_reduction(reduction)
        history = trace_batch(model, images())
        for b in range(4):
            for patch in range(NUM_PATCHES):
                kinds = [*history.kind[b, :, patch].tolist(), None]
                lost = next(i for i, kind in enumerate(kinds, 1) if kind != PatchKind.SINGLE)
                assert history.lost_at[b, patch] == lost
        assert (history.lost_at == 4).all() == (reduction == "none")
    means = PatchMeans()
    means.add(some_images(history, slice(0, 3)))
    means.add(some_images(history, slice(3, 4)))
    assert means.num_images == 4
    np.testing.assert_allclose(means.lost_at(), history.lost_at.double().mean(dim=0))
    np.testing.assert_allclose(means.importance(), history.importance.nanmean(dim=0))


def some_images(history, part):
    return type(history)(*(field[part] for field in history))


def write_inputs(tmp_path, **changes):
    """A checkpoint, and a folder with three images, one of them two folders down, and a bad one."""
    torch.manual_seed(0)
    model = timm.create_model(**MODEL_ARGS | changes)
    checkpoint = tmp_path / "model.pth"
    torch.save({"model": model.state_dict(), "model_args": MODEL_ARGS | changes}, checkpoint)
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "b" / "c").mkdir(parents=True)
    for name in ("a.png", "b/c/d.png", "e.png"):
        random_image(rng).save(tmp_path / "in" / name)
    return [
        "tokens", "--checkpoint", str(checkpoint), "--data-path", str(tmp_path / "in"),
        "--output-dir", str(tmp_path / "out"), "--batch-size", "2", "--device", "cpu",
    ]  # fmt: skip


def read_table(tmp_path):
    with open(tmp_path / "out" / "tokens.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_table_of_a_folder(tmp_path, capsys):
    command = write_inputs(tmp_path)
    (tmp_path / "in" / "b" / "broken.jpg").write_bytes(b"no image")
    assert analyze.main(command) == 1
    error = capsys.readouterr().err
    assert "b/broken.jpg" in error and "1 of 4 images could not be read" in error
    table = read_table(tmp_path)
    assert [(row["image"], int(row["row"]), int(row["column"])) for row in table] == [
        (name, patch // COLUMNS, patch % COLUMNS)
        for name in ("a.png", "b/c/d.png", "e.png")
        for patch in range(NUM_PATCHES)
    ]
    sums = {}
    for row in table:
        product = np.prod([float(row[f"stage{stage}_weight"]) for stage in (1, 2, 3)])
        assert float(row["final_weight"]) == pytest.approx(product)
        key = row["image"], row["final_token"]
        sums[key] = sums.get(key, 0.0) + float(row["final_weight"])
        kinds = [row[f"stage{stage}_kind"] for stage in (1, 2, 3)]
        lost = [stage for stage, kind in enumerate(kinds, 1) if kind != "single"]
        assert row["lost_at"] == (str(lost[0]) if lost else "")
        assert row["final_token"] == row["stage3_group"]
    assert sums == pytest.approx(dict.fromkeys(sums, 1.0))
    assert {row["stage1_kind"] for row in table} <= {"single", "pair", "cluster"}


def test_dropped_patches_have_empty_cells(tmp_path):
    command = [*write_inputs(tmp_path), "--reduction", "topk", "--keep-rate", "0.5"]
    assert analyze.main(command) == 0
    table = read_table(tmp_path)
    dropped = [row for row in table if row["stage1_kind"] == "dropped"]
    assert len(dropped) == 3 * 12
    for row in dropped:
        assert row["stage1_importance"] and row["lost_at"] == "1"
        empty = ("stage1_group", "stage1_weight", "stage2_group", "stage2_importance",
                 "stage2_weight", "final_token", "final_weight")  # fmt: skip
        assert [row[name] for name in empty] == [""] * len(empty)


def test_one_image_and_a_model_without_stages(tmp_path):
    command = write_inputs(tmp_path, reduction_loc=())
    command[command.index(str(tmp_path / "in"))] = str(tmp_path / "in" / "a.png")
    assert analyze.main(command) == 0
    table = read_table(tmp_path)
    assert len(table) == NUM_PATCHES
    assert [row["final_token"] for row in table] == [str(patch) for patch in range(NUM_PATCHES)]
    assert {(row["image"], row["final_weight"], row["lost_at"]) for row in table} == {
        ("a.png", "1.0", "")
    }


def test_bad_input(tmp_path, capsys):
    command = write_inputs(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no image")
    for changes, words in (
        (["--data-path", str(empty)], ["no image"]),
        (["--data-path", str(tmp_path / "missing")], ["missing"]),
        (["--data-path", str(tmp_path / "bad")], ["none of the 1 images"]),
        (["--reduction", "prune"], ["prune", "evit", "bat"]),
        (["--keep-rate", "0"], ["keep_rate", "(0, 1]"]),
    ):
        with pytest.raises(SystemExit, match="2"):
            analyze.main([*command, *changes])
        message = capsys.readouterr().err.splitlines()[-1]
        assert all(word in message for word in words), message


def test_heat_maps_show_the_values():
    rng = np.random.default_rng(0)
    importance, lost_at = rng.random((3, 4, 6)), rng.random((4, 6))
    importance[2, 0, 0] = np.nan
    figure = plot_patches(importance, lost_at, (3, 6, 9), 5)
    maps = [axes for axes in figure.axes if axes.images]
    assert len(maps) == 4
    for axes, expected in zip(maps, [*100 * importance, lost_at], strict=True):
        shown = np.ma.filled(axes.images[0].get_array(), np.nan)
        np.testing.assert_allclose(shown, expected)
    assert [axes.get_title() for axes in maps[:3]] == [
        f"stage {stage} (block {block})" for stage, block in ((1, 3), (2, 6), (3, 9))
    ]
    bars = [axes.get_ylabel() for axes in figure.axes if not axes.images]
    assert bars == ["importance (%)"] * 3 + ["stage (4: never)"]
    assert "5 images" in figure.get_supxlabel()
