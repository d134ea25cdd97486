"""Sweeps: against separate evaluations, after interrupts, statistics, the figure."""

import json
import signal
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import VAL_IMAGES
from data_helpers import config_of, dataset_args
from tool_helpers import CPU_FLAGS, refusal, run_tool, write_checkpoint
from torch.utils.data import DataLoader

import models
from checkpoints import load_checkpoint, model_from_checkpoint
from datasets import build_dataset
from engine import evaluate
from inputs.batches import DeviceLoader
from tools import sweep
from tools.figures import plot_accuracy
from tools.sweep import (
    Configuration,
    compare_paired,
    comparison_pairs,
    find_configuration,
    make_configurations,
)

NUM_IMAGES = 4 * VAL_IMAGES
COUNTED = {}  # GMACs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder of two checkpoints."""
    folder = tmp_path_factory.mktemp("sweep")
    write_checkpoint(folder / "a.pth", 0)
    write_checkpoint(folder / "b.pth", 1)
    return folder


@pytest.fixture(autouse=True)
def count_gmacs_once(monkeypatch):
    """Counting takes longer than evaluating so small a model: each configuration once."""

    def count(model):
        key = (model.reduction, model.keep_rates, model.stages())
        if key not in COUNTED:
            COUNTED[key] = models.count_gmacs(model)
        return COUNTED[key]

    monkeypatch.setattr(sweep, "count_gmacs", count)


@pytest.fixture(scope="module")
def flags(root, data_path):
    """`flags(output, *more)`: nine configurations of a.pth on 24 images in five batches."""

    def make(output, *more, checkpoints=("a.pth",)):
        words = [
            "--checkpoint", *(root / name for name in checkpoints), "--data-path", data_path,
            "--reduction", "topk", "evit", "bat", "tome", "--keep-rate", "1", "0.7", "0.4",
            "--output-dir", output, "--batch-size", "5", *CPU_FLAGS, *more,
        ]  # fmt: skip
        return [str(word) for word in words]

    return make


def read(output):
    """The rows of sweep.json without forward times, and the arrays of predictions.npz."""
    rows = json.loads((output / "sweep.json").read_text())["results"]
    with np.load(output / "predictions.npz") as stored:
        arrays = dict(stored)
    return [{key: row[key] for key in row if key != "images_per_second"} for row in rows], arrays


def assert_same(output, reference):
    (rows, arrays), (expected_rows, expected) = read(output), read(reference)
    assert rows == expected_rows
    for name in ("predicted", "correct1", "correct5", "loss", "is_bad", "num_done"):
        np.testing.assert_array_equal(arrays[name], expected[name])


@pytest.fixture(scope="module")
def finished(root, flags):
    """Output folder of an uninterrupted sweep of both checkpoints."""
    assert run_tool(sweep.main, flags(root / "both", checkpoints=("a.pth", "b.pth"))) == 0
    return root / "both"


@pytest.fixture(scope="module")
def single(root, flags):
    """Output folder of an uninterrupted sweep of one checkpoint."""
    assert run_tool(sweep.main, flags(root / "single")) == 0
    return root / "single"


@pytest.fixture(scope="module")
def evaluated(data_path):
    """`evaluated(model)`: its accuracies and loss, in an evaluation of its own."""
    args = dataset_args(data_path)
    dataset, _ = build_dataset(False, args, config_of(args, 32))
    cpu = torch.device("cpu")
    loader = DeviceLoader(DataLoader(dataset, batch_size=5), dataset, cpu)
    return lambda model: evaluate(loader, model, cpu, print_freq=100)


def test_sweep_equals_separate_evaluations(root, evaluated, finished):
    rows, arrays = read(finished)
    assert len(rows) == 2 * (1 + 4 * 2)  # the dense model once a checkpoint
    for row, loss in zip(rows, arrays["loss"], strict=True):
        checkpoint = load_checkpoint(root / f"{row['checkpoint']}.pth")
        choice = {name: row[name] for name in ("reduction", "keep_rate")}
        model = model_from_checkpoint(checkpoint, **choice)
        expected = evaluated(model)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-12)
        assert loss.mean() == pytest.approx(row["loss"])
        assert row["tokens"] == [stage.num_outputs for stage in model.stages()]
        if row["checkpoint"] == "a":
            assert row["gmacs"] == models.count_gmacs(model)
    assert len({row["loss"] for row in rows}) == len(rows)  # the configurations do differ


