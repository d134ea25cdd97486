"""Any plain ViT of timm on the command line: training, weights, the hub, methods of one's own."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import REPOSITORY, RUN_FLAGS, Result, RunMain, randomise, read_log
from PIL import Image
from timm.models import _hub
from tool_helpers import run_tool

import checkpoints
import main
import visualize_mask
from checkpoints import load_checkpoint, model_from_checkpoint
from datasets import build_transform
from models import make_reducing
from models.reduction import REDUCTIONS
from tools import diversity, export, sweep, tokens

SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 3}
KEYWORDS = ["--model-kwargs", *(f"{name}={value}" for name, value in SMALL.items())]
FAST = [*RUN_FLAGS, "--batch-size", "16", "--epochs", "1", "--warmup-epochs", "0"]
# A model of each kind, small, and what timm says of its images.
MODELS = {
    "vit_small_patch14_dinov2": (56, {"crop_pct": 1.0}),
    "vit_small_patch16_dinov3": (64, {"crop_pct": 1.0}),
    "eva02_tiny_patch14_224": (56, {"crop_pct": 0.9, "mean": (0.48145466, 0.4578275, 0.40821073)}),
    "vit_base_patch16_siglip_224": (64, {"mean": (0.5,) * 3, "std": (0.5,) * 3}),
    "deit_tiny_distilled_patch16_224": (64, {"crop_pct": 0.9}),
    "bat_deit_tiny_patch16_224": (64, {"crop_pct": 0.875}),
}


def train(call: RunMain, name: str, data: Path, folder: Path, *more: object) -> Result:
    size = ["--input-size", MODELS[name][0]] if name in MODELS else []
    flags = ["--model", name, *size, *KEYWORDS, *FAST, "--data-path", data, "--output-dir", folder]
    done = call(*flags, *more)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("name", MODELS)
def test_train_evaluate_resume_finetune(
    name: str, call_main: RunMain, data_path: Path, tmp_path: Path
) -> None:
    train(call_main, name, data_path, tmp_path / "a", "--keep-rate", "0.5")
    stored = load_checkpoint(tmp_path / "a" / "best.pth")
    assert MODELS[name][1].items() <= stored["data_config"].items()
    assert stored["model_args"]["reduction_loc"] == (1, 2, 3)  # of four blocks
    [entry] = read_log(tmp_path / "a")
    base = [*FAST, "--data-path", data_path]
    done = call_main("--eval", "--resume", tmp_path / "a" / "best.pth", *base)
    assert f"Acc@1 {entry['test_acc1']:.3f}" in done.stdout
    assert f"loss {entry['test_loss']:.4f}" in done.stdout
    resume = ["--resume", tmp_path / "a" / "checkpoint.pth", "--epochs", "2"]
    assert "at epoch 1" in call_main(*base, *resume).stdout
    flags = ["--finetune", tmp_path / "a" / "best.pth", "--layer-decay", "0.5", "--output-dir"]
    assert call_main(*base, *flags, tmp_path / "b").returncode == 0
    groups = load_checkpoint(tmp_path / "b" / "checkpoint.pth")["optimizer"]["param_groups"]
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales == [0.5**n for n in reversed(range(len(scales)))] and len(scales) == 6


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_base_patch16_siglip_224"])
def test_pictures_and_tools(name: str, call_main: RunMain, data_path: Path, tmp_path: Path) -> None:
    train(call_main, name, data_path, tmp_path)
    flags = ["--checkpoint", tmp_path / "best.pth", "--data-path", data_path, "--device", "cpu"]
    pictures = [*flags, "--num-images", 1, "--output-dir", tmp_path / "pictures"]
    assert run_tool(visualize_mask.main, pictures) == 0
    light = [*flags, "--num-workers", 0, "--output-dir"]
    assert run_tool(sweep.main, [*light, tmp_path / "s", "--keep-rate", 1, 0.5]) == 0
    assert run_tool(diversity.main, [*light, tmp_path / "d", "--num-images", 4]) == 0
    assert run_tool(tokens.main, [*light, tmp_path / "t", "--num-images", 2]) == 0
    assert run_tool(export.main, ["--checkpoint", tmp_path / "best.pth", "--output",
                                  tmp_path / "m.pt2"]) == 0  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", "is no plain ViT of timm's modules"),
        ("swin_tiny_patch4_window7_224", "a SwinTransformer cannot be made reducing"),
        ("vit_tiny_r_s16_p8_224", "HybridEmbed"),
        ("vit_dwee_patch16_reg1_gap_256", "DiffAttention"),
        ("no_such_model", "unknown model 'no_such_model'"),
    ],
)
def test_other_models_are_one_line(
    name: str, words: str, call_main: RunMain, data_path: Path
) -> None:
    for flags in (["--describe"], ["--data-path", data_path, *FAST]):
        done = call_main("--model", name, *flags)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
        assert name in done.stderr


# Weights ----------------------------------------------------------------------------------------


def dense(name: str, size: int, **changes: object) -> torch.nn.Module:
    return randomise(timm.create_model(name, img_size=size, **SMALL, **changes)).eval()


def test_pretrained_asks_timm(
    call_main: RunMain, data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another class count takes a new head; the flag is not recorded."""
    name, asked = "vit_small_patch16_dinov3", []
    source = dense(name, 64)

    def load(model: torch.nn.Module, **options: object) -> None:
        asked.append(model.num_classes)
        weights = source.state_dict()
        model.load_state_dict(weights, strict=False)

    monkeypatch.setattr("timm.models._builder.load_pretrained", load)
    train(call_main, name, data_path, tmp_path, "--pretrained", "--lr", "0", "--min-lr", "0",
          "--warmup-lr", "0")  # fmt: skip
    stored = load_checkpoint(tmp_path / "checkpoint.pth")
    assert asked == [4] and "pretrained" not in stored["model_args"]
    name = "blocks.3.attn.qkv.weight"
    assert torch.equal(stored["model"][name], source.state_dict()[name])


