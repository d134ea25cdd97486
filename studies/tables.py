"""The tables of a study, as rows of plain values.

Differences are in points of Acc@1; `error` is the standard error of the difference, over the seeds
where there are several, over the validation images where there is one (`error_over` says which).
"""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from analysis.figures import METHODS

from .plan import (
    ABLATION_RATES,
    DEFAULT_RATIOS,
    DENSE,
    RATIO_RATE,
    TUNED_DENSE,
    Run,
    ablation_rows,
    all_runs,
    ratio_run,
    scratch_runs,
    with_seeds,
)
from .presets import ALL_KEEP_RATES, ALL_METHODS, CLUSTER_RATIOS, MATCH_RATIOS, Preset
from .results import Difference, Result, difference, mean_and_std, paired_difference
from .scores import Scores, ratio_label

RIVAL = "evit"
Results = Mapping[Run, Result]
Reasons = Mapping[Run, str]  # why a run has no result, by run


def _difference_columns(found: Difference | None, name: str) -> dict:
    value, error, source = found or (None, None, None)
    return {name: value, f"{name}_error": error, "error_over": source}


def _summary(run: Run, preset: Preset, results: Results, reasons: Reasons) -> dict:
    """Accuracy over the seeds of a run, and what is missing."""
    runs = with_seeds(run, preset)
    own = [results[seeded] for seeded in runs if seeded in results]
    mean, std = mean_and_std([result.acc1 for result in own]) if own else (None, None)
    missing = [f"{seeded.name}: {reasons[seeded]}" for seeded in runs if seeded in reasons]
    return {
        "gmacs": own[0].gmacs if own else None,
        "seeds": len(own),
        "acc1": mean,
        "acc1_std": std,
        "missing": "; ".join(missing),
    }


def compare_runs(first: Run, second: Run, preset: Preset, results: Results) -> Difference | None:
    """Difference of two runs over the seeds that both have; None if there is none."""
    pairs = [
        (results[a], results[b])
        for a, b in zip(with_seeds(first, preset), with_seeds(second, preset), strict=True)
        if a in results and b in results
    ]
    return difference([a for a, _ in pairs], [b for _, b in pairs])


def main_table(preset: Preset, results: Results, reasons: Reasons) -> list[dict]:
    """Fine-tuned accuracy of every method at every keep rate, beside the dense model's."""
    rows = [
        {"label": label, "reduction": "none", "keep_rate": 1.0}
        | _summary(run, preset, results, reasons)
        | _difference_columns(None, "to_evit")
        for label, run in (("dense, before", DENSE), ("dense, fine-tuned alike", TUNED_DENSE))
    ]
    runs = [Run(method, rate) for rate in preset.keep_rates for method in preset.methods]
    return rows + [_against_rival(run, preset, results, reasons) for run in runs]


def scratch_table(preset: Preset, results: Results, reasons: Reasons) -> list[dict]:
    """BAT and EViT trained from scratch."""
    return [_against_rival(run, preset, results, reasons) for run in scratch_runs()]


def _against_rival(run: Run, preset: Preset, results: Results, reasons: Reasons) -> dict:
    """A method's row, with its difference to EViT trained in the same way."""
    rival = run._replace(reduction=RIVAL)
    found = compare_runs(run, rival, preset, results) if run != rival else None
    label = METHODS[run.reduction][0]
    return (
        {"label": label, "reduction": run.reduction, "keep_rate": run.keep_rate}
        | _summary(run, preset, results, reasons)
        | _difference_columns(found, "to_evit")
    )


def ablation_table(preset: Preset, results: Results, reasons: Reasons) -> list[dict]:
    """What clusters, matching and the weights of a merge add."""
    rows = []
    for rate in ABLATION_RATES:
        if rate not in preset.keep_rates:
            continue
        parts = ablation_rows(rate)
        base = next(iter(parts.values()))
        for label, run in parts.items():
            found = compare_runs(run, base, preset, results) if run != base else None
            rows.append(
                {"label": label, "keep_rate": rate}
                | _summary(run, preset, results, reasons)
                | _difference_columns(found, "difference")
            )
    return rows


