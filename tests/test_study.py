"""The study: presets, plan, runner, statistics, and a whole one in small."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, write_images

from analysis.figures import save_figure
from arguments import get_args_parser
from studies.figures import plot_ablation, plot_ratios
from studies.plan import (
    DENSE,
    Run,
    ablation_rows,
    all_runs,
    main_runs,
    ratio_run,
    run_command,
    with_seeds,
)
from studies.presets import (
    ALL_KEEP_RATES,
    ALL_METHODS,
    CLUSTER_RATIOS,
    MATCH_RATIOS,
    PRESETS,
    choose_preset,
    load_preset,
)
from studies.results import Result, difference, mean_and_std, paired_difference
from studies.runner import Job, Runner
from studies.tables import better_ratios, main_table
from utils import InputError


def result(acc1: float, hits: np.ndarray | None = None) -> Result:
    hits = np.zeros(4, dtype=bool) if hits is None else hits
    return Result(acc1, 1.0, hits, 0.1, 10.0, 100.0)


# Presets and plan.


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    preset = PRESETS[name]
    assert load_preset(json.loads(json.dumps(preset.describe()))) == preset


@pytest.mark.parametrize(("share", "grows"), [(0.25, False), (0.5, False), (1.5, True), (3, True)])
@pytest.mark.parametrize("name", PRESETS)
def test_budgets_scale_the_images_seen(name, share, grows):
    preset = PRESETS[name]
    scaled = choose_preset(name, share * preset.minutes)
    seen = [p.epoch_images * p.dense_epochs for p in (preset, scaled)]
    assert (seen[1] > seen[0]) == grows
    assert scaled.epoch_images >= scaled.batch_size
    if preset.dense_epochs > 3:
        assert seen[1] / seen[0] == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("minutes", [0.1, 10, math.nan, math.inf])
def test_budgets_that_make_no_sense_are_refused(minutes):
    with pytest.raises(InputError, match="too small"):
        choose_preset("cpu", minutes)


def test_the_gpu_preset_is_the_whole_study():
    preset = PRESETS["gpu"]
    runs = all_runs(preset)
    assert len(set(runs)) == len(runs) and len({run.name for run in runs}) == len(runs)
    for method in ALL_METHODS:
        for rate in ALL_KEEP_RATES:
            seeds = {run.seed for run in main_runs(preset) if run[:2] == (method, rate)}
            assert seeds == ({0, 1, 2} if rate in (0.7, 0.5, 0.3) else {0})
    for rate in (0.5, 0.3):
        for run in ablation_rows(rate).values():
            assert set(with_seeds(run, preset)) <= set(runs)
    assert {Run("bat", 0.7, is_tuned=False), Run("evit", 0.7, is_tuned=False), DENSE} <= set(runs)
    assert {ratio_run(pair) for pair in preset.ratios_tuned} <= set(runs)


def test_the_cpu_preset_says_what_it_cuts():
    text = " ".join(PRESETS["cpu"].cuts())
    for word in ("random", "0.6, 0.4, 0.2", "seeds", "ratios", "patch tokens"):
        assert word in text
    assert PRESETS["cpu"].num_tokens >= 64 and PRESETS["cpu"].depth == 12


@pytest.mark.parametrize("name", PRESETS)
def test_methods_share_everything_but_the_method(name, tmp_path):
    preset = PRESETS[name]
    parser = get_args_parser()

    def parsed(run: Run) -> dict:
        words = run_command(run, preset, data_path="d", folder=tmp_path, device="cpu")
        return vars(parser.parse_args(words[1:]))

    base = parsed(Run("topk", 0.5))
    for method in ALL_METHODS:
        args = parsed(Run(method, 0.5))
        assert args["reduction"] == method
        assert {k for k in args if args[k] != base[k]} <= {"reduction", "output_dir"}
    scratch = parsed(Run("bat", 0.7, is_tuned=False))
    assert not scratch["finetune"] and scratch["epochs"] == preset.dense_epochs
    assert base["finetune"].endswith("runs/dense/checkpoint.pth")
    assert base["weight_decay"] == 1e-6 and base["warmup_epochs"] == 0


# Statistics.


def test_differences_over_seeds_and_over_images():
    pairs = difference([result(50), result(52), result(51)], [result(49), result(50), result(51)])
    assert pairs.value == pytest.approx(1) and pairs.source == "seeds"
    assert pairs.error == pytest.approx(1 / math.sqrt(3))
    rng = np.random.default_rng(0)
    first, second = rng.random(1000) < 0.6, rng.random(1000) < 0.5
    single = difference([result(60, first)], [result(50, second)])
    assert single == paired_difference(first, second) and single.source == "images"
    only = (first & ~second).sum(), (second & ~first).sum()
    assert single.value == pytest.approx(100 * (only[0] - only[1]) / 1000)
    variance = (sum(only) / 1000 - (single.value / 100) ** 2) * 1000 / 999
    assert single.error == pytest.approx(100 * math.sqrt(variance / 1000))
    assert difference([], []) is None and difference([result(1)], []) is None


def test_the_standard_error_is_that_of_a_bootstrap():
    rng = np.random.default_rng(1)
    first, second = rng.random(2000) < 0.6, rng.random(2000) < 0.55
    drawn = rng.integers(2000, size=(2000, 2000))
    means = 100 * (first[drawn].mean(1) - second[drawn].mean(1))
    assert paired_difference(first, second).error == pytest.approx(means.std(), rel=0.1)


def test_mean_and_std():
    assert mean_and_std([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_and_std([4.0]) == (4.0, None)


def test_a_failed_run_stays_in_the_table():
    preset = PRESETS["cpu"]
    runs = all_runs(preset)
    lost = Run("bat", 0.5)
    results = {run: result(50.0) for run in runs if run != lost}
    rows = main_table(preset, results, {lost: "failed, exit code 3"})
    (row,) = [row for row in rows if (row["reduction"], row["keep_rate"]) == ("bat", 0.5)]
    assert row["acc1"] is None and "exit code 3" in row["missing"]
    assert all(other["acc1"] == 50 for other in rows if other is not row)


def test_better_ratios_need_two_standard_errors():
    rows = [
        {"name": name, "shelf_to_default": gain, "shelf_error": error}
        for name, gain, error in (("no", 0.3, 0.2), ("yes", 0.5, 0.2), ("best", 0.9, 0.2))
    ] + [{"name": "default", "shelf_to_default": None, "shelf_error": None}]
    assert [row["name"] for row in better_ratios(rows, "shelf")] == ["best", "yes"]


# Figures.


def test_figures_show_what_the_tables_say(tmp_path):
    rows = [
        {"label": label, "keep_rate": rate, "acc1": 60 + 10 * rate + index, "difference_error": 0.2}
        for rate in (0.5, 0.3)
        for index, label in enumerate(ablation_rows(rate))
    ]
    figure = plot_ablation(rows)
    heights = {round(patch.get_height(), 6) for patch in figure.axes[0].patches}
    assert heights == {round(row["acc1"], 6) for row in rows}
    assert all(path.is_file() for path in save_figure(figure, tmp_path / "ablation"))
    grid = np.arange(30, dtype=float).reshape(5, 6)
    figure = plot_ratios(grid, CLUSTER_RATIOS, MATCH_RATIOS, (0.4, 0.1))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == [f"{value:.1f}" for value in grid.flat]
    (frame,) = figure.axes[0].patches
    assert frame.get_xy() == (2.5, 1.5)


# Runner.


def job(name: str, code: str, folder: Path, needs: str = "") -> Job:
    """A job that runs a line of Python; it is done when its file is there."""
    done = folder / f"{name}.done"
    code = code.replace("DONE", f"open({str(done)!r}, 'w').close()")
    return Job(name, ["-c", code], folder / f"{name}.txt", done.is_file, needs)


def test_runner_goes_on_after_a_failure(tmp_path):
    jobs = [
        job("bad", "print('why it failed'); raise SystemExit(3)", tmp_path),
        job("child", "DONE", tmp_path, needs="bad"),
        job("silent", "pass", tmp_path),
        job("good", "DONE", tmp_path),
        job("after", "DONE", tmp_path, needs="good"),
    ]
    outcome = Runner(2, threads=1).run(jobs)
    expected = {"bad": "failed", "child": "skipped", "silent": "failed"}
    assert outcome.status == expected | {"good": "done", "after": "done"}
    assert outcome.reasons["bad"] == "exit code 3: why it failed"
    assert outcome.reasons["child"] == "bad failed" and not outcome.was_stopped
    again = Runner(2, threads=1).run(jobs[3:])  # what is done is not run again
    assert set(again.status.values()) == {"done"}


def test_runner_keeps_to_its_slots(tmp_path):
    code = (
        "import os, time; own = f'{os.getpid()}.run'; open(own, 'w').close(); time.sleep(0.4); "
        "print(len([n for n in os.listdir('.') if n.endswith('.run')])); os.remove(own); DONE"
    )
    code = f"import os; os.chdir({str(tmp_path)!r}); {code}"
    jobs = [job(f"j{i}", code, tmp_path) for i in range(5)]
    Runner(2, threads=1).run(jobs)
    counts = [int((tmp_path / f"j{i}.txt").read_text()) for i in range(5)]
    assert max(counts) <= 2 and 2 in counts


@pytest.mark.parametrize("by_signal", [False, True])
def test_runner_asks_jobs_to_stop_and_says_so(tmp_path, by_signal):
    code = (
        "import signal, sys, time\n"
        "def leave(*_):\n    print('saved'); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, leave)\nprint('up')\ntime.sleep(60)"
    )
    jobs = [job("long", code, tmp_path), job("later", "DONE", tmp_path)]
    deadline = math.inf if by_signal else time.monotonic() + 3
    if by_signal:
        threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    handler, begin = signal.getsignal(signal.SIGTERM), time.monotonic()
    outcome = Runner(1, threads=1, deadline=deadline).run(jobs)
    assert time.monotonic() - begin < 30
    assert outcome.was_stopped and outcome.status == {"long": "stopped", "later": "stopped"}
    assert (tmp_path / "long.txt").read_text().split() == ["up", "saved"]
    assert signal.getsignal(signal.SIGTERM) is handler


# The command line.


def study(*flags: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "study.py", "--preset", "smoke", *map(str, flags)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_bad_input_is_one_line_and_starts_nothing(data_path, tmp_path):
    out = tmp_path / "out"
    few = write_images(tmp_path / "few", {"red": (200, 50, 40), "blue": (40, 60, 200)})
    cases = {
        "no folder train/|does not exist": ["--data-path", tmp_path / "nowhere"],
        "expected 65": ["--data-path", data_path, "--num-images", 65, 24],
        "images, preset smoke takes": ["--data-path", few],
        "too small": ["--data-path", data_path, "--budget-minutes", 0.1],
        "above 0": ["--data-path", data_path, "--jobs", 0],
    }
    if not torch.cuda.is_available():
        cases["needs a GPU"] = ["--data-path", data_path, "--preset", "gpu"]
    for words, flags in cases.items():
        found = study(*flags, "--output-dir", out)
        assert found.returncode == 2, found.stderr
        assert found.stderr.count("\n") == 1
        assert any(word in found.stderr for word in words.split("|")), found.stderr
        assert not out.exists()


def test_a_whole_study_in_small(data_path, tmp_path):
    out = tmp_path / "out"
    flags = ["--data-path", data_path, "--output-dir", out, "--num-images", 64, 24]
    stopped = study(*flags, "--stop-after", 0.2)
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert "the same command goes on" in stopped.stdout
    lost = out / "runs" / "bat_keep0.5_mean_seed0"
    lost.parent.mkdir(exist_ok=True)
    lost.write_text("in the way")
    failed = study(*flags)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    page = (out / "report" / "README.md").read_text()
    assert "| the same, plain means | 0.5 | 0 | failed |" in page
    assert f"{lost.name}: failed, exit code 2: main.py: error: output folder" in page
    lost.unlink()
    done = study(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "13 of 13 steps done" in done.stdout
    report = out / "report"
    page = (report / "README.md").read_text()
    assert "failed" not in page and "not finished" not in page and "nan" not in page
    for name in ("accuracy", "shelf", "ablation", "ratios", "diversity"):
        assert (report / f"{name}.png").is_file() and (report / f"{name}.pdf").is_file()
    with open(report / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(all_runs(PRESETS["smoke"]))
    assert {row["status"] for row in rows} == {"done"}
    for row in rows:
        log = (report / "runs" / row["name"] / "log.txt").read_text().splitlines()
        assert json.loads(log[-1])["test_acc1"] == float(row["acc1"])
    with open(report / "shelf.csv", newline="") as file:
        shelf = list(csv.DictReader(file))
    assert len(shelf) == 1 + len(ALL_METHODS) * len(ALL_KEEP_RATES)
    about = json.loads((report / "study.json").read_text())
    assert about["preset"] == json.loads(json.dumps(PRESETS["smoke"].describe()))
    assert max(path.stat().st_size for path in report.rglob("*") if path.is_file()) < 2**20
    other = study(*flags, "--budget-minutes", 3)
    assert other.returncode == 2 and "holds a study with another preset" in other.stderr
