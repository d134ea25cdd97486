"""Evaluates the dense weights off the shelf: every method and keep rate, every pair of ratios.

Run by `study.py` as `python -m studies.scores`; the work is `analysis/sweep.py`'s.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Subset

from analysis.predictions import Predictions, open_predictions
from analysis.sweep import DENSE as DENSE_METHOD
from analysis.sweep import Configuration, digest_weights, run_sweep, summarize
from arguments import ArgumentParser, get_args_parser
from builders import AMP_DTYPES, build_model, with_stored_model
from checkpoints import load_checkpoint, load_weights, model_weights
from datasets import build_dataset
from models import BATVisionTransformer
from recorder import check_writable
from utils import init_process, setup_logging, write_atomically

from .plan import DENSE, RATIO_RATE, Run, run_command, shelf_runs
from .presets import CLUSTER_RATIOS, MATCH_RATIOS, Preset, load_preset

GROUPS = ("shelf", "ratios")
DATA_FILE = "study.json"


class Scores(NamedTuple):
    """What one group's evaluation found.

    Attributes:
        rows: as `analysis.sweep.summarize` returns them.
        correct: (rows, images) bool, which images each of them gets right.
    """

    rows: list[dict]
    correct: np.ndarray

    def find(self, label: str, reduction: str, keep_rate: float) -> int | None:
        """Index of a row, or None."""
        wanted = (label, reduction, keep_rate)
        for index, row in enumerate(self.rows):
            if (row["checkpoint"], row["reduction"], row["keep_rate"]) == wanted:
                return index
        return None


def ratio_label(ratios: tuple[float, float]) -> str:
    """Label of a pair of ratios, such as cluster0.4_match0.1."""
    return f"cluster{ratios[0]:g}_match{ratios[1]:g}"


def group_configurations(group: str) -> list[tuple[Configuration, Run]]:
    """What a group evaluates: the configuration and the run whose settings it has."""
    if group == "ratios":
        pairs = [(cluster, match) for cluster in CLUSTER_RATIOS for match in MATCH_RATIOS]
        return [
            (Configuration(ratio_label(pair), "bat", RATIO_RATE), Run("bat", RATIO_RATE, 0, pair))
            for pair in pairs
        ]
    shelf = [(Configuration("dense", run.reduction, run.keep_rate), run) for run in shelf_runs()]
    return [(Configuration("dense", DENSE_METHOD, 1.0), DENSE), *shelf]


def scores_folder(folder: Path, group: str) -> Path:
    """Where a group's results are."""
    return folder / "scores" / group


def build_models(group: str, checkpoint: Mapping, source: str) -> dict[str, BATVisionTransformer]:
    """One model a label, all with the weights of the checkpoint."""
    models = {}
    for configuration, run in group_configurations(group):
        if configuration.checkpoint in models:
            continue
        ratios = {"cluster_ratio": run.ratios[0], "match_ratio": run.ratios[1]}
        model = build_model(checkpoint["model_args"] | ratios)
        load_weights(model, model_weights(checkpoint), source)
        models[configuration.checkpoint] = model
    return models


def score_group(group: str, folder: Path, preset: Preset, data_path: str, device: str) -> None:
    """Evaluates a group, or goes on with it, and writes scores.json.

    Args:
        group: in GROUPS.
        folder: of the study.
        preset: its sizes.
        data_path: folder with train/ and val/.
        device: as for `main.py`.

    Raises:
        InputError: the checkpoint or the data cannot be read.
    """
    chosen = init_process(device)
    words = run_command(DENSE, preset, data_path=data_path, folder=folder, device=device)
    typed = get_args_parser().parse_args(words[1:])
    source = str(folder / "runs" / DENSE.name / "checkpoint.pth")
    checkpoint = load_checkpoint(source)
    args = with_stored_model(typed, checkpoint["model_args"])
    models = {
        label: model.to(chosen) for label, model in build_models(group, checkpoint, source).items()
    }
    whole, _ = build_dataset(False, args)
    count = min(preset.shelf_images, len(whole))
    indices = (np.arange(count) * len(whole) // count).tolist()  # spread evenly over the classes
    configurations = [configuration for configuration, _ in group_configurations(group)]
    settings = {
        "configurations": [configuration.name for configuration in configurations],
        "weights": digest_weights(next(iter(models.values()))),
        "images": count,
        "amp": preset.amp,
        "batch_size": preset.batch_size,
    }
    target = check_writable(scores_folder(folder, group))
    path = target / "predictions.npz"
    predictions = open_predictions(path, settings, len(configurations), count, restart=False)
    run_sweep(
        predictions,
        models,
        configurations,
        Subset(whole, indices),
        path,
        batch_size=preset.batch_size,
        amp_dtype=AMP_DTYPES[preset.amp],
        save_every=5,
    )
    rows = summarize(predictions, models, configurations)
    text = json.dumps(rows, indent=1) + "\n"
    write_atomically(target / "scores.json", lambda file: file.write(text.encode()))


def load_scores(folder: Path, group: str) -> Scores | None:
    """The results of a group, or None if it is not finished."""
    target = scores_folder(folder, group)
    if not (target / "scores.json").is_file():
        return None
    rows = json.loads((target / "scores.json").read_text())
    return Scores(rows, Predictions.load(target / "predictions.npz").correct1)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    setup_logging()
    parser = ArgumentParser(prog="studies.scores", description=__doc__.splitlines()[0])
    parser.add_argument("--group", choices=GROUPS, required=True, help="what to evaluate")
    parser.add_argument("--folder", type=Path, required=True, help="of the study")
    args = parser.parse_args(argv)
    with parser.exit_on_bad_input():
        stored = json.loads((args.folder / DATA_FILE).read_text())
        preset = load_preset(stored["preset"])
        score_group(args.group, args.folder, preset, stored["data_path"], stored["device"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
