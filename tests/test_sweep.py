"""Sweeps: against separate evaluations, after interrupts of every kind, statistics, the figure."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from data_helpers import dataset_args
from PIL import Image

import analyze
import models
from analysis import sweep
from analysis.figures import plot_sweep
from analysis.paired import compare_paired, comparison_pairs
from analysis.sweep import Configuration, find_configuration, make_configurations
from builders import build_val_loader
from checkpoints import load_checkpoint, model_from_checkpoint
from datasets import build_dataset
from engine import evaluate

NUM_CLASSES, IMAGES_A_CLASS = 6, 4
MODEL_ARGS = {
    "model_name": "bat_deit_tiny_patch16_224",
    "img_size": (32, 32),
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 3,
    "num_classes": NUM_CLASSES,
    "reduction_loc": (1, 2),
}
TIMES = ("images_per_second",)
COUNTED = {}  # GMACs


def write_checkpoint(path, seed, **changes):
    """A model with random weights and attention that is far from even."""
    torch.manual_seed(seed)
    model = timm.create_model(**MODEL_ARGS | changes)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            parameter.data *= 8
    torch.save({"model": model.state_dict(), "model_args": MODEL_ARGS | changes}, path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two checkpoints, and a validation set whose images differ in colour and texture."""
    folder = tmp_path_factory.mktemp("sweep")
    rng = np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        (folder / "data" / "val" / f"class{label}").mkdir(parents=True)
        for index in range(IMAGES_A_CLASS):
            pixels = rng.integers(0, 256, (32, 32, 3)) * rng.random(3)
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(folder / "data" / "val" / f"class{label}" / f"{index}.png")
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


def flags(root, output, *more, checkpoints=("a.pth",)):
    return [
        "sweep", "--checkpoint", *(str(root / name) for name in checkpoints),
        "--reduction", "topk", "evit", "bat", "tome", "--keep-rate", "1", "0.7", "0.4",
        "--data-path", str(root / "data"), "--output-dir", str(output),
        "--batch-size", "5", "--num-workers", "0", "--device", "cpu", *more,
    ]  # fmt: skip


def read(output, drop=TIMES):
    """Rows of sweep.json without forward times, and the arrays of predictions.npz."""
    rows = json.loads((output / "sweep.json").read_text())["results"]
    rows = [{key: row[key] for key in row if key not in drop} for row in rows]
    with np.load(output / "predictions.npz") as stored:
        arrays = {name: stored[name] for name in stored.files if name not in ("seconds",)}
    return rows, arrays


@pytest.fixture(scope="module")
def finished(root):
    """Output folder of an uninterrupted sweep of both checkpoints."""
    output = root / "finished"
    assert analyze.main(flags(root, output, checkpoints=("a.pth", "b.pth"))) == 0
    return output


@pytest.fixture(scope="module")
def single(root):
    """Output folder of an uninterrupted sweep of one checkpoint."""
    assert analyze.main(flags(root, root / "single")) == 0
    return root / "single"


def test_sweep_equals_separate_evaluations_to_the_last_digit(root, finished):
    dataset, _ = build_dataset(False, dataset_args(root / "data", input_size=32))
    args = Namespace(batch_size=5, num_workers=0, pin_mem=False, dist_eval=True, image_cache="")
    loader = build_val_loader(args, dataset, torch.device("cpu"))
    rows, _ = read(finished)
    assert len(rows) == 2 * (1 + 4 * 2)  # the dense model once a checkpoint
    for row in rows:
        checkpoint = load_checkpoint(root / f"{row['checkpoint']}.pth")
        choice = {name: row[name] for name in ("reduction", "keep_rate")}
        model = model_from_checkpoint(checkpoint, **choice)
        expected = evaluate(loader, model, torch.device("cpu"), print_freq=100)
        assert {name: row[name] for name in expected} == expected
        assert row["tokens"] == [stage.num_outputs for stage in model.stages()]
        assert row["gmacs"] == models.count_gmacs(model)
    assert len({row["loss"] for row in rows}) == len(rows)  # the configurations do differ