def ratio_table(preset: Preset, results: Results, scores: Scores | None) -> list[dict]:
    """Accuracy by cluster and match ratio at keep rate 0.5, off the shelf and fine-tuned."""
    rows = []
    default = Run("bat", RATIO_RATE)
    base = scores.find(ratio_label(DEFAULT_RATIOS), "bat", RATIO_RATE) if scores else None
    for match, cluster in product(MATCH_RATIOS, CLUSTER_RATIOS):
        index = scores.find(ratio_label((cluster, match)), "bat", RATIO_RATE) if scores else None
        acc1 = found = None
        if index is not None:
            acc1 = scores.rows[index]["acc1"]
            if index != base:
                found = paired_difference(scores.correct[index], scores.correct[base])
        row = {"cluster_ratio": cluster, "match_ratio": match}
        row |= _default_columns("shelf", acc1, found)
        run = ratio_run((cluster, match))
        acc1 = found = None
        if run in results:
            acc1 = results[run].acc1
            if run != default and default in results:
                found = difference([results[run]], [results[default]])
        rows.append(row | _default_columns("tuned", acc1, found))
    return rows


def _default_columns(prefix: str, acc1: float | None, found: Difference | None) -> dict:
    """Accuracy of a pair of ratios, and its difference to the default pair."""
    return {
        f"{prefix}_acc1": acc1,
        f"{prefix}_to_default": found.value if found else None,
        f"{prefix}_error": found.error if found else None,
    }


def shelf_table(scores: Scores | None) -> list[dict]:
    """The dense weights with every method and keep rate, without fine-tuning."""
    if scores is None:
        return []
    rows = []
    keys = [("none", 1.0), *((name, rate) for rate in ALL_KEEP_RATES for name in ALL_METHODS)]
    for reduction, rate in keys:
        index = scores.find("dense", reduction, rate)
        rival = scores.find("dense", RIVAL, rate)
        found = None
        if rival is not None and rival != index:
            found = paired_difference(scores.correct[index], scores.correct[rival])
        row = {name: scores.rows[index][name] for name in ("gmacs", "acc1", "loss", "num_images")}
        rows.append(
            {"reduction": reduction, "keep_rate": rate}
            | row
            | {"to_evit": found.value if found else None, "error": found.error if found else None}
        )
    return rows


def run_table(preset: Preset, results: Results, reasons: Reasons) -> list[dict]:
    """Every run: its settings, how it ended, what it reached and what it took."""
    rows = []
    for run in all_runs(preset):
        result = results.get(run)
        facts = result._asdict() if result else dict.fromkeys(Result._fields)
        facts.pop("hits")
        settings = run._asdict()
        settings["cluster_ratio"], settings["match_ratio"] = settings.pop("ratios")
        rows.append(
            {"name": run.name, "status": "done" if result else reasons.get(run, "not run")}
            | settings
            | facts
        )
    return rows


def ratio_grid(rows: Sequence[Mapping]) -> np.ndarray:
    """(match ratios, cluster ratios) Acc@1 off the shelf from the rows of `ratio_table`."""
    values = [np.nan if row["shelf_acc1"] is None else row["shelf_acc1"] for row in rows]
    return np.array(values).reshape(len(MATCH_RATIOS), len(CLUSTER_RATIOS))


def better_ratios(rows: Sequence[Mapping], column: str) -> list[Mapping]:
    """Pairs of ratios ahead of the default by more than two standard errors, the best first.

    Args:
        rows: of `ratio_table`.
        column: "shelf" or "tuned".
    """
    ahead = [
        row
        for row in rows
        if row[f"{column}_to_default"] is not None
        and row[f"{column}_to_default"] > 2 * row[f"{column}_error"]
    ]
    return sorted(ahead, key=lambda row: -row[f"{column}_to_default"])