def test_pretrained_without_a_network_is_one_line(
    call_main: RunMain, data_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = "vit_small_patch16_dinov3"
    done = call_main("--model", name, "--pretrained", *FAST, "--data-path", data_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert name in done.stderr and "--finetune FILE" in done.stderr


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "bat_deit_tiny_patch16_224"])
def test_a_folder_for_the_hub(
    name: str, call_main: RunMain, data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm reads it without this code; this code takes the reduction from it as well."""
    train(call_main, name, data_path, tmp_path / "run", "--keep-rate", "0.5")
    folder, source = tmp_path / "hub", tmp_path / "run" / "best.pth"
    flags = ["--checkpoint", source, "--format", "hf", "--output", folder]
    assert run_tool(export.main, flags) == 0
    images = torch.randn(2, 3, 64, 64)
    expected = model_from_checkpoint(load_checkpoint(source))(images)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == name.removeprefix("bat_")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(make_reducing(model, **config["reduction"]).eval()(images), expected)
    again = model_from_checkpoint(load_checkpoint(folder))
    assert torch.equal(again(images), expected) and again.keep_rates == (0.5,) * 3
    # As from the hub, and its weights alone.
    monkeypatch.setattr(checkpoints, "download_from_hf", lambda _, file: str(folder / file))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    monkeypatch.setattr(checkpoints, "load_state_dict_from_hf", lambda _, **options: weights)
    again = model_from_checkpoint(load_checkpoint("hf-hub:owner/name"))
    assert torch.equal(again(images), expected)
    alone = load_checkpoint(folder / "model.safetensors")
    assert alone["model"].keys() == weights.keys()
    done = call_main("--eval", "--resume", folder, *FAST, "--data-path", data_path)
    assert done.returncode == 0 and "keep rates 0.5 0.5 0.5" in done.stdout


def test_torch_hub() -> None:
    name = "bat_deit_tiny_patch16_224"
    model = torch.hub.load(str(REPOSITORY), name, source="local", keep_rate=0.5)
    assert model.keep_rates == (0.5, 0.5, 0.5)
    assert _hub.has_hf_hub()


# The distillation token -------------------------------------------------------------------------


def test_distilled_checkpoints_load_strictly(
    call_main: RunMain, data_path: Path, tmp_path: Path
) -> None:
    name = "deit_tiny_distilled_patch16_224"
    model = dense(name, 64, num_classes=4)
    path = tmp_path / "distilled.pth"
    torch.save({"model": model.state_dict()}, path)
    flags = ["--model", name, *KEYWORDS, *FAST, "--data-path", data_path, "--eval", "--resume"]
    done = call_main(*flags, path)
    assert done.returncode == 0, done.stderr
    again = model_from_checkpoint(load_checkpoint(path), model_name=name, keep_rate=1, **SMALL)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), model(images))  # both average their heads


@pytest.mark.parametrize("kind", ["none", "hard"])
def test_the_distillation_token_learns_from_the_teacher(
    kind: str, call_main: RunMain, data_path: Path, tmp_path: Path
) -> None:
    """With a weight of 1 the class head is left alone; without a teacher both heads learn."""
    name = "deit_tiny_distilled_patch16_224"
    teacher = timm.create_model("resnet10t", num_classes=4)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    flags = ["--model", name, "--input-size", "64", *KEYWORDS, *FAST, "--data-path", data_path]
    flags += ["--output-dir", tmp_path / kind, "--weight-decay", "0"]
    if kind == "hard":
        flags += ["--distillation-type", kind, "--distillation-alpha", "1", "--teacher-model",
                  "resnet10t", "--teacher-path", tmp_path / "teacher.pth"]  # fmt: skip
    assert call_main(*flags).returncode == 0
    done = load_checkpoint(tmp_path / kind / "checkpoint.pth")
    moments = done["optimizer"]["state"]
    names = [n for n, _ in timm.create_model(name, img_size=64, **SMALL).named_parameters()]
    groups = [index for group in done["optimizer"]["param_groups"] for index in group["params"]]
    model = main.build_model(done["model_args"])
    ordered = {id(p): n for n, p in model.named_parameters()}
    optimizer = main.create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.0)
    by_name = {
        ordered[id(p)]: moments.get(index)
        for index, p in zip(groups, (p for g in optimizer.param_groups for p in g["params"]),
                            strict=True)
    }  # fmt: skip
    assert set(by_name) == set(names)
    assert by_name["head_dist.weight"]["exp_avg"].abs().max() > 0
    assert (by_name["head.weight"]["exp_avg"].abs().max() > 0) == (kind == "none")


# Methods of one's own ---------------------------------------------------------------------------

METHOD = """
def keep_the_first(stage, budget):
    import torch
    index = torch.arange(stage.x.shape[1], device=stage.x.device).expand(len(stage.x), -1)
    return index.masked_fill(index >= budget.kept, -1)
"""


def test_a_method_of_ones_own(
    call_main: RunMain, data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_module.py").write_text(METHOD)
    monkeypatch.chdir(tmp_path)
    own = ["--reduction", "my_module:keep_the_first"]
    done = train(call_main, "bat_deit_tiny_patch16_224", data_path, tmp_path / "run", *own)
    assert "reduction my_module:keep_the_first" in done.stdout
    evaluate = [
        "--eval",
        "--resume",
        tmp_path / "run" / "best.pth",
        *FAST,
        "--data-path",
        data_path,
    ]
    assert call_main(*evaluate, *own).returncode == 0
    monkeypatch.delitem(REDUCTIONS, own[1])
    monkeypatch.delitem(sys.modules, "my_module")
    done = call_main(*evaluate)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "unknown reduction 'my_module:keep_the_first'" in done.stderr
    assert "my_module" not in sys.modules, "a checkpoint never imports anything"


@pytest.mark.parametrize("method", ["no_such:thing", "json:no_such", "nothing"])
def test_a_method_that_is_not_there(method: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main.main(["--describe", "--reduction", method])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and method in error


def test_interpolation_is_the_models() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))
    args = main.get_args_parser().parse_args(["--interpolation", "bilinear"])
    config = main.data_config(args, 48, {})
    bilinear = build_transform(False, args, config)(image)
    bicubic = build_transform(False, args, config | {"interpolation": "bicubic"})(image)
    assert config["interpolation"] == "bilinear" and not torch.equal(bilinear, bicubic)
