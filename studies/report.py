"""Writes what a study found: CSV, Markdown and figures, with everything that explains them."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from analysis import write_csv
from analysis.figures import METHODS, plot_sweep, save_figure

from .figures import plot_ablation, plot_ratios
from .plan import DEFAULT_RATIOS, RATIO_RATE, SCRATCH_RATE, Run, all_runs
from .presets import CLUSTER_RATIOS, MATCH_RATIOS, Preset, load_preset
from .results import FAILED, OPEN, Result, load_result, run_folder
from .scores import DATA_FILE, GROUPS, load_scores
from .tables import (
    ablation_table,
    better_ratios,
    main_table,
    ratio_grid,
    ratio_table,
    run_table,
    scratch_table,
    shelf_table,
)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _accuracy(row: Mapping) -> str:
    if row["acc1"] is None:
        return FAILED if FAILED in row["missing"] else OPEN
    spread = f" ± {row['acc1_std']:.2f}" if row["acc1_std"] is not None else ""
    return f"{row['acc1']:.2f}{spread}"


def _with_error(value: float | None, error: float | None) -> str:
    return "-" if value is None else f"{value:+.2f} ± {error:.2f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [header, rule, *rows])


def main_markdown(rows: Sequence[Mapping]) -> str:
    """The main table."""
    return markdown(
        ["method", "keep rate", "GMACs", "seeds", "Acc@1 (%)", "to EViT (points)"],
        [
            [
                row["label"],
                f"{row['keep_rate']:g}",
                _number(row["gmacs"], 4),
                row["seeds"],
                _accuracy(row),
                _with_error(row["to_evit"], row["to_evit_error"]),
            ]
            for row in rows
        ],
    )


def ablation_markdown(rows: Sequence[Mapping]) -> str:
    """The ablation."""
    return markdown(
        ["tokens kept by", "keep rate", "seeds", "Acc@1 (%)", "to importance alone (points)"],
        [
            [
                row["label"],
                f"{row['keep_rate']:g}",
                row["seeds"],
                _accuracy(row),
                _with_error(row["difference"], row["difference_error"]),
            ]
            for row in rows
        ],
    )


def shelf_markdown(rows: Sequence[Mapping]) -> str:
    """The dense weights without fine-tuning: a row a method, a column a keep rate."""
    rates = list(dict.fromkeys(row["keep_rate"] for row in rows if row["reduction"] != "none"))
    methods = list(dict.fromkeys(row["reduction"] for row in rows if row["reduction"] != "none"))
    found = {(row["reduction"], row["keep_rate"]): row for row in rows}
    return markdown(
        ["method", *(f"{rate:g}" for rate in rates)],
        [
            [METHODS[name][0], *(_number(found[name, rate]["acc1"]) for rate in rates)]
            for name in methods
        ],
    )


def ratio_markdown(rows: Sequence[Mapping]) -> str:
    """Accuracy by ratio, off the shelf, fine-tuned where it was."""
    lines = []
    for match in MATCH_RATIOS:
        own = [row for row in rows if row["match_ratio"] == match]
        cells = [
            _number(row["shelf_acc1"])
            + ("" if row["tuned_acc1"] is None else f" ({row['tuned_acc1']:.2f})")
            for row in own
        ]
        lines.append([f"match {match:g}", *cells])
    return markdown(["", *(f"cluster {ratio:g}" for ratio in CLUSTER_RATIOS)], lines)


def ratio_verdict(rows: Sequence[Mapping]) -> str:
    """Whether a pair of ratios beats the default by more than two standard errors."""
    sentences = []
    for column, words in (("shelf", "off the shelf"), ("tuned", "fine-tuned")):
        ahead = better_ratios(rows, column)
        if not ahead:
            sentences.append(
                f"No pair is ahead of {DEFAULT_RATIOS[0]:g}/{DEFAULT_RATIOS[1]:g} by more than two "
                f"standard errors {words}."
            )
            continue
        best = ahead[0]
        gain = _with_error(best[f"{column}_to_default"], best[f"{column}_error"])
        sentences.append(
            f"{len(ahead)} pair(s) are ahead of the default {words} by more than two standard "
            f"errors; most {best['cluster_ratio']:g}/{best['match_ratio']:g}: {gain} points."
        )
    return " ".join(sentences)


def _setting_lines(about: Mapping) -> str:
    """What the numbers depend on, as a list."""
    preset = about["preset"]
    hidden = ("name", "cuts", "made_for", "minutes", "ratios_tuned")
    sizes = ", ".join(f"{key} {value}" for key, value in preset.items() if key not in hidden)
    versions = ", ".join(f"{key} {value}" for key, value in about["versions"].items())
    lines = [
        f"preset: {preset['name']}, {preset['minutes']:g} minutes ({preset['made_for']})",
        f"sizes: {sizes}",
        *(f"cut: {text}" for text in preset["cuts"]),
        f"data: {about['train_images']:,} training and {about['val_images']:,} validation images",
        f"device: {about['device_name']}, {about['jobs']} runs at a time",
        f"versions: {versions}",
        f"commit: {about['git_hash']}",
        f"command: `{about['command']}`",
        f"took: {about.get('minutes_taken', 0):.0f} minutes",
    ]
    return "\n".join(f"- {line}" for line in lines)


def report_text(about: Mapping, tables: Mapping[str, list[dict]], problems: Sequence[str]) -> str:
    """The study as a page of Markdown."""
    shelf = tables["shelf"]
    count = f"{shelf[0]['num_images']:,}" if shelf else "no"
    parts = [
        f"# {about['title']}",
        "Measured by this code; nothing here is comparable to ImageNet figures. `±` after an "
        "accuracy: standard deviation over seeds. `±` after a difference: its standard error, over "
        "the seeds where there are several, else over the validation images; the latter says "
        "nothing about another seed.",
        _setting_lines(about),
        "## Fine-tuned from the same dense weights",
        main_markdown(tables["main"]),
        f"## From scratch at keep rate {SCRATCH_RATE:g}",
        main_markdown(tables["scratch"]),
        "## Ablation, fine-tuned",
        ablation_markdown(tables["ablation"]) if tables["ablation"] else "not in this preset",
        f"## Cluster and match ratio at keep rate {RATIO_RATE:g}",
        f"Acc@1 off the shelf ({count} images); fine-tuned in brackets.",
        ratio_markdown(tables["ratios"]),
        ratio_verdict(tables["ratios"]),
        f"## Off the shelf: the dense weights, no fine-tuning ({count} images)",
        f"Dense: {_number(shelf[0]['acc1'])}. Acc@1 by keep rate:" if shelf else OPEN,
        shelf_markdown(shelf),
        "## Runs that have no result",
        "\n".join(f"- {problem}" for problem in problems) or "none",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def collect(
    folder: Path, preset: Preset, failures: Mapping[str, str]
) -> tuple[dict[Run, Result], dict[Run, str]]:
    """Results of the runs that ended well, and what became of the others.

    Args:
        folder: of the study.
        preset: its sizes.
        failures: why a job failed, by name.
    """
    results, reasons = {}, {}
    for run in all_runs(preset):
        result = load_result(folder, run, preset)
        if result is not None:
            results[run] = result
        else:
            why = failures.get(run.name)
            reasons[run] = f"{FAILED}, {why}" if why else OPEN
    return results, reasons


def write_report(folder: Path, failures: Mapping[str, str]) -> Path:
    """Writes report/ with all tables, figures and logs that are there, and returns it.

    Args:
        folder: of the study.
        failures: why a job failed, by name.
    """
    about = json.loads((folder / DATA_FILE).read_text())
    preset = load_preset(about["preset"])
    results, reasons = collect(folder, preset, failures)
    scores = {group: load_scores(folder, group) for group in GROUPS}
    tables = {
        "main": main_table(preset, results, reasons),
        "scratch": scratch_table(preset, results, reasons),
        "ablation": ablation_table(preset, results, reasons),
        "ratios": ratio_table(preset, results, scores["ratios"]),
        "shelf": shelf_table(scores["shelf"]),
        "runs": run_table(preset, results, reasons),
    }
    target = folder / "report"
    target.mkdir(exist_ok=True)
    for name, rows in tables.items():
        if rows:
            write_csv(target / f"{name}.csv", rows)
    problems = [f"{run.name}: {reason}" for run, reason in reasons.items()]
    problems += [f"{group}: {failures[group]}" for group in failures if group in GROUPS]
    (target / "README.md").write_text(report_text(about, tables, problems))
    shutil.copyfile(folder / DATA_FILE, target / DATA_FILE)
    _draw(target, tables)
    _copy_logs(folder, target, preset)
    return target


def _draw(target: Path, tables: Mapping[str, list[dict]]) -> None:
    """The figures of which there is something to draw."""
    tuned = [
        row | {"checkpoint": "fine-tuned"} for row in tables["main"][1:] if row["acc1"] is not None
    ]
    if len({row["reduction"] for row in tuned}) > 1:
        save_figure(plot_sweep(tuned), target / "accuracy")
    if tables["shelf"]:
        rows = [row | {"checkpoint": "off the shelf"} for row in tables["shelf"]]
        save_figure(plot_sweep(rows), target / "shelf")
    if any(row["acc1"] is not None for row in tables["ablation"]):
        save_figure(plot_ablation(tables["ablation"]), target / "ablation")
    if any(row["shelf_acc1"] is not None for row in tables["ratios"]):
        grid = ratio_grid(tables["ratios"])
        figure = plot_ratios(grid, CLUSTER_RATIOS, MATCH_RATIOS, DEFAULT_RATIOS)
        save_figure(figure, target / "ratios")


def _copy_logs(folder: Path, target: Path, preset: Preset) -> None:
    """log.txt and args.json of every run, and the diversity of the tokens."""
    for run in all_runs(preset):
        source = run_folder(folder, run)
        for name in ("log.txt", "args.json"):
            if (source / name).is_file():
                (target / "runs" / run.name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, target / "runs" / run.name / name)
    for path in (folder / "diversity").glob("diversity.*"):
        if path.suffix in (".csv", ".png", ".pdf"):
            shutil.copyfile(path, target / path.name)
