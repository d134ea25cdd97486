"""Evo-ViT against a slow loop of its published arithmetic, its training, and its checkpoints."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, RUN_FLAGS, build_tiny, draw_batch
from test_published_methods import attend_slowly, heads_of
from torch import Tensor

from checkpoints import load_checkpoint, model_from_checkpoint
from losses import TwoHeadLoss
from models import make_reducing
from models.trace import PatchKind, trace_patches, unmerge
from models.weights import EVO_GROUPS, from_evo_names
from tools.tokens import follow_patches
from visualize_mask import KIND_LABELS

IMAGES = draw_batch(3, 3, 32, 48)  # 4 x 6 patches
EVO = {
    "img_size": (32, 48), "depth": 6, "reduction": "evo", "reduction_loc": (2, 4),
    "keep_rate": (0.4, 0.6),
}  # fmt: skip


def run_slowly(model, image: Tensor, selecting: dict[int, float]) -> tuple[Tensor, list[set[int]]]:
    """Last tokens of one image, all patches in their places, and by stage the active ones.

    `selecting`: the share of patches that become active before a block.
    """
    x = model._pos_embed(model.patch_embed(image[None]))[0]
    cls, grid = x[:1], list(x[1:])
    active, score, stages = list(range(len(grid))), None, []
    for index, block in enumerate(model.blocks):
        if index in selecting:
            kept = -int(-selecting[index] * len(grid) // 1)
            active = sorted(range(len(grid)), key=lambda n: (-score[n], n))[:kept]
            stages.append(set(active))
        tokens = torch.cat([cls, torch.stack([grid[n] for n in active])])
        attention, _, values = heads_of(block, tokens)
        row = attention[:, 0, 1:].sum(dim=0).tolist()
        tokens = attend_slowly(block, tokens, attention, values)
        tokens = tokens + block.mlp(block.norm2(tokens))
        cls = tokens[:1]
        for place, n in enumerate(active):
            grid[n] = tokens[1 + place]
        if index < min(selecting):
            score = row
        else:
            for place, n in enumerate(active):
                score[n] = 0.5 * score[n] + 0.5 * row[place]
    return torch.cat([cls, torch.stack(grid)]), stages


@pytest.mark.parametrize("layer_wise", [False, True])
@torch.no_grad()
def test_against_a_slow_loop(layer_wise: bool) -> None:
    model = build_tiny(**EVO)
    model.layer_wise = layer_wise
    selecting = {2: 0.4, 4: 0.6} | ({3: 0.4, 5: 0.6} if layer_wise else {})
    slow = [run_slowly(model, image, selecting) for image in IMAGES]
    expected = model.norm(torch.stack([tokens for tokens, _ in slow]))
    torch.testing.assert_close(model.forward_features(IMAGES), expected, rtol=0, atol=1e-5)
    logits, assignments = model.forward_with_assignments(IMAGES)
    torch.testing.assert_close(logits, model.head(expected[:, 0]), rtol=0, atol=1e-5)
    own = [stages[:: 2 if layer_wise else 1] for _, stages in slow]
    for stage, assignment in enumerate(assignments):
        assert assignment.shape == (3, 24)
        for b in range(3):
            kept = {n for n, place in enumerate(assignment[b].tolist()) if place >= 0}
            assert kept == own[b][stage]
    assert any(own[b][1] - own[b][0] for b in range(3)), "patches come back"


@torch.no_grad()
def test_nothing_is_gone() -> None:
    model = build_tiny(**EVO)
    _, assignments = model.forward_with_assignments(IMAGES)
    tokens = model.run_blocks(IMAGES)[0][:, 1:]
    assert unmerge(tokens, assignments, waits=True) is tokens and tokens.shape == (3, 24, 32)
    maps = model.forward_intermediates(IMAGES, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(maps[-1], tokens) and all(each.shape == tokens.shape for each in maps)
    waiting = assignments[0] < 0
    assert torch.equal(maps[3][waiting], maps[1][waiting]), "those that wait do not change"
    assert not torch.equal(maps[3][~waiting], maps[1][~waiting])
    for trace, assignment in zip(
        trace_patches(assignments, model.stages()), assignments, strict=True
    ):
        assert torch.equal(trace.kind == PatchKind.WAITING, assignment < 0)
        assert torch.equal(trace.size, torch.ones_like(assignment))
    table = follow_patches(model, IMAGES, ["a", "b", "c"])
    assert set(table.stage1_kind) == {"single", "waiting"} and (table.final_weight == 1).all()
    assert table.final_token.tolist() == 3 * list(range(24)) and table.lost_at.isna().all()
    assert PatchKind.WAITING in KIND_LABELS


@torch.no_grad()
def test_keep_rate_one_is_the_dense_model() -> None:
    model, dense = build_tiny(**EVO), build_tiny(**EVO | {"reduction": "none"})
    model.set_keep_rate(1.0)
    assert torch.equal(model(IMAGES), dense(IMAGES))


@torch.no_grad()
def test_readout_of_the_mean_patch() -> None:
    model = build_tiny(**EVO, evo_readout="mean")
    for head in (model.head_cls, model.norm_cls):
        head.weight.copy_(draw_batch(*head.weight.shape, seed=3))
    tokens = model.run_blocks(IMAGES)[0]
    average = model.head(model.norm(tokens[:, 1:].mean(dim=1)))
    torch.testing.assert_close(model(IMAGES), average, rtol=0, atol=1e-6)
    logits, class_logits = model.train()(IMAGES)
    torch.testing.assert_close(logits, average, rtol=0, atol=1e-6)
    expected = model.head_cls(model.norm_cls(tokens[:, 0]))
    torch.testing.assert_close(class_logits, expected, rtol=0, atol=1e-6)
    targets = torch.tensor([0, 1, 2])
    criterion = lambda inputs, logits, targets: torch.nn.functional.cross_entropy(logits, targets)  # noqa: E731
    loss = TwoHeadLoss(criterion)(IMAGES, (logits, class_logits), targets)
    halves = [criterion(None, each, targets) for each in (logits, class_logits)]
    torch.testing.assert_close(loss, 0.5 * halves[0] + 0.5 * halves[1])
    # Other methods read the class token, by its own head.
    model.eval().set_reduction("none")
    whole = model.norm_cls(model.run_blocks(IMAGES)[0])
    torch.testing.assert_close(model(IMAGES), model.head_cls(whole[:, 0]), rtol=0, atol=1e-6)
    model.set_reduction("evo", evo_readout="mean")
    torch.testing.assert_close(model(IMAGES), average, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="evo_readout 'mean' needs a VisionTransformer"):
        make_reducing(build_tiny(num_classes=0), reduction="evo", evo_readout="mean")
    with pytest.raises(ValueError, match="not block 0"):
        make_reducing(model, reduction="evo", reduction_loc=(0, 2))


def to_evo_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a DeiT under the names of Evo-ViT's code."""
    renamed = {}
    groups = {theirs: group for group, theirs in EVO_GROUPS.items()}
    for name, value in weights.items():
        block, _, part = name.removeprefix("blocks.").partition(".")
        module, _, kind = part.rpartition(".")
        if not name.startswith("blocks."):
            renamed[name] = value
        elif module == "attn.qkv":
            width = len(value) // 3
            renamed[f"qks.{block}.qk.{kind}"] = value[: 2 * width]
            renamed[f"vs.{block}.v.{kind}"] = value[2 * width :]
        elif module in groups:
            renamed[f"{groups[module]}.{block}.{kind}"] = value
        else:
            renamed[name] = value
    return renamed


