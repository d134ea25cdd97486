"""What a preset implies: the model, the images a run sees, and which runs there are."""

import math
from dataclasses import asdict, dataclass, fields, replace

from utils import InputError

# Below this share of a preset's minutes its runs see too few images to say anything.
SMALLEST_SHARE = 0.25
CLUSTER_RATIOS = (0.0, 0.1, 0.25, 0.4, 0.6, 0.8)
MATCH_RATIOS = (0.0, 0.05, 0.1, 0.2, 0.3)
EXTREME_RATIOS = ((0.0, 0.0), (0.0, 0.3), (0.8, 0.0), (0.8, 0.3))
ALL_KEEP_RATES = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
ALL_METHODS = ("random", "topk", "evit", "tome", "dpcknn", "bat")


@dataclass(frozen=True)
class Preset:
    """Sizes of a study.

    Attributes:
        name: of the preset.
        device: that it is made for, "cpu" or "cuda".
        minutes: that it takes on a machine like the one it was made for.
        made_for: that machine, in words.
        input_size: side of the images, in pixels.
        patch_size: side of a patch, in pixels.
        embed_dim: width of the model.
        num_heads: attention heads.
        batch_size: images of a step.
        epoch_images: training images an epoch visits.
        dense_epochs: epochs of the dense model and of the runs from scratch.
        tune_epochs: epochs of a fine-tuning run.
        lr: peak learning rate from scratch, as it is (not scaled by the batch).
        tune_lr: peak learning rate of fine-tuning.
        methods: that are fine-tuned.
        keep_rates: at which they are fine-tuned.
        seeds: how many fine-tuning runs a method gets at 0.7, 0.5 and 0.3.
        ratios_tuned: (cluster ratio, match ratio) pairs that are fine-tuned at keep rate 0.5.
        mixup: mixup and cutmix from scratch.
        shelf_images: validation images, spread evenly, of the evaluations off the shelf.
        amp: autocast type, as for `main.py`.
        compile: whether training is compiled.
        jobs: runs at a time; 0: one a core.
    """

    name: str
    device: str
    minutes: float
    made_for: str
    input_size: int
    patch_size: int
    embed_dim: int
    num_heads: int
    batch_size: int
    epoch_images: int
    dense_epochs: int
    tune_epochs: int
    lr: float
    tune_lr: float
    methods: tuple[str, ...]
    keep_rates: tuple[float, ...]
    seeds: int
    ratios_tuned: tuple[tuple[float, float], ...]
    mixup: bool
    shelf_images: int
    amp: str
    compile: bool
    jobs: int
    depth: int = 12

    @property
    def num_tokens(self) -> int:
        """Patch tokens of an image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def tunes_all_ratios(self) -> bool:
        """Whether every pair of ratios is fine-tuned, not the extremes alone."""
        return len(self.ratios_tuned) == len(CLUSTER_RATIOS) * len(MATCH_RATIOS)

    def cuts(self) -> list[str]:
        """What the full study has and this preset has not, one sentence each."""
        cuts = []
        methods = [name for name in ALL_METHODS if name not in self.methods]
        rates = [f"{rate:g}" for rate in ALL_KEEP_RATES if rate not in self.keep_rates]
        if methods:
            cuts.append(f"not fine-tuned (evaluated off the shelf only): {', '.join(methods)}")
        if rates:
            cuts.append(f"keep rates that are only evaluated off the shelf: {', '.join(rates)}")
        if self.seeds < 3:
            cuts.append(f"seeds of a fine-tuning run: {self.seeds} instead of 3")
        if not self.tunes_all_ratios:
            cuts.append(
                f"ratios fine-tuned: the {len(self.ratios_tuned)} extremes and the default; "
                "the others are evaluated off the shelf only"
            )
        if self.shelf_images < 10_000:
            cuts.append(f"validation images off the shelf: {self.shelf_images:,} instead of 10,000")
        if self.num_tokens < 256:
            cuts.append(f"patch tokens: {self.num_tokens} instead of 256")
        return cuts

    def describe(self) -> dict:
        """Everything it implies, as plain values."""
        return asdict(self) | {"num_tokens": self.num_tokens, "cuts": self.cuts()}


PRESETS = {
    "cpu": Preset(
        name="cpu",
        device="cpu",
        minutes=90,
        made_for="2 CPU cores",
        input_size=32,
        patch_size=4,
        embed_dim=64,
        num_heads=2,
        batch_size=64,
        epoch_images=12_800,
        dense_epochs=20,
        tune_epochs=4,
        lr=1e-3,
        tune_lr=2e-4,
        methods=("topk", "evit", "tome", "dpcknn", "bat"),
        keep_rates=(0.7, 0.5, 0.3),
        seeds=1,
        ratios_tuned=EXTREME_RATIOS,
        mixup=False,
        shelf_images=5_000,
        amp="off",
        compile=False,
        jobs=0,
    ),
    "gpu": Preset(
        name="gpu",
        device="cuda",
        minutes=25,
        made_for="one H200-class GPU with 16 CPU cores; not tried yet",
        input_size=32,
        patch_size=4,
        embed_dim=192,
        num_heads=3,
        batch_size=512,
        epoch_images=50_000,
        dense_epochs=60,
        tune_epochs=5,
        lr=1e-3,
        tune_lr=1e-4,
        methods=ALL_METHODS,
        keep_rates=ALL_KEEP_RATES,
        seeds=3,
        ratios_tuned=EXTREME_RATIOS,
        mixup=True,
        shelf_images=10_000,
        amp="bf16",
        compile=True,
        jobs=6,
    ),
    "smoke": Preset(
        name="smoke",
        device="cpu",
        minutes=5,
        made_for="2 CPU cores, to see that everything runs; its figures mean nothing",
        input_size=32,
        patch_size=4,
        embed_dim=32,
        num_heads=2,
        batch_size=32,
        epoch_images=64,
        dense_epochs=1,
        tune_epochs=1,
        lr=1e-3,
        tune_lr=2e-4,
        methods=("evit", "bat"),
        keep_rates=(0.5,),
        seeds=1,
        ratios_tuned=((0.8, 0.3),),
        mixup=False,
        shelf_images=64,
        amp="off",
        compile=False,
        jobs=0,
        depth=6,
    ),
}


def load_preset(values: dict) -> Preset:
    """The preset that `Preset.describe` described."""
    names = {field.name for field in fields(Preset)}
    kept = {name: _as_tuple(value) for name, value in values.items() if name in names}
    return Preset(**kept)


def _as_tuple(value: object) -> object:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def choose_preset(name: str, budget_minutes: float | None) -> Preset:
    """A preset, with its images an epoch scaled to the budget.

    Args:
        name: in PRESETS.
        budget_minutes: on a machine like the one of the preset; None: the preset's own.

    Raises:
        InputError: the budget is too small for even the reduced study.
    """
    preset = PRESETS[name]
    if budget_minutes is None:
        return preset
    share = budget_minutes / preset.minutes
    if not share >= SMALLEST_SHARE or math.isinf(share):
        raise InputError(
            f"--budget-minutes {budget_minutes:g} is too small for preset {name}: "
            f"it needs at least {SMALLEST_SHARE * preset.minutes:g} of its {preset.minutes:g}"
        )
    # Longer budgets mean more epochs: an epoch never has more images than the training set.
    if share > 1:
        epochs = {"dense_epochs": preset.dense_epochs, "tune_epochs": preset.tune_epochs}
        scaled = {key: max(1, round(share * value)) for key, value in epochs.items()}
    else:
        steps = max(1, round(share * preset.epoch_images / preset.batch_size))
        scaled = {"epoch_images": steps * preset.batch_size}
    return replace(preset, minutes=budget_minutes, **scaled)