def test_methods_with_settings_of_their_own(root, evaluated, flags, tmp_path):
    variants = ["none", "bat,cluster_ratio=0.2,proportional_attention=on", "tome,tome_r=3"]
    variants += ["evo,keep_rate=0.5,reduction_loc=1+2", "bat", "topk,reduction_loc=2"]
    argv = flags(tmp_path, "--reduction", *variants)
    assert run_tool(sweep.main, argv) == 0
    rows, _ = read(tmp_path)
    checkpoint = load_checkpoint(root / "a.pth")
    settings = {
        variants[1]: {"cluster_ratio": 0.2, "proportional_attention": "on"},
        variants[2]: {
            "reduction": "tome",
            "tome_r": 3,
            "reduction_loc": (0, 1, 2),
            "proportional_attention": "on",
        },
        variants[3]: {"reduction": "evo", "keep_rate": 0.5, "reduction_loc": (1, 2)},
        variants[5]: {"reduction": "topk", "reduction_loc": (2,)},
        "none": {"reduction": "none"},
    }
    names = [(row["reduction"], row["keep_rate"]) for row in rows]
    assert names == [
        ("none", 1), (variants[1], 0.7), (variants[1], 0.4), (variants[2], None),
        (variants[3], None), ("bat", 0.7), ("bat", 0.4), (variants[5], 0.7), (variants[5], 0.4),
    ]  # fmt: skip
    for row in rows:
        rate = {} if row["keep_rate"] is None else {"keep_rate": row["keep_rate"]}
        model = model_from_checkpoint(checkpoint, **settings.get(row["reduction"], {}) | rate)
        expected = evaluated(model)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-12)
        assert row["tokens"] == [stage.num_outputs for stage in model.stages()]


def test_parts_of_the_images(flags, single, tmp_path):
    _, whole = read(single)
    for number in (1, 2, 3):
        output = tmp_path / str(number)
        assert run_tool(sweep.main, flags(output, "--part", f"{number}/3")) == 0
        _, arrays = read(output)
        expected = whole["predicted"][:, number - 1 :: 3]
        np.testing.assert_array_equal(arrays["predicted"], expected)


def test_tables_hold_what_json_holds(finished):
    whole = json.loads((finished / "sweep.json").read_text())
    table = pd.read_csv(finished / "sweep.csv")
    assert list(table.tokens) == [" ".join(map(str, row["tokens"])) for row in whole["results"]]
    assert (table.images_per_second > 0).all()
    pd.testing.assert_frame_equal(
        table.drop(columns="tokens"), pd.DataFrame(whole["results"]).drop(columns="tokens")
    )
    comparisons = pd.read_csv(finished / "comparisons.csv")
    pd.testing.assert_frame_equal(comparisons, pd.DataFrame(whole["comparisons"]))


@pytest.mark.parametrize(("batch_size", "timed"), [(5, slice(5, 20)), (20, slice(0, 24))])
def test_neither_the_first_nor_a_smaller_batch_is_timed(flags, tmp_path, batch_size, timed):
    """As long as others are left."""
    assert run_tool(sweep.main, flags(tmp_path, "--batch-size", batch_size)) == 0
    seconds = read(tmp_path)[1]["seconds"]
    assert (seconds[:, timed] > 0).all()
    assert np.isfinite(seconds).sum() == seconds[:, timed].size


def test_every_batch_is_read_once_and_shown_to_all(flags, tmp_path, monkeypatch, capsys):
    reads, forwards = [], []
    load, timed = sweep.SampleDataset.__getitem__, sweep.timed

    def count_read(self, key):
        reads.append(key)
        return load(self, key)

    def count_forward(run, *place):
        forwards.append(run.func.__name__)
        return timed(run, *place)

    monkeypatch.setattr(sweep.SampleDataset, "__getitem__", count_read)
    monkeypatch.setattr(sweep, "timed", count_forward)
    assert run_tool(sweep.main, flags(tmp_path)) == 0
    assert reads == list(range(NUM_IMAGES))
    assert forwards == 5 * ["run_leading_blocks", *9 * ["forward_with_assignments"]]
    assert f"wrote {tmp_path / 'sweep.csv'}" in capsys.readouterr().out