def test_names_there_and_back(tmp_path) -> None:
    model = build_tiny(**EVO | {"depth": 10, "reduction_loc": (4, 8), "keep_rate": 0.5})
    make_reducing(model, **model.reduction_settings() | {"evo_readout": "mean"})
    weights = model.state_dict()
    theirs = to_evo_names(weights)
    assert theirs["qks.3.qk.weight"].shape == (64, 32) and theirs["vs.3.v.bias"].shape == (32,)
    names = {"projs.0.weight", "norms.9.bias", "blocks.2.norm2.weight", "blocks.2.mlp.fc1.bias"}
    assert names | {"norm_cls.weight", "head_cls.bias", "norm.weight", "head.bias"} <= theirs.keys()
    assert not any("attn" in name or "norm1" in name for name in theirs)
    back = from_evo_names(theirs)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    assert from_evo_names(back) is back
    path = tmp_path / "evo.pth"
    torch.save({"model": theirs}, path)
    read = load_checkpoint(path)
    loaded = model_from_checkpoint(
        read, model_name="bat_deit_tiny_patch16_224", img_size=(32, 48), patch_size=8,
        embed_dim=32, depth=10, num_heads=2, **read["model_args"] and {
            name: read["model_args"][name]
            for name in ("reduction", "keep_rate", "reduction_loc", "evo_readout")
        },
    )  # fmt: skip
    assert (loaded.reduction, loaded.reduction_loc) == ("evo", (4, 8))
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES))


