"""A head by ridge regression, against the normal equations, and as a command."""

import numpy as np
import pytest
import torch
from conftest import TINY, draw_batch
from tool_helpers import CPU_FLAGS, refusal, run_tool, write_checkpoint

from checkpoints import load_checkpoint, model_from_checkpoint
from tools import linear_head
from tools.linear_head import fit_head, ridge


def test_ridge_solves_the_normal_equations() -> None:
    x, y = draw_batch(40, 6).double(), draw_batch(40, 3, seed=1).double()
    head = ridge(x, y, 0.1)
    centred = x - x.mean(dim=0)
    strength = 0.1 * centred.square().sum(dim=0).mean()
    gradient = centred.T @ (head(x) - y) + strength * head.weight.T
    assert gradient.abs().max() < 1e-9
    assert (head(x) - y).sum(dim=0).abs().max() < 1e-9


def test_separable_classes_are_told_apart() -> None:
    generator = np.random.default_rng(0)
    labels = torch.from_numpy(generator.integers(0, 4, 400))
    centres = torch.eye(4, 8, dtype=torch.float64)[labels]
    features = 5 * centres + torch.from_numpy(generator.normal(size=(400, 8)))
    head, accuracy, loss = fit_head(features, labels, 4)
    assert accuracy > 95 and loss < 0.3
    assert (head(features).argmax(dim=1) == labels).double().mean() > 0.95


def test_command(data_path, tmp_path, capsys) -> None:
    backbone = write_checkpoint(tmp_path / "backbone.pth")
    headless = {name: v for name, v in backbone["model"].items() if not name.startswith("head.")}
    settings = {name: v for name, v in TINY.items() if name != "num_classes"}
    settings["model_name"] = "bat_deit_tiny_patch16_224"
    torch.save({"model": headless, "model_args": settings}, tmp_path / "headless.pth")
    out = tmp_path / "out" / "head.pth"
    argv = ["--checkpoint", tmp_path / "headless.pth", "--data-path", data_path]
    argv += ["--output-dir", out.parent]
    assert run_tool(linear_head.main, [*argv, "--batch-size", "10", *CPU_FLAGS]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    checkpoint = load_checkpoint(out)
    assert checkpoint["classes"] == ["blue", "green", "red", "yellow"]
    model = model_from_checkpoint(checkpoint)
    for name, value in headless.items():
        assert torch.equal(model.state_dict()[name], value)
    assert model.keep_rates == (0.7, 0.7), "the features alone are those of all tokens"
    assert "no such checkpoint" in refusal(
        capsys, linear_head.main, ["--checkpoint", "nowhere.pth", "--data-path", data_path]
    )
    for data_set in ("CIFAR10", "IMNET"):
        flags = ["--data-path", tmp_path, "--data-set", data_set]
        assert str(tmp_path) in refusal(capsys, linear_head.main, flags)


@pytest.mark.parametrize("penalty", [1e-4, 1e2])
def test_a_greater_penalty_gives_smaller_weights(penalty: float) -> None:
    x, y = draw_batch(30, 5).double(), draw_batch(30, 2, seed=1).double()
    assert ridge(x, y, penalty).weight.norm() > ridge(x, y, 10 * penalty).weight.norm()
