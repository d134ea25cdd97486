"""`tools.benchmark` on a tiny model: the columns agree with each other. No test asserts a time."""

import io
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tool_helpers import refusal, run_tool

from models import speed
from models.speed import Setting
from models.vit import ReducingTransformer
from tools import benchmark, timing

MODEL_FLAGS = ["--model-kwargs", "patch_size=8", "embed_dim=24", "depth=3", "num_heads=2"]
MODEL_FLAGS += ["--reduction-loc", "1", "2", "--input-size", "32", "--base-keep-rate", "0.7", "0.3"]
MODEL_FLAGS += ["--nb-classes", "7"]
RUN_FLAGS = ["--device", "cpu", "--repetitions", "10", "--warmup", "1"]
SETTING = Setting(torch.device("cpu"))


def run(folder: Path, *flags: str) -> dict:
    """Runs the benchmark, checks that its three files agree, and returns the JSON."""
    assert benchmark.main([*MODEL_FLAGS, *RUN_FLAGS, *flags, "--output-dir", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    content = json.loads(path.read_text())
    rows = timing.without_seconds(pd.DataFrame(content["rows"])).astype({"keep": float})
    text = path.with_suffix(".txt").read_text()
    shown = pd.read_csv(io.StringIO(text.partition("\n\n")[0]), sep=r"\s+", na_values="-")
    stored = pd.read_csv(path.with_suffix(".csv"))
    for table in (shown, stored):
        pd.testing.assert_frame_equal(table.astype({"keep": float}), rows, check_dtype=False)
    assert content["setting"]["threads"] == str(torch.get_num_threads())
    assert all(line in text.splitlines() for line in content["protocol"])
    return content


def build_models(img_size: tuple[int, int]) -> list[torch.nn.Module]:
    """The models of `MODEL_FLAGS`."""
    args = benchmark.get_args_parser().parse_args(MODEL_FLAGS)
    return [candidate.model for candidate in benchmark.build_candidates(args, img_size, SETTING)]


def median_ratio(numerators: list[float], denominators: list[float]) -> object:
    """What the table should say, whose values have four decimals."""
    return pytest.approx(np.median(np.divide(numerators, denominators)), abs=6e-5)


@pytest.fixture(scope="module")
def model_report(tmp_path_factory) -> dict:
    """One run of `--what model`."""
    flags = ("--batch-size", "1", "3", "--latency-repetitions", "4")
    return run(tmp_path_factory.mktemp("model"), *flags)


def test_model_rows(model_report: dict) -> None:
    rows = model_report["rows"]
    lines = [("dense", 1.0), ("bat", 0.7), ("topk", 0.7), ("bat", 0.3), ("topk", 0.3)]
    names = [(row["reduction"], row["keep"], row["batch"]) for row in rows]
    assert names == [(*line, batch) for batch in (1, 3) for line in lines]
    assert [row["tokens"] for row in rows[:4]] == ["16", "16>12>9", "16>12>9", "16>5>2"]
    assert all(0 < row["p50_ms"] <= row["p95_ms"] for row in rows)
    assert rows[0]["memory_mib"] < rows[5]["memory_mib"]
    dense = [rows[0][name] for name in ("speedup", "limit", "of_limit", "limit_2", "of_limit_2")]
    assert dense == [1, 1, 1, 1, 1]
    assert rows[0]["vs_topk"] is None


def test_model_columns_follow_from_the_timings(model_report: dict) -> None:
    rows = model_report["rows"]
    seconds = {(row["batch"], row["reduction"], row["keep"]): row["seconds"] for row in rows}
    dense_gmacs = rows[0]["gmacs"]
    for row in rows:
        own = row["seconds"]
        assert len(own) == 10
        assert row["images/s"] == pytest.approx(row["batch"] / np.median(own), abs=0.006)
        assert row["speedup"] == median_ratio(seconds[row["batch"], "dense", 1.0], own)
        assert row["of_limit"] == pytest.approx(row["speedup"] / row["limit"], rel=1e-3)
        assert row["limit"] == pytest.approx(dense_gmacs / row["gmacs"], rel=0.05)
        assert row["read_ms"] > 0 and min(1, row["limit"]) <= row["limit_2"] <= row["limit"]
        assert row["of_limit_2"] == pytest.approx(row["speedup"] / row["limit_2"], rel=1e-3)
        if row["reduction"] != "dense":
            assert row["vs_topk"] == median_ratio(seconds[row["batch"], "topk", row["keep"]], own)


def test_operations(tmp_path: Path) -> None:
    content = run(tmp_path, "--what", "operation", "--batch-size", "2", "--reduction", "bat")
    for model in build_models((32, 32)):  # here every operation is seen, not the slowest alone
        forward = speed.inference(model, SETTING, torch.zeros(2, 3, 32, 32))
        products, _ = timing.operations(forward, SETTING, calls=2)["aten::addmm"]
        assert products == 3 * 4 + 1
    for reduction, keep in (("dense", 1), ("bat", 0.7), ("bat", 0.3)):
        rows = [r for r in content["rows"] if (r["reduction"], r["keep"]) == (reduction, keep)]
        times = [row["ms"] for row in rows]
        assert len(rows) == 10 and times == sorted(times, reverse=True)
        assert 0.2 < sum(row["share"] for row in rows) <= 1


def test_train(tmp_path: Path) -> None:
    flags = ("--what", "train", "--batch-size", "2", "--dtype", "bf16", "--reduction", "bat")
    content = run(tmp_path, *flags)
    dense = content["rows"][0]
    assert (dense["time_ratio"], dense["memory_ratio"]) == (1, 1)
    for row in content["rows"]:
        assert row["images/s"] == pytest.approx(2e3 / row["step_ms"], rel=0.01)
        assert row["time_ratio"] == median_ratio(row["seconds"], dense["seconds"])
        ratio = row["memory_mib"] / dense["memory_mib"]
        assert row["memory_ratio"] == pytest.approx(ratio, rel=0.1)


def test_stage(tmp_path: Path) -> None:
    content = run(tmp_path, "--what", "stage", "--batch-size", "2", "--dtype", "fp16")
    assert [row["reduction"] for row in content["rows"]] == ["bat", "topk", "bat", "topk"]
    for row in content["rows"]:
        both = np.sum(row["stage_seconds"], axis=0)
        assert row["share_all"] == median_ratio(both, row["forward_seconds"])
        assert row["share_1"] == median_ratio(row["stage_seconds"][0], row["forward_seconds"])
        assert row["stage_mib"] > 0 and row["share_2"] > 0


@pytest.mark.parametrize("reduction", ["bat", "bat,cluster_ratio=0.4,match_ratio=0.1", "dpcknn"])
@pytest.mark.parametrize("rate", ["0.7", "0.3"])
def test_memory_of_a_stage_grows_no_faster_than_that_of_fused_attention(reduction, rate) -> None:
    shape = ["--model-kwargs", "depth=1", "--reduction-loc", "0", "--input-size", "224", "512"]
    flags = [*shape, "--what", "stage", "--batch-size", "4", "--reduction", reduction]
    args = benchmark.get_args_parser().parse_args([*flags, *RUN_FLAGS, "--keep-rate", rate])
    small, large = benchmark.measure(args, SETTING)
    assert large["stage_mib"] / small["stage_mib"] < large["attention_mib"] / small["attention_mib"]


def test_stage_alone_does_what_it_does_in_the_model() -> None:
    model = build_models((32, 32))[1]
    images = torch.randn(3, 3, 32, 32)
    stages = benchmark.record_stages(model, images, SETTING)
    with torch.inference_mode():
        _, assignments = model.forward_with_assignments(images)
        alone = [
            benchmark.run_stage(model.blocks[index], inputs).assignment
            for index, inputs in zip((1, 2), stages, strict=True)
        ]
    assert all(torch.equal(a, b) for a, b in zip(alone, assignments, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    runs = [lambda name=name: order.append(name) for name in "abc"]
    setting = SETTING._replace(warmup=1, repetitions=4)
    times = speed.time_rounds(runs, setting)
    rounds = ["".join(order)[3 * turn : 3 * turn + 3] for turn in range(5)]
    assert all(sorted(each) == list("abc") for each in rounds)
    assert len(set(rounds)) > 1
    assert times.shape == (3, 4)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    def work() -> None:
        first = torch.empty(2**18)  # 1 MiB
        del first
        second, third = torch.empty(2**18), torch.empty(2**19)
        del second, third

    assert timing.peak_mebibytes(work, SETTING, resident=2**20) == pytest.approx(4, abs=0.01)


def test_functions_of_one_class_are_compiled_apart(monkeypatch) -> None:
    """torch.compile keeps its graphs, and counts its recompilations, by code object."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    setting = SETTING._replace(compile_mode="default")
    layers = [torch.nn.Linear(2, size) for size in range(1, 11)]  # more than the limit of 8
    forwards = [speed.compiled(layer, setting) for layer in layers]
    x = torch.ones(1, 2)
    for layer, forward in zip(layers, forwards, strict=True):
        torch.testing.assert_close(forward(x), layer(x))


def test_dense_model_is_timms_with_fused_attention() -> None:
    dense, *reducing = build_models((32, 48))
    assert type(dense).__module__ == "timm.models.vision_transformer"
    assert all(block.attn.fused_attn for block in dense.blocks)
    assert dense.patch_embed.grid_size == (4, 6)
    assert not dense.training
    assert all(isinstance(model, ReducingTransformer) for model in reducing)
    assert {model.num_classes for model in (dense, *reducing)} == {7}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep-rate", "1.5"], "keep_rate must be in (0, 1], got 1.5"),
        (["--keep-rate", "nan"], "keep_rate must be in (0, 1], got nan"),
        (["--reduction", "magic"], "unknown method 'magic'"),
        (["--repetitions", "9"], "--repetitions: must be at least 10, got 9"),
        (["--latency-repetitions", "-1"], "must be at least 0, got -1"),
        (["--threads", "0"], "must be at least 1, got 0"),
        (["--ema"], "--ema needs a checkpoint"),
        (["--input-size", "32x"], "'32x' is neither SIDE nor HEIGHTxWIDTH"),
        (["--model-kwargs", "depth"], "takes KEY=VALUE pairs, got 'depth'"),
        (["--model-kwargs", "keep_rate=0.5"], "keep_rate: use --keep-rate"),
        (["--model-kwargs", "no_such=1"], "cannot build"),
        (["--reduction-loc", "99"], "reduction_loc"),
        (["--compile", "reduce-overhead"], "--compile reduce-overhead needs a GPU"),
        (["--what", "stage", "--reduction-loc"], "needs a reducing block"),
        (["--what", "stage", "--model", "vit_small_patch16_18x2_224"], "a ParallelThingsBlock"),
    ],
)
def test_bad_input_is_one_line(capsys, flags: list[str], message: str) -> None:
    assert message in refusal(capsys, benchmark.main, [*MODEL_FLAGS, *RUN_FLAGS, *flags])


def test_full_disk_is_one_line(capsys, monkeypatch, tmp_path: Path) -> None:
    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    flags = [*MODEL_FLAGS, *RUN_FLAGS, "--latency-repetitions", "0", "--output-dir", tmp_path]
    assert run_tool(benchmark.main, flags) == 4
    last = capsys.readouterr().out.splitlines()[-1]
    assert "stopped: cannot write" in last and "No space left on device" in last
    assert not any(tmp_path.iterdir())
