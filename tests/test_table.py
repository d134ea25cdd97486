"""`python -m tools.table`: run folders become a table with paired standard errors."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tool_helpers import refusal

from tools import table

MODEL_ARGS = {"model_name": "bat_deit_tiny_patch16_224"}


def write_run(
    folder: Path, right: str, *, gmacs: float = 1.0, saved: bool = True, **changes: object
) -> Path:
    """A made-up run's folder; `right` has a 1 for every image that the run gets right."""
    correct = np.array([digit == "1" for digit in right])
    model_args = MODEL_ARGS | changes.pop("model_args", {})
    last = {"epoch": 2, "keep_rate": changes.pop("keep_rate", [0.5, 0.5])}
    last |= {"test_acc1": 100 * float(correct.mean()), "test_num_images": len(right)}
    about = {
        "args": {"seed": 0, "lr": 1e-3, "output_dir": str(folder)} | changes,
        "model_args": model_args,
        "classes": ["cat", "dog"],
        "gmacs": gmacs,
    }
    entries = [last | {"epoch": 0, "test_acc1": 1.0}, {"epoch": 1, "keep_rate": [1.0]}, last]
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(about))
    (folder / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    if saved:
        np.save(folder / "correct.npy", correct)
    return folder


def test_a_row_has_the_paired_error_of_its_difference(tmp_path):
    first = write_run(tmp_path / "first", "1110", gmacs=2.5, keep_rate=[0.6, 0.8])
    second = write_run(tmp_path / "second", "1000", model_args={"reduction": "evit"})
    rows = table.make_table([first], second).to_dict("records")
    assert [row["run"] for row in rows] == ["first", "second"]
    # The differences of the four images are 0, 1, 1, 0: mean 1/2, variance 4 * (1/2)^2 / 3 = 1/3,
    # standard error sqrt(1/3 / 4).
    assert rows[0]["difference"] == pytest.approx(50)
    assert rows[0]["standard_error"] == pytest.approx(100 * math.sqrt(1 / 12))
    assert (rows[0]["acc1"], rows[0]["gmacs"], rows[0]["epochs"]) == (75, 2.5, 3)
    assert (rows[0]["keep_rate"], rows[1]["keep_rate"]) == ("0.6 0.8", "0.5")
    assert (rows[0]["reduction"], rows[0]["cluster_ratio"]) == ("bat", 0.4)  # the model's defaults
    assert rows[1]["reduction"] == "evit" and math.isnan(rows[1]["cluster_ratio"])
    assert (rows[1]["difference"], rows[1]["standard_error"]) == (0, 0)


def test_runs_that_differ_in_their_seed_alone_make_one_row(tmp_path):
    seeds = [write_run(tmp_path / "bat0", "1110"), write_run(tmp_path / "bat1", "1000", seed=1)]
    other = write_run(tmp_path / "other", "1111", lr=1e-4, seed=2)
    rows = table.make_table([*seeds, other], seeds[1]).to_dict("records")
    assert [row["seeds"] for row in rows] == ["0 1", "2"]
    assert rows[0]["acc1"] == pytest.approx(50)
    assert rows[0]["acc1_std"] == pytest.approx(math.sqrt(2 * 25**2))
    # Shares of the seeds that are right: 1, 1/2, 1/2, 0; the other run is right everywhere.
    # The differences 0, 1/2, 1/2, 1 have mean 1/2 and variance 1/6.
    assert rows[1]["difference"] == pytest.approx(50)
    assert rows[1]["standard_error"] == pytest.approx(100 * math.sqrt(1 / 24))


def test_without_the_answers_there_is_a_difference_but_no_error(tmp_path):
    first = write_run(tmp_path / "first", "1110")
    second = write_run(tmp_path / "second", "1000", lr=1, saved=False)
    row = table.make_table([first], second).iloc[0]
    assert row.difference == 50 and math.isnan(row.standard_error)


def test_command_line_writes_table_and_figure(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(table, "save_figure", lambda figure, stem: drawn.append((figure, stem)))
    folders = [
        write_run(tmp_path / "bat", "1110", keep_rate=[0.6, 0.8]),
        write_run(tmp_path / "dense", "1111", model_args={"reduction": "none"}, keep_rate=[1.0]),
    ]
    out = tmp_path / "out"
    words = [*folders, "--baseline", folders[1], "--output-dir", out]
    assert table.main(list(map(str, words))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(
        "| bat | bat | off |  | 0.4 | 0.1 | importance | 0.6 0.8 | 1 | 75.00 |  | -25.00 |"
    )
    assert (out / "table.md").read_text().splitlines() == lines[:4]
    assert pd.read_csv(out / "table.csv").acc1.tolist() == [75, 100]
    ((figure, stem),) = drawn
    assert stem == out / "accuracy"
    # The differences are 0, 0, 0 and -1: standard error sqrt((3/4) / (4 * 3)) = 1/4.
    bars = [bar[:, 1] for each in figure.axes[0].collections for bar in each.get_segments()]
    np.testing.assert_allclose(bars, [[75 - 1.96 * 25, 75 + 1.96 * 25], [100, 100]])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "log.txt").unlink(), "no log.txt"),
        (lambda folder: (folder / "args.json").unlink(), "cannot be read"),
        (lambda folder: (folder / "args.json").write_text("{}"), "cannot be read"),
        (lambda folder: (folder / "log.txt").write_text('{"epoch": 0}\n'), "no evaluated epoch"),
        (lambda folder: np.save(folder / "correct.npy", [True] * 4), "does not belong"),
        (lambda folder: np.save(folder / "correct.npy", [True, False]), "does not belong"),
    ],
)
def test_a_broken_folder_is_one_line(tmp_path, capsys, break_it, message):
    good, bad = write_run(tmp_path / "good", "1100"), write_run(tmp_path / "bad", "1010")
    break_it(bad)
    error = refusal(capsys, table.main, [bad, "--baseline", good])
    assert message in error and str(bad) in error


def test_different_validation_sets_are_refused(tmp_path):
    folders = [write_run(tmp_path / "four", "1100"), write_run(tmp_path / "five", "11000")]
    with pytest.raises(ValueError, match="different validation sets: 4 and 5 images"):
        table.make_table(folders, folders[1])
