"""The runs of a study, and the commands that make them."""

from pathlib import Path
from typing import NamedTuple

from .presets import ALL_KEEP_RATES, ALL_METHODS, Preset

SEEDED_RATES = (0.7, 0.5, 0.3)  # with more than one seed, in the presets that have several
SCRATCH_RATE = 0.7
ABLATION_RATES = (0.5, 0.3)
RATIO_RATE = 0.5
DEFAULT_RATIOS = (0.4, 0.1)


class Run(NamedTuple):
    """One training run.

    Attributes:
        reduction: a name in REDUCTIONS.
        keep_rate: of all stages.
        seed: of everything random.
        ratios: cluster ratio and match ratio; only bat looks at them.
        merge_weights: "importance" or "mean".
        is_tuned: starts from the dense model's weights instead of random ones.
    """

    reduction: str
    keep_rate: float
    seed: int = 0
    ratios: tuple[float, float] = DEFAULT_RATIOS
    merge_weights: str = "importance"
    is_tuned: bool = True

    @property
    def name(self) -> str:
        """Name of its folder, such as bat_keep0.5_cluster0.8_match0_seed1."""
        if self == DENSE:
            return "dense"
        parts = [] if self.is_tuned else ["scratch"]
        parts += [self.reduction, f"keep{self.keep_rate:g}"]
        if self.ratios != DEFAULT_RATIOS:
            parts += [f"cluster{self.ratios[0]:g}", f"match{self.ratios[1]:g}"]
        if self.merge_weights != "importance":
            parts.append(self.merge_weights)
        return "_".join([*parts, f"seed{self.seed}"])


DENSE = Run("none", 1.0, is_tuned=False)
TUNED_DENSE = Run("none", 1.0)  # what as much more training does to a model that keeps everything


def main_runs(preset: Preset) -> list[Run]:
    """Every method at every keep rate and the dense model, fine-tuned from the same weights."""
    runs = [Run(method, rate) for rate in preset.keep_rates for method in preset.methods]
    seeded = [run for first in [TUNED_DENSE, *runs] for run in with_seeds(first, preset)]
    return sorted(seeded, key=lambda run: run.seed)  # a table is whole before the next seed's


def scratch_runs() -> list[Run]:
    """BAT and EViT from scratch."""
    return [Run(method, SCRATCH_RATE, is_tuned=False) for method in ("bat", "evit")]


def ablation_rows(rate: float) -> dict[str, Run]:
    """What each row of the ablation is, by label; the first seed's runs.

    Importance alone is BAT without clusters and pairs: it keeps the most attended tokens, and is
    the run that `topk` stands for.
    """
    return {
        "importance alone": Run("topk", rate),
        "+ clusters": Run("bat", rate, ratios=(DEFAULT_RATIOS[0], 0.0)),
        "+ clusters + matching": Run("bat", rate),
        "the same, plain means": Run("bat", rate, merge_weights="mean"),
    }


def ratio_run(ratios: tuple[float, float]) -> Run:
    """The fine-tuned run of a pair of ratios; without clusters and pairs it is topk's."""
    return Run("topk", RATIO_RATE) if ratios == (0.0, 0.0) else Run("bat", RATIO_RATE, 0, ratios)


def with_seeds(run: Run, preset: Preset) -> list[Run]:
    """A run with every seed that the preset gives its keep rate."""
    count = preset.seeds if run.keep_rate in SEEDED_RATES and run.is_tuned else 1
    return [run._replace(seed=seed) for seed in range(count)]


def all_runs(preset: Preset) -> list[Run]:
    """Every run once, the dense one first, then those that all tables need."""
    rates = [rate for rate in ABLATION_RATES if rate in preset.keep_rates]
    ablation = [run for rate in rates for run in ablation_rows(rate).values()]
    runs = [DENSE, *scratch_runs(), *main_runs(preset)]
    runs += [seeded for run in ablation for seeded in with_seeds(run, preset)]
    runs += [ratio_run(ratios) for ratios in preset.ratios_tuned]
    return list(dict.fromkeys(runs))


def shelf_runs() -> list[Run]:
    """What the dense weights are evaluated with, besides the dense model itself."""
    return [Run(method, rate) for rate in ALL_KEEP_RATES for method in ALL_METHODS]


def epochs_of(run: Run, preset: Preset) -> int:
    """Epochs that a run takes."""
    return preset.tune_epochs if run.is_tuned else preset.dense_epochs


def run_command(
    run: Run, preset: Preset, *, data_path: str, folder: Path, device: str
) -> list[str]:
    """The words of the `main.py` command that makes a run, or goes on with it.

    The schedule is the fine-tuning scripts' (AdamW, weight decay 1e-6, cosine, no warm-up, label
    smoothing 0.1, stochastic depth off) or, from scratch, the training script's, scaled to the data
    set: other learning rates and epochs, crops and flips instead of RandAugment and erasing.

    Args:
        run: which one.
        preset: its sizes.
        data_path: folder with train/ and val/.
        folder: of the study.
        device: as for `main.py`.
    """
    epochs = epochs_of(run, preset)
    mix = preset.mixup and not run.is_tuned
    words: list[object] = [
        "main.py", "--model", "bat_deit_tiny_patch16_224", "--input-size", preset.input_size,
        "--model-kwargs", f"patch_size={preset.patch_size}", f"embed_dim={preset.embed_dim}",
        f"depth={preset.depth}", f"num_heads={preset.num_heads}",
        "--reduction", run.reduction, "--keep-rate", run.keep_rate,
        "--cluster-ratio", run.ratios[0], "--match-ratio", run.ratios[1],
        "--merge-weights", run.merge_weights,
        "--reduction-loc", *[block * preset.depth // 12 for block in (3, 6, 9)],
        "--data-path", data_path, "--image-cache", folder / "images", "--src",
        "--aa", "none", "--color-jitter", 0, "--reprob", 0, "--no-repeated-aug",
        "--mixup", 0.8 if mix else 0, "--cutmix", 1.0 if mix else 0, "--smoothing", 0.1,
        "--batch-size", preset.batch_size, "--epoch-images", preset.epoch_images,
        "--epochs", epochs, "--eval-interval", epochs, "--unscale-lr",
        "--opt", "adamw", "--sched", "cosine", "--no-model-ema", "--seed", run.seed,
        "--amp", preset.amp, "--device", device, "--num-workers", 0, "--print-freq", 20,
        "--resume", "auto", "--output-dir", folder / "runs" / run.name,
    ]  # fmt: skip
    if run.is_tuned:
        words += ["--finetune", folder / "runs" / DENSE.name / "checkpoint.pth"]
        words += ["--lr", preset.tune_lr, "--min-lr", preset.tune_lr / 10, "--warmup-lr", 0]
        words += ["--warmup-epochs", 0, "--weight-decay", 1e-6]
    else:
        words += ["--lr", preset.lr, "--min-lr", 1e-5, "--warmup-lr", preset.lr / 10]
        words += ["--warmup-epochs", 1 if epochs > 1 else 0, "--weight-decay", 0.05]
        words += ["--drop-path", 0.0 if preset.embed_dim < 192 else 0.1]
    if preset.compile:
        words.append("--compile")
    return [str(word) for word in words]