@pytest.mark.parametrize("where, number", [(22, signal.SIGINT), (44, signal.SIGTERM)])
def test_interrupted_sweep_goes_on(flags, single, tmp_path, monkeypatch, capsys, where, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    timed, calls, stored = sweep.timed, [], []

    def interrupt(run, *args):
        calls.extend([None] * (run.func.__name__ == "forward_with_assignments"))
        if len(calls) == where:
            stored.append(np.load(tmp_path / "predictions.npz")["num_done"])  # if it were killed
            signal.raise_signal(number)
        return timed(run, *args)

    monkeypatch.setattr(sweep, "timed", interrupt)
    assert run_tool(sweep.main, flags(tmp_path, "--save-every", "2")) == 130
    assert "goes on" in capsys.readouterr().err
    assert not (tmp_path / "sweep.csv").exists()
    num_whole = (where - 1) // 9  # batches that all nine configurations have seen
    assert stored == [10 * (num_whole // 2)]
    assert np.load(tmp_path / "predictions.npz")["num_done"] == 5 * num_whole
    for left in (5 - num_whole, 0):  # at last all is done: tables and figure alone
        calls.clear()
        where = None
        assert run_tool(sweep.main, flags(tmp_path)) == 0
        assert len(calls) == 9 * left
        assert_same(tmp_path, single)


def test_other_settings_in_the_same_folder(flags, tmp_path, capsys):
    base = flags(tmp_path)
    assert run_tool(sweep.main, base) == 0
    message = refusal(capsys, sweep.main, [*base, "--match-ratio", "0"])
    assert "other settings" in message and "--restart" in message
    assert "a.match_ratio was 0.1, is 0.0" in message
    assert "batch_size was 5, is 6" in refusal(capsys, sweep.main, [*base, "--batch-size", "6"])
    message = refusal(capsys, sweep.main, [*base, "--ema"])
    assert "ema was False, is True" in message and "a.weights was" in message
    assert run_tool(sweep.main, [*base, "--match-ratio", "0", "--restart"]) == 0
    (tmp_path / "predictions.npz").write_bytes(b"PK broken")
    assert "--restart" in refusal(capsys, sweep.main, base)


def test_ablations_equal_separate_evaluations(root, flags, tmp_path, capsys):
    ablation = {"cluster_ratio": 0.0, "match_ratio": 0.0, "merge_weights": "mean"}
    more = ["--cluster-ratio", "0", "--match-ratio", "0", "--merge-weights", "mean"]
    assert run_tool(sweep.main, flags(tmp_path, *more, "--compare", "bat@0.4", "topk@0.7")) == 0
    assert "a:bat@0.4 less a:topk@0.7: " in capsys.readouterr().out
    assert "a:topk@0.7" in set(pd.read_csv(tmp_path / "comparisons.csv").second)
    rows = {(row["reduction"], row["keep_rate"]): row for row in read(tmp_path)[0]}
    # Without clusters and pairs BAT is pruning.
    assert rows["bat", 0.4]["loss"] == rows["topk", 0.4]["loss"]
    checkpoint = load_checkpoint(root / "a.pth")
    model = model_from_checkpoint(checkpoint, reduction="bat", keep_rate=0.4, **ablation)
    assert rows["bat", 0.4]["gmacs"] == models.count_gmacs(model)


def test_moving_average_of_the_weights(root, evaluated, flags, tmp_path):
    assert run_tool(sweep.main, flags(tmp_path, "--ema")) == 0
    model = model_from_checkpoint(load_checkpoint(root / "a.pth"), ema=True, keep_rate=1.0)
    assert read(tmp_path)[0][0]["loss"] == pytest.approx(evaluated(model)["loss"], rel=1e-12)


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--reduction", "prune"], ["prune", "topk", "dpcknn", "bat"]),
        (["--keep-rate", "0.5", "1.5"], ["(0, 1]", "1.5"]),
        (["--compare", "bat@0.9", "bat@0.7"], ["bat@0.9", "none@1", "tome@0.4"]),
        (["--checkpoint", "missing.pth"], ["missing.pth"]),
        (["--cluster-ratio", "2"], ["cluster_ratio", "2"]),
        (["--batch-size", "0"], ["--batch-size", "0", "at least 1"]),
        (["--save-every", "0"], ["--save-every", "0", "at least 1"]),
        (["--part", "3/2"], ["--part", "must be 1/N to N/N, got 3/2"]),
        (["--part", "half"], ["--part", "half"]),
        (["--reduction", "bat,c=1"], ["'c=1' is not NAME=VALUE", "cluster_ratio"]),
        (["--reduction", "bat,cluster_ratio=2"], ["bat,cluster_ratio=2: ", "[0, 1]"]),
        (["--output-dir", ""], ["--output-dir"]),
        (["--data-path", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_flags(flags, tmp_path, capsys, changes, words):
    message = refusal(capsys, sweep.main, flags(tmp_path, *changes))
    assert all(word in message for word in words), message


def test_class_count_and_input_size_must_fit(root, flags, tmp_path, capsys):
    write_checkpoint(tmp_path / "three.pth", num_classes=3)
    write_checkpoint(tmp_path / "wide.pth", img_size=(32, 48))
    base = [*flags(tmp_path), "--checkpoint"]
    message = refusal(capsys, sweep.main, [*base, tmp_path / "three.pth"])
    assert "three.pth has 3 classes" in message and "has 4" in message
    both = [root / "a.pth", tmp_path / "wide.pth"]
    assert "(32, 48)" in refusal(capsys, sweep.main, [*base, *both])
    assert "must differ" in refusal(capsys, sweep.main, [*base, root / "a.pth", root / "a.pth"])


def test_unreadable_images_are_named_and_counted(data_path, flags, tmp_path, capsys):
    for source in sorted((data_path / "val").glob("*/0.png")):
        folder = tmp_path / "data" / "val" / source.parent.name
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(source.read_bytes())
    bad = tmp_path / "data" / "val" / "green" / "1.png"
    bad.write_bytes(b"no image")
    argv = flags(tmp_path / "out", "--data-path", tmp_path / "data")
    assert run_tool(sweep.main, argv) == 1
    error = capsys.readouterr().err
    assert str(bad) in error and "1 of 5 images could not be read" in error
    rows, arrays = read(tmp_path / "out")
    assert [row["bad_images"] for row in rows] == [1] * 9
    assert not arrays["correct5"][:, 2].any()
    with pytest.raises(SystemExit, match="2"):
        run_tool(sweep.main, [*argv, "--bad-images", "error", "--restart"])
    assert str(bad) in capsys.readouterr().err.splitlines()[-1]


def test_configurations_and_their_names():
    entries = make_configurations(["x"], ["none", "evit", "topk", "bat"], [1.0, 0.5, 0.25])
    names = [entry.short_name for entry in entries]
    assert names == ["none@1"] + [f"{m}@{r}" for m in ("evit", "topk", "bat") for r in (0.5, 0.25)]
    for name in ("bat@0.5", "x:bat@0.5"):
        assert find_configuration(entries, name) == names.index("bat@0.5")
    pairs = [(names[a], names[b]) for a, b in comparison_pairs(entries)]
    wanted = [("topk", "evit"), ("bat", "evit"), ("bat", "topk")]
    assert sorted(pairs) == sorted((f"{a}@{r}", f"{b}@{r}") for a, b in wanted for r in (0.5, 0.25))
    two = [Configuration(label, "bat", 0.5) for label in ("x", "y")]
    assert find_configuration(two, "y:bat@0.5") == 1
    with pytest.raises(ValueError, match=r"more than one.*x:bat@0.5, y:bat@0.5"):
        find_configuration(two, "bat@0.5")


def answers(both, only_first, only_second, neither):
    counts = [both, only_first, only_second, neither]
    return np.repeat([1, 1, 0, 0], counts) > 0, np.repeat([1, 0, 1, 0], counts) > 0


@pytest.mark.parametrize(
    "only_first, only_second, p_value",
    [
        (10, 0, 2 / 2**10),
        (0, 0, 1.0),
        (5, 5, 1.0),
        # Two-sided: 2 * sum of C(16, k) / 2^16 for k = 0 .. 3.
        (3, 13, 2 * (1 + 16 + 120 + 560) / 2**16),
    ],
)
def test_mcnemar_against_hand_counts(only_first, only_second, p_value):
    result = compare_paired(*answers(20, only_first, only_second, 30))
    assert result["p_value"] == pytest.approx(p_value, rel=1e-12)
    total = 50 + only_first + only_second
    assert result["difference"] == pytest.approx(100 * (only_first - only_second) / total)
    assert (result["only_first"], result["only_second"]) == (only_first, only_second)
    mirrored = compare_paired(*answers(20, only_second, only_first, 30))
    assert mirrored["p_value"] == result["p_value"]
    assert mirrored["difference"] == -result["difference"]


def test_bootstrap_interval():
    first, second = answers(400, 90, 50, 460)
    result = compare_paired(first, second, seed=3)
    assert result == compare_paired(first, second, seed=3)
    # The definition: draw the images one by one, with replacement.
    rng = np.random.default_rng(0)
    gain = first.astype(int) - second
    drawn = gain[rng.integers(0, 1000, (4000, 1000))].mean(axis=1)
    expected = np.percentile(100 * drawn, [2.5, 97.5])
    assert [result["difference_low"], result["difference_high"]] == pytest.approx(
        expected, abs=0.15
    )
    # The normal approximation: 4 +- 1.96 * sqrt(0.14 - 0.04^2) / sqrt(1000) * 100.
    width = 2 * 1.96 * 0.372 / 1000**0.5 * 100
    assert result["difference_high"] - result["difference_low"] == pytest.approx(width, rel=0.05)
    same = compare_paired(first, first)
    same.pop("acc1_first"), same.pop("acc1_second")
    assert list(same.values()) == [0, 0, 0, 0, 0, 1]


def test_comparisons_come_from_the_predictions(finished):
    _, arrays = read(finished)
    names = json.loads(str(arrays["settings"]))["configurations"]
    table = pd.read_csv(finished / "comparisons.csv")
    assert len(table) == 2 * 2 * 5  # a checkpoint and keep rate: 3 with bat, 2 more with evit
    for line in table.itertuples():
        first, second = (arrays["correct1"][names.index(n)] for n in (line.first, line.second))
        assert line.only_first == (first & ~second).sum()
        assert line.difference == pytest.approx(100 * (first.mean() - second.mean()))


def test_interval_of_the_accuracy(finished):
    """Wilson's: where the true share p is 1.96 standard errors sqrt(p (1 - p) / n) away."""
    rows, _ = read(finished)
    z = NormalDist().inv_cdf(0.975)
    for row in rows:
        share, low, high = (row[name] / 100 for name in ("acc1", "acc1_low", "acc1_high"))
        assert 0 <= low <= share <= high <= 1
        for end in {low, high} - {0, 1}:
            error = (end * (1 - end) / NUM_IMAGES) ** 0.5
            assert abs(end - share) == pytest.approx(z * error)
    assert all(name in pd.read_csv(finished / "sweep.csv") for name in ("acc1_low", "acc1_high"))
    figure = plot_accuracy(rows, bars="95 % interval")
    segments = [bar for bars in figure.axes[0].collections for bar in bars.get_segments()]
    drawn = sorted((bar[0, 0], bar[0, 1], bar[1, 1]) for bar in segments)
    expected = sorted((row["gmacs"], row["acc1_low"], row["acc1_high"]) for row in rows)
    np.testing.assert_allclose(drawn, expected)
    assert "bars: 95 % interval" in figure.legends[0].get_title().get_text()


def test_figure_shows_the_table(finished):
    rows, _ = read(finished)
    axes = plot_accuracy(rows, bars="").axes[0]
    assert "GMACs" in axes.get_xlabel() and "%" in axes.get_ylabel()
    lines = {line.get_gid(): line for line in axes.lines}
    assert set(lines) == {f"{c}:{m}" for c in "ab" for m in ("none", "topk", "evit", "bat", "tome")}
    for gid, line in lines.items():
        checkpoint, method = gid.split(":")
        expected = sorted(
            (row["gmacs"], row["acc1"])
            for row in rows
            if row["checkpoint"] == checkpoint and row["reduction"] in (method, "none")
        )
        assert [tuple(point) for point in line.get_xydata()] == expected
    assert len({line.get_color() for line in lines.values()}) == 5
    assert lines["a:bat"].get_color() == lines["b:bat"].get_color()
    assert lines["a:bat"].get_linestyle() != lines["b:bat"].get_linestyle()
    labels = [(text.get_text(), text.xy) for text in axes.texts]
    assert sorted(text for text, _ in labels) == ["0.4", "0.4", "0.7", "0.7"]
    points = {(row["gmacs"], row["acc1"]): row["keep_rate"] for row in rows}
    assert all(float(text) == points[point] for text, point in labels)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for suffix, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert (finished / f"sweep.{suffix}").read_bytes().startswith(start)