def test_csv_holds_what_json_holds(finished):
    rows, _ = read(finished, drop=())
    with open(finished / "sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for row, line in zip(rows, table, strict=True):
        assert line["tokens"] == " ".join(map(str, row["tokens"]))
        for name in ("acc1", "acc5", "loss", "gmacs", "images_per_second"):
            assert float(line[name]) == row[name]
        assert row["images_per_second"] > 0


def test_every_batch_is_read_once_and_shown_to_all(root, tmp_path, monkeypatch):
    reads, forwards = [], []
    load, answer = sweep.SampleDataset.__getitem__, sweep.answer_batch

    def count_read(self, key):
        reads.append(key)
        return load(self, key)

    def count_forward(model, *batch, **options):
        forwards.append((id(model), len(batch[0])))
        return answer(model, *batch, **options)

    monkeypatch.setattr(sweep.SampleDataset, "__getitem__", count_read)
    monkeypatch.setattr(sweep, "answer_batch", count_forward)
    assert analyze.main(flags(root, tmp_path)) == 0
    assert reads == list(range(24))
    assert len(forwards) == 9 * 5 and len({model for model, _ in forwards}) == 1


@pytest.mark.parametrize("where, number", [(22, signal.SIGINT), (44, signal.SIGTERM)])
def test_interrupted_sweep_goes_on(root, single, tmp_path, monkeypatch, capsys, where, number):
    answer, calls = sweep.answer_batch, []

    def interrupt(*args, **options):
        calls.append(None)
        if len(calls) == where:
            signal.raise_signal(number)
        return answer(*args, **options)

    monkeypatch.setattr(sweep, "answer_batch", interrupt)
    assert analyze.main(flags(root, tmp_path)) == 128 + number
    assert "goes on" in capsys.readouterr().err
    assert not (tmp_path / "sweep.csv").exists()
    num_whole = (where - 1) // 9  # batches that all nine configurations have seen
    with np.load(tmp_path / "predictions.npz") as stored:
        assert stored["num_done"] == 5 * num_whole
    del calls[:]
    where = None
    assert analyze.main(flags(root, tmp_path)) == 0
    assert len(calls) == 9 * (5 - num_whole)
    assert_same(tmp_path, single)
    del calls[:]
    assert analyze.main(flags(root, tmp_path)) == 0  # all is done: tables and figure alone
    assert not calls
    assert_same(tmp_path, single)


def assert_same(output, reference):
    rows, arrays = read(output)
    expected_rows, expected = read(reference)
    assert rows == expected_rows
    for name in ("predicted", "correct1", "correct5", "is_bad", "num_done", "loss_sums"):
        np.testing.assert_array_equal(arrays[name], expected[name])


def test_killed_sweep_goes_on(root, single, tmp_path):
    script = Path(analyze.__file__)
    slow = (  # a tenth of a second a forward pass: 4.5 s in all
        "import sys, time, torch; torch.set_num_threads(1); import analyze; "
        "from analysis import sweep; answer = sweep.answer_batch\n"
        "def slowly(*args, **options):\n    time.sleep(0.1)\n    return answer(*args, **options)\n"
        "sweep.answer_batch = slowly; sys.exit(analyze.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", slow, *flags(root, tmp_path, "--save-every", "1")]
    process = subprocess.Popen(command, cwd=script.parent, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    deadline = time.time() + 120
    while not (tmp_path / "predictions.npz").exists() and time.time() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    with np.load(tmp_path / "predictions.npz") as stored:
        assert 0 < stored["num_done"] < 24
    assert analyze.main(flags(root, tmp_path)) == 0
    assert_same(tmp_path, single)


def refusal(capsys, argv):
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as stopped:
        analyze.main(argv)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0]


def test_other_settings_in_the_same_folder(root, tmp_path, capsys):
    base = flags(root, tmp_path)
    assert analyze.main(base) == 0
    capsys.readouterr()
    message = refusal(capsys, [*base, "--match-ratio", "0"])
    assert "other settings" in message and "--restart" in message
    assert "checkpoints.a.match_ratio was 0.1, is 0.0" in message
    assert "batch_size was 5, is 6" in refusal(capsys, [*base, "--batch-size", "6"])
    assert analyze.main([*base, "--match-ratio", "0", "--restart"]) == 0
    (tmp_path / "predictions.npz").write_bytes(b"PK broken")
    capsys.readouterr()
    assert "--restart" in refusal(capsys, base)


def test_ablations_equal_separate_evaluations(root, tmp_path):
    ablation = {"cluster_ratio": 0.0, "match_ratio": 0.0, "merge_weights": "mean"}
    more = ["--cluster-ratio", "0", "--match-ratio", "0", "--merge-weights", "mean"]
    assert analyze.main(flags(root, tmp_path, *more, "--compare", "bat@0.4", "topk@0.4")) == 0
    rows = {(row["reduction"], row["keep_rate"]): row for row in read(tmp_path)[0]}
    # Without clusters and pairs BAT is pruning.
    assert rows["bat", 0.4]["loss"] == rows["topk", 0.4]["loss"]
    checkpoint = load_checkpoint(root / "a.pth")
    model = model_from_checkpoint(checkpoint, reduction="bat", keep_rate=0.4, **ablation)
    assert rows["bat", 0.4]["gmacs"] == models.count_gmacs(model)


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--reduction", "prune"], ["prune", "topk", "dpcknn", "bat"]),
        (["--keep-rate", "0.5", "1.5"], ["(0, 1]", "1.5"]),
        (["--compare", "bat@0.9", "bat@0.7"], ["bat@0.9", "none@1", "tome@0.4"]),
        (["--checkpoint", "missing.pth"], ["missing.pth"]),
        (["--cluster-ratio", "2"], ["cluster_ratio", "2"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--data-path", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_flags(root, tmp_path, capsys, changes, words):
    message = refusal(capsys, flags(root, tmp_path, *changes))
    assert all(word in message for word in words), message


def test_class_count_and_input_size_must_fit(root, tmp_path, capsys):
    write_checkpoint(tmp_path / "three.pth", 0, num_classes=3)
    write_checkpoint(tmp_path / "wide.pth", 0, img_size=(32, 48))
    base = flags(root, tmp_path)
    message = refusal(capsys, [*base, "--checkpoint", str(tmp_path / "three.pth")])
    assert "three.pth has 3 classes" in message and "has 6" in message
    both = [str(root / "a.pth"), str(tmp_path / "wide.pth")]
    assert "(32, 48)" in refusal(capsys, [*base, "--checkpoint", *both])


def test_unreadable_images_are_named_and_counted(root, tmp_path, capsys):
    for label in range(NUM_CLASSES):
        folder = tmp_path / "data" / "val" / f"class{label}"
        folder.mkdir(parents=True)
        source = root / "data" / "val" / f"class{label}" / "0.png"
        (folder / "0.png").write_bytes(source.read_bytes())
    bad = tmp_path / "data" / "val" / "class2" / "1.png"
    bad.write_bytes(b"no image")
    argv = flags(root, tmp_path / "out", "--data-path", str(tmp_path / "data"))
    assert analyze.main(argv) == 1
    error = capsys.readouterr().err
    assert str(bad) in error and "1 of 7 images could not be read" in error
    rows, arrays = read(tmp_path / "out")
    assert [row["bad_images"] for row in rows] == [1] * 9
    assert not arrays["correct5"][:, 3].any()
    with pytest.raises(SystemExit, match="2"):
        analyze.main([*argv, "--bad-images", "error", "--restart"])
    assert str(bad) in capsys.readouterr().err.splitlines()[-1]


def test_configurations_and_their_names():
    entries = make_configurations(["x"], ["none", "evit", "topk", "bat"], [1.0, 0.5, 0.25])
    names = [entry.short_name for entry in entries]
    assert names == ["none@1"] + [f"{m}@{r}" for m in ("evit", "topk", "bat") for r in (0.5, 0.25)]
    assert find_configuration(entries, "bat@1.0") == 0
    assert find_configuration(entries, "x:bat@.5") == names.index("bat@0.5")
    pairs = [(names[a], names[b]) for a, b in comparison_pairs(entries)]
    wanted = [("topk", "evit"), ("bat", "evit"), ("bat", "topk")]
    assert sorted(pairs) == sorted((f"{a}@{r}", f"{b}@{r}") for a, b in wanted for r in (0.5, 0.25))
    two = [Configuration(label, "bat", 0.5) for label in ("x", "y")]
    assert find_configuration(two, "y:bat@0.5") == 1
    with pytest.raises(ValueError, match=r"more than one.*x:bat@0.5, y:bat@0.5"):
        find_configuration(two, "bat@0.5")


def answers(both, only_first, only_second, neither):
    first = [True] * both + [True] * only_first + [False] * only_second + [False] * neither
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return np.array(first), np.array(second)


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
    assert result.p_value == pytest.approx(p_value, rel=1e-12)
    total = 50 + only_first + only_second
    assert result.difference == pytest.approx(100 * (only_first - only_second) / total)
    assert (result.only_first, result.only_second) == (only_first, only_second)
    mirrored = compare_paired(*answers(20, only_second, only_first, 30))
    assert mirrored.p_value == result.p_value and mirrored.difference == -result.difference


def test_bootstrap_interval():
    first, second = answers(400, 90, 50, 460)
    result = compare_paired(first, second, seed=3)
    assert result == compare_paired(first, second, seed=3)
    # The definition: draw the images one by one, with replacement.
    rng = np.random.default_rng(0)
    gain = first.astype(int) - second
    drawn = gain[rng.integers(0, 1000, (4000, 1000))].mean(axis=1)
    low, high = np.percentile(100 * drawn, [2.5, 97.5])
    assert result.low == pytest.approx(low, abs=0.15)
    assert result.high == pytest.approx(high, abs=0.15)
    # The normal approximation: 4 +- 1.96 * sqrt(0.14 - 0.04^2) / sqrt(1000) * 100.
    assert result.high - result.low == pytest.approx(2 * 1.96 * 0.372 / 1000**0.5 * 100, rel=0.05)
    same = compare_paired(first, first)
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_comparisons_come_from_the_predictions(finished):
    _, arrays = read(finished)
    configurations = json.loads(str(arrays["settings"]))["configurations"]
    with open(finished / "comparisons.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 2 * 5  # a checkpoint and keep rate: 3 with bat, 2 more with evit
    for line in lines:
        first, second = (
            arrays["correct1"][configurations.index(line[name])] for name in ("first", "second")
        )
        assert int(line["only_first"]) == (first & ~second).sum()
        assert float(line["difference"]) == pytest.approx(100 * (first.mean() - second.mean()))


def test_figure_shows_the_table(finished):
    rows, _ = read(finished)
    axes = plot_sweep(rows).axes[0]
    assert "GMACs" in axes.get_xlabel() and "%" in axes.get_ylabel()
    lines = {line.get_gid(): line for line in axes.lines}
    assert set(lines) == {f"{c}:{m}" for c in "ab" for m in ("none", "topk", "evit", "bat", "tome")}
    for gid, line in lines.items():
        checkpoint, method = gid.split(":")
        own = [
            r for r in rows if r["checkpoint"] == checkpoint and r["reduction"] in (method, "none")
        ]
        expected = sorted((row["gmacs"], row["acc1"]) for row in own)
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
