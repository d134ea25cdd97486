"""`benchmark.py` on a tiny model: the columns agree with each other. No test asserts a time."""

import csv
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import benchmark
from benchmarks.configurations import Choice, build_configurations, random_images
from benchmarks.stage import run_stage, stage_calls
from benchmarks.timing import Setting, interleaved_times, peak_mebibytes

MODEL_FLAGS = ["--model-kwargs", "patch_size=8", "embed_dim=24", "depth=3", "num_heads=2"]
MODEL_FLAGS += ["--reduction-loc", "1", "2", "--input-size", "32", "--keep-rate", "0.7", "0.3"]
RUN_FLAGS = ["--device", "cpu", "--repetitions", "10", "--warmup", "1"]
SETTING = Setting(torch.device("cpu"))
CHOICE = Choice(
    "bat_deit_tiny_patch16_224",
    {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "reduction_loc": (1, 2)},
    ("bat", "topk"),
    (0.5,),
)


def run(folder: Path, *flags: str) -> dict:
    """Runs the benchmark, checks that its three files agree, and returns the JSON."""
    assert benchmark.main([*MODEL_FLAGS, *RUN_FLAGS, *flags, "--output-dir", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    content = json.loads(path.read_text())
    rows = content["rows"]
    lines = path.with_suffix(".txt").read_text().splitlines()
    assert lines[0].split() == list(rows[0])
    with path.with_suffix(".csv").open() as file:
        for row, cells, line in zip(rows, csv.DictReader(file), lines[1:], strict=False):
            assert cells == {k: "" if v is None else str(v) for k, v in row.items()}
            shown = dict(zip(row, line.split(), strict=True))
            for name, value in row.items():
                assert shown[name] == "-" if value is None else _same(shown[name], value)
    assert content["setting"]["threads"] == torch.get_num_threads()
    assert all(line in lines for line in content["protocol"])
    return content


def _same(shown: str, value: object) -> bool:
    return shown == value if isinstance(value, str) else float(shown) == float(value)


@pytest.fixture(scope="module")
def model_report(tmp_path_factory) -> dict:
    """One run of `--what model` that the tests below look at."""
    flags = ("--batch-size", "1", "3", "--latency-repetitions", "4", "--break-even")
    return run(tmp_path_factory.mktemp("model"), *flags)


def test_model_rows(model_report: dict) -> None:
    rows = model_report["rows"]
    names = [(row["reduction"], row["keep"], row["batch"]) for row in rows]
    lines = [("dense", 1.0), ("bat", 0.7), ("topk", 0.7), ("bat", 0.3), ("topk", 0.3)]
    assert names == [(*line, batch) for batch in (1, 3) for line in lines]
    assert [row["tokens"] for row in rows[:4]] == ["16", "16>12>9", "16>12>9", "16>5>2"]
    assert {row["break_even"] for row in rows[1:5]} <= {"1", "2", "3", "none"}
    assert all(0 < row["p50_ms"] <= row["p95_ms"] for row in rows)
    assert rows[0]["memory_mib"] < rows[5]["memory_mib"]


def test_model_columns_follow_from_the_timings(model_report: dict) -> None:
    seconds = {(e["batch"], e["reduction"], e["keep"]): e["seconds"] for e in model_report["raw"]}
    gmacs = {(row["reduction"], row["keep"]): row["gmacs"] for row in model_report["rows"]}
    for row in model_report["rows"]:
        batch, keep = row["batch"], row["keep"]
        own, dense = seconds[batch, row["reduction"], keep], seconds[batch, "dense", 1.0]
        assert len(own) == 10
        assert row["images/s"] == pytest.approx(batch / statistics.median(own), abs=0.006)
        pairs = zip(dense, own, strict=True)
        assert row["speedup"] == pytest.approx(statistics.median(a / b for a, b in pairs), abs=6e-5)
        assert row["of_limit"] == pytest.approx(row["speedup"] / row["limit"], rel=1e-3)
        assert row["limit"] == pytest.approx(
            gmacs["dense", 1.0] / gmacs[row["reduction"], keep], rel=0.05
        )
        if row["reduction"] == "dense":
            assert (row["speedup"], row["limit"], row["of_limit"]) == (1, 1, 1)
            assert row["vs_topk"] is None
            continue
        pairs = zip(seconds[batch, "topk", keep], own, strict=True)
        assert row["vs_topk"] == pytest.approx(statistics.median(a / b for a, b in pairs), abs=6e-5)


def test_train(tmp_path: Path) -> None:
    flags = ("--what", "train", "--batch-size", "2", "--dtype", "bf16", "--reduction", "bat")
    dense, *others = run(tmp_path, *flags)["rows"]
    assert (dense["time_ratio"], dense["memory_ratio"]) == (1, 1)
    for row in (dense, *others):
        assert row["images/s"] == pytest.approx(2e3 / row["step_ms"], rel=0.01)
        assert row["memory_ratio"] == pytest.approx(
            row["memory_mib"] / dense["memory_mib"], rel=0.1
        )


def test_stage(tmp_path: Path) -> None:
    content = run(tmp_path, "--what", "stage", "--batch-size", "2", "--dtype", "fp16")
    assert [row["reduction"] for row in content["rows"]] == ["bat", "topk", "bat", "topk"]
    for row, raw in zip(content["rows"], content["raw"], strict=True):
        both = [a + b for a, b in zip(*raw["stage_seconds"], strict=True)]
        shares = [a / b for a, b in zip(both, raw["forward_seconds"], strict=True)]
        assert row["share_all"] == pytest.approx(statistics.median(shares), abs=6e-5)
        assert row["share_1"] > 0 and row["share_2"] > 0


def test_stage_alone_does_what_it_does_in_the_model() -> None:
    _, configuration, _ = build_configurations(CHOICE, (32, 32), SETTING)
    images = random_images(3, (32, 32), SETTING)
    calls = stage_calls(configuration.model, images, SETTING)
    with torch.inference_mode():
        _, assignments = configuration.model.forward_with_assignments(images)
        alone = [run_stage(call).assignment for call in calls]
    assert len(alone) == 2
    assert all(torch.equal(a, b) for a, b in zip(alone, assignments, strict=True))


def test_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(5):
        pixels = rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg")
    flags = ("--what", "data", "--data-path", str(folder), "--batch-size", "2")
    threads = torch.get_num_threads()
    try:
        content = run(tmp_path, *flags)
    finally:
        torch.set_num_threads(threads)
    rows = content["rows"]
    assert [row["images"] for row in rows] == [4] * 10
    assert [row["pipeline"] for row in rows if row["step"] == "loader"] == [
        "bat", "timm", "timm-prefetch", "bat", "timm", "timm-prefetch",
    ]  # fmt: skip
    for row in rows:
        assert row["ms_per_image"] == pytest.approx(1e3 / row["images/s_per_worker"], rel=0.01)
    for split in ("train", "eval"):
        ratios = [
            row["vs_timm"] for row in rows if (row["step"], row["split"]) == ("loader", split)
        ]
        assert 1 in ratios[1:]


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    runs = [lambda name=name: order.append(name) for name in "abc"]
    times = interleaved_times(runs, 2, warmup=1, device=torch.device("cpu"), calls=2)
    assert "".join(order) == "aabbcc" + "bbccaa" + "ccaabb"
    assert [len(seconds) for seconds in times] == [2, 2, 2]


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    def work() -> None:
        first = torch.empty(2**18)  # 1 MiB
        del first
        second, third = torch.empty(2**18), torch.empty(2**19)
        del second, third

    assert peak_mebibytes(work, torch.device("cpu"), resident=2**20) == pytest.approx(4, abs=0.01)


def test_dense_model_is_timms_with_fused_attention() -> None:
    dense = build_configurations(CHOICE, (32, 48), SETTING)[0].model
    assert type(dense).__module__ == "timm.models.vision_transformer"
    assert all(block.attn.fused_attn for block in dense.blocks)
    assert dense.patch_embed.grid_size == (4, 6)
    assert not dense.training


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep-rate", "1.5"], "--keep-rate must be in (0, 1], got 1.5"),
        (["--reduction", "magic"], "invalid choice: 'magic'"),
        (["--repetitions", "9"], "must be at least 10, got '9'"),
        (["--input-size", "32x"], "'32x' is neither SIDE nor HEIGHTxWIDTH"),
        (["--model", "deit_tiny_patch16_224"], "deit_tiny_patch16_224"),
        (["--cuda-graphs"], "--cuda-graphs needs a GPU"),
        (["--what", "train", "--break-even"], "--break-even belongs to --what model"),
        (["--what", "data", "--data-path", "no/such"], "no such folder: no/such"),
        (["--what", "data", "--batch-size", "1", "2"], "takes one --batch-size"),
    ],
)
def test_bad_input_is_one_line(capsys, flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([*MODEL_FLAGS, *RUN_FLAGS, *flags])
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1