def test_training(data_path, run_main, tmp_path) -> None:
    flags = [
        "--model", "bat_deit_tiny_patch16_224", "--input-size", "32", "--reduction", "evo",
        "--model-kwargs", "patch_size=8", "embed_dim=32", "depth=4", "num_heads=2",
        "--reduction-loc", "1", "3", "--keep-rate", "0.5", "--evo-readout", "mean",
        "--data-path", str(data_path), "--batch-size", "8", *RUN_FLAGS,
    ]  # fmt: skip
    out = tmp_path / "run"
    run_main(*flags, "--epochs", "3", "--evo-layerwise-epochs", "2", "--output-dir", str(out))
    weights = torch.load(out / "checkpoint.pth")["model"]
    assert not torch.equal(weights["head_cls.weight"], weights["head.weight"]), "both are trained"
    best = torch.load(out / "best.pth")
    assert best["epoch"] == 2, "the layer-wise warm-up does not compete"
    model = model_from_checkpoint(load_checkpoint(out / "best.pth"))
    assert model.settings.evo_readout == "mean" and not model.layer_wise
    entries = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert len(entries) == 3
    # DeiT's weights to start from have one head.
    plain = {n: v for n, v in weights.items() if not n.startswith(("head_cls", "norm_cls"))}
    torch.save({"model": plain}, tmp_path / "deit.pth")
    more = ["--finetune", str(tmp_path / "deit.pth"), "--epochs", "1"]
    run_main(*flags, *more, "--train-mode", "--output-dir", str(tmp_path / "tuned"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--evo-layerwise-epochs", "2"], "--evo-layerwise-epochs is for evo, not for bat"),
        (["--evo-readout", "mean"], "evo_readout 'mean' is for evo, not for 'bat'"),
    ],
)
def test_flags_of_evo_alone(data_path, call_main, more: list[str], words: str) -> None:
    flags = [
        "--model", "bat_deit_tiny_patch16_224", "--input-size", "32", "--reduction-loc", "1", "2",
        "--model-kwargs", "patch_size=8", "embed_dim=32", "depth=3", "num_heads=2",
        "--data-path", str(data_path), "--batch-size", "8", *RUN_FLAGS,
    ]  # fmt: skip
    result = call_main(*flags, *more)
    assert result.returncode == 2 and words in result.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_resumed_in_the_warm_up(data_path, tmp_path, processes: int) -> None:
    """Both heads, one or two processes: a run resumed in the layer-wise warm-up is the same."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    flags = [
        "--model", "bat_deit_tiny_patch16_224", "--input-size", "32", "--reduction", "evo",
        "--model-kwargs", "patch_size=8", "embed_dim=32", "depth=4", "num_heads=2",
        "--reduction-loc", "1", "3", "--keep-rate", "0.5", "--evo-readout", "mean",
        "--data-path", str(data_path), "--batch-size", "8", "--epochs", "3",
        "--evo-layerwise-epochs", "2", "--keep-checkpoints", "3", *RUN_FLAGS,
    ]  # fmt: skip

    def train(folder: Path) -> dict:
        command = [sys.executable, *launcher, "main.py", *flags, "--resume", "auto"]
        command += ["--output-dir", str(folder)]
        subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True)
        return torch.load(folder / "checkpoint.pth")["model"]

    whole = train(tmp_path / "whole")
    (tmp_path / "resumed").mkdir()
    first_epoch = tmp_path / "whole" / "checkpoint.2.pth"
    shutil.copy(first_epoch, tmp_path / "resumed" / "checkpoint.pth")
    resumed = train(tmp_path / "resumed")
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
    before = torch.load(first_epoch)["model"]["head_cls.weight"]
    assert not torch.equal(before, whole["head_cls.weight"])
