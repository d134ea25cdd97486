"""`tools.loading` on a few images: both pipelines run, the columns agree. No time is asserted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAIN_IMAGES, VAL_IMAGES
from tool_helpers import refusal, run_tool

from models.speed import Setting
from tools import loading

SETTING = Setting(torch.device("cpu"))


def test_rows(data_path: Path, tmp_path: Path) -> None:
    flags = ["--data-path", data_path, "--num-workers", "0", "1", "--batch-size", "16", "--device"]
    flags += ["cpu", "--repetitions", "2", "--warmup", "0", "--output-dir", tmp_path]
    assert run_tool(loading.main, flags) == 0
    (path,) = tmp_path.glob("loading-cpu-*.json")
    rows = json.loads(path.read_text())["rows"]
    lines = [(row["split"], row["workers"], row["images"]) for row in rows]
    counts = {"train": 4 * TRAIN_IMAGES, "val": 4 * VAL_IMAGES}
    assert lines == [(split, n, count) for n in (0, 1) for split, count in counts.items()]
    for row in rows:
        ratio = np.median(np.divide(row["timm_seconds"], row["own_seconds"]))
        assert row["of_timm"] == pytest.approx(ratio, abs=1e-5)


@pytest.mark.parametrize("is_train", [True, False])
def test_both_pipelines_make_the_same_kind_of_batches(data_path: Path, is_train: bool) -> None:
    args = loading.get_args_parser().parse_args(
        ["--data-path", str(data_path), "--batch-size", "8"]
    )
    batches = []
    for build in (loading.own_loader, loading.timm_loader):
        images, targets = next(iter(build(args, SETTING, workers=0, is_train=is_train)))[:2]
        assert images.shape == (8, 3, 224, 224) and images.dtype == torch.float32
        batches.append((images, targets))
    if not is_train:  # the same images; timm's normalisation is rounded otherwise
        torch.testing.assert_close(batches[0][0], batches[1][0], rtol=0, atol=1e-4)
        assert torch.equal(batches[0][1], batches[1][1])


def test_bad_input_is_one_line(capsys, tmp_path: Path) -> None:
    flags = ["--data-path", str(tmp_path / "missing")]
    assert "does not exist" in refusal(capsys, loading.main, flags)
    assert "must be at least 0" in refusal(capsys, loading.main, [*flags, "--num-workers", "-1"])
