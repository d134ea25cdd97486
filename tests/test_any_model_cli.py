"""The command line with any plain ViT of timm: training, tools, where weights come from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from conftest import PLAIN_FLAGS, REPOSITORY, RUN_FLAGS, Run, RunMain, draw_batch, randomise
from timm.models import _builder, _hub
from tool_helpers import CPU_FLAGS, refusal, run_tool
from torch import nn

import main
import visualize_mask
from arguments import data_config, get_args_parser, model_arguments, pretrained_config
from checkpoints import load_checkpoint, model_from_checkpoint
from losses import DistillationLoss
from models import REDUCTIONS, make_reducing
from tools import diversity, export, sweep, tokens
from utils import read_log

FAMILIES = (
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "vit_base_patch16_siglip_224",
)
DISTILLED = "deit_tiny_distilled_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
SMALL_FLAGS = ["--input-size", "32", "--model-kwargs", "patch_size=8", "embed_dim=32", "depth=3",
               "num_heads=2"]  # fmt: skip
ONE_EPOCH = [*RUN_FLAGS, *PLAIN_FLAGS, "--batch-size", "32", "--epochs", "1"]
images = draw_batch(2, 3, 32, 32)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked of the hub fails at once, and as it would without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def build(name: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **SMALL | {"num_classes": 4} | changes))


def one_line(stderr: str) -> str:
    (line,) = stderr.splitlines()
    return line


# A run of each family, and what is done with its checkpoint --------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One epoch of a small model of a family; its flags say the data alone."""
    folder = tmp_path_factory.mktemp(request.param)
    data = [*ONE_EPOCH, "--data-path", str(data_path)]
    flags = ["--model", request.param, *SMALL_FLAGS, *data, "--keep-rate", "0.6"]
    assert main.main([*flags, "--output-dir", str(folder)]) == 0
    return Run(folder, data, request.param)


def test_a_run_records_its_model_and_its_inputs(run: Run) -> None:
    stored, known = load_checkpoint(run.folder / "best.pth"), timm.get_pretrained_cfg(run.output)
    config = stored["data_config"]
    for name in ("mean", "std", "crop_pct", "interpolation"):
        assert config[name] == getattr(known, name), name
    assert "pretrained" not in stored["model_args"]
    has_class_token = "cls_token" in stored["model"]
    assert stored["model_args"]["importance"] == ("class" if has_class_token else "received")
    assert model_from_checkpoint(stored).keep_rates == (0.6,) * 3


def test_a_checkpoint_evaluates_and_resumes(run: Run, call_main: RunMain) -> None:
    best = run.folder / "best.pth"
    done = call_main("--eval", "--resume", best, *run.flags)
    assert done.returncode == 0 and "keep rates 0.6 0.6 0.6" in done.stdout, done.stderr
    accuracy = load_checkpoint(best)["best"]["test_acc1"]
    assert f"Acc@1 {accuracy:.3f}" in done.stdout
    last = run.folder / "checkpoint.pth"
    more = call_main("--resume", last, *run.flags, "--epochs", "2")
    assert more.returncode == 0 and "at epoch 1, step 0" in more.stdout, more.stderr


def test_layer_decay_lowers_the_rates_of_early_layers(
    run: Run, call_main: RunMain, tmp_path: Path
) -> None:
    flags = [*run.flags, "--layer-decay", "0.75", "--output-dir", tmp_path]
    done = call_main("--finetune", run.folder / "best.pth", *flags)
    assert done.returncode == 0, done.stderr
    groups = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["optimizer"]["param_groups"]
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales[-1] == 1 and scales[0] == pytest.approx(0.75 ** (len(scales) - 1))
    peak = max(group["lr"] for group in groups)
    assert all(group["lr"] == pytest.approx(peak * group["lr_scale"]) for group in groups)
    (entry,), (plain,) = read_log(tmp_path / "log.txt"), read_log(run.folder / "log.txt")
    assert entry["train_lr"] == plain["train_lr"], "the highest of the rates"


def test_every_tool_takes_the_checkpoint(run: Run, data_path: Path, tmp_path: Path) -> None:
    best, data = ["--checkpoint", run.folder / "best.pth"], ["--data-path", data_path]
    blue, out = data_path / "val" / "blue", ["--output-dir", tmp_path]
    tools = (
        (visualize_mask.main, ["--data-path", blue, "--num-images", "2", "--device", "cpu", *out]),
        (sweep.main, [*data, "--reduction", "bat", "evit", "--keep-rate", "0.5", *CPU_FLAGS, *out]),
        (diversity.main, [*data, "--reduction", "bat", "tome", *CPU_FLAGS, *out]),
        (tokens.main, ["--data-path", blue, *CPU_FLAGS, *out]),
        (export.main, ["--output", tmp_path / "model.pt2"]),
    )
    for tool, flags in tools:
        assert run_tool(tool, [*best, *flags]) == 0, tool.__module__
    model = model_from_checkpoint(load_checkpoint(run.folder / "best.pth"))
    (logits,) = export.load_file(tmp_path / "model.pt2")(images)
    torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_folder_for_the_hub_is_timms_and_ours(run: Run, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "hub"
    flags = ["--checkpoint", run.folder / "best.pth", "--format", "hf", "--output", folder]
    assert run_tool(export.main, flags) == 0
    stored = load_checkpoint(run.folder / "best.pth")
    expected = model_from_checkpoint(stored)(images)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == run.output.removeprefix("bat_")
    dense = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(make_reducing(dense, **config["reduction"])(images), expected)
    monkeypatch.setattr(_hub, "hf_hub_download", lambda repo_id, filename, **_: folder / filename)
    for source in (str(folder), "hf-hub:owner/name", "hf-hub:owner/name@main"):
        found = load_checkpoint(source)
        for key, value in found["data_config"].items():
            assert value == json.loads(json.dumps(stored["data_config"][key])), key
        assert torch.equal(model_from_checkpoint(found)(images), expected)


def test_random_weights_of_a_folder_for_the_hub_take_the_seed(tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        flags = [*SMALL_FLAGS, "--seed", seed, "--format", "hf", "--output", tmp_path / name]
        assert run_tool(export.main, flags) == 0
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_own_models_are_exported_as_timms(trained: Run, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    flags = ["--checkpoint", trained.folder / "best.pth", "--format", "hf", "--output", folder]
    assert run_tool(export.main, flags) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "deit_tiny_patch16_224"
    assert config["reduction"]["keep_rate"] == [0.6, 0.8]
    assert config["pretrained_cfg"]["crop_pct"] == 0.875
    found, stored = load_checkpoint(str(folder)), load_checkpoint(trained.folder / "best.pth")
    model, own = model_from_checkpoint(found), model_from_checkpoint(stored)
    assert torch.equal(model(images), own(images))
    dense = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(make_reducing(dense, **config["reduction"])(images), own(images))


# What the name says -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *FAMILIES,
        "bat_deit_small_patch16_224",
        "deit_small_patch16_224",
        "vit_base_patch16_clip_384.laion2b_ft_in1k",  # squashed
    ],
)
def test_inputs_are_those_of_timms_weights_unless_a_flag_says_otherwise(name: str) -> None:
    parser, known = get_args_parser(), timm.get_pretrained_cfg(name)
    args = parser.parse_args(["--model", name])
    assert model_arguments(args)["img_size"] == known.input_size[1:]
    config = data_config(args, 32, pretrained_config(name))
    assert config == {"input_size": (32, 32)} | {
        key: getattr(known, key)
        for key in ("crop_pct", "mean", "std", "interpolation", "crop_mode")
    }
    if name.startswith("bat_"):
        assert config["crop_pct"] == 0.875
    said = ["--mean", "0.1", "0.2", "0.3", "--std", "1", "1", "1", "--eval-crop-ratio", "0.5"]
    flags = ["--model", name, *said, "--interpolation", "bilinear", "--input-size", "48"]
    args = parser.parse_args(flags)
    assert model_arguments(args)["img_size"] == (48, 48)
    config = data_config(args, 48, pretrained_config(name))
    assert config["mean"] == (0.1, 0.2, 0.3) and config["std"] == (1.0, 1.0, 1.0)
    assert config["crop_pct"] == 0.5 and config["interpolation"] == "bilinear"


REFUSED = {
    "resnet18": "cannot build resnet18: a ResNet cannot be made reducing; timm's Vision",
    "swin_tiny_patch4_window7_224": "a SwinTransformer cannot be made reducing",
    "vit_small_r26_s32_224": "with a HybridEmbed has no grid of plain patches",
    "vit_dlittle_patch16_reg1_gap_256": "has a DiffAttention, whose importance is not known",
    "vit_small_patch16_224.no_such_tag": "vit_small_patch16_224.no_such_tag",
    "no_such_model": "unknown model 'no_such_model'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_one_line(
    call_main: RunMain, data_path: Path, tmp_path: Path, capsys, name: str
) -> None:
    flags, data = ["--model", name, "--nb-classes", "4"], ["--data-path", data_path]
    for mode in (["--describe"], [*ONE_EPOCH, *data]):
        done = call_main(*flags, *mode)
        assert done.returncode == 2 and REFUSED[name] in one_line(done.stderr)
    tools = (
        (export.main, ["--output", tmp_path / "m.pt2"]),
        (export.main, ["--output", tmp_path / "hub", "--format", "hf"]),
        (tokens.main, ["--data-path", data_path / "val", "--output-dir", tmp_path, *CPU_FLAGS]),
        (visualize_mask.main, [*data, "--output-dir", tmp_path, "--device", "cpu"]),
    )
    for tool, more in tools:
        assert REFUSED[name] in refusal(capsys, tool, [*flags, *more])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--importance", "class"], "importance 'class' needs a class token"),
        (["--reduction-loc", "12"], "reduction_loc must be different block indices in 0 .. 2"),
        (["--keep-rate", "0"], "keep_rate must be in (0, 1], got 0.0"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(call_main: RunMain, flags, words) -> None:
    done = call_main("--model", "vit_base_patch16_siglip_224", *SMALL_FLAGS, "--describe", *flags)
    assert done.returncode == 2 and words in one_line(done.stderr)


# Where weights come from --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, "deit_tiny_patch16_224"])
def test_pretrained_asks_timm_and_gives_a_new_head(
    call_main: RunMain, data_path: Path, tmp_path: Path, monkeypatch, name: str
) -> None:
    weights = build(name, num_classes=timm.get_pretrained_cfg(name).num_classes).state_dict()
    asked = []
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *args, **_: (
        asked.append(args[0]) or dict(weights)
    ))  # fmt: skip
    done = call_main(
        "--model", name, "--pretrained", *SMALL_FLAGS, *ONE_EPOCH, "--data-path", data_path,
        "--lr", "0", "--warmup-lr", "0", "--min-lr", "0", "--output-dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and asked == [timm.get_pretrained_cfg(name).hf_hub_id], done.stderr
    stored = load_checkpoint(tmp_path / "best.pth")
    assert "pretrained" not in stored["model_args"] and stored["model_args"]["num_classes"] == 4
    assert stored["model"]["head.weight"].shape[0] == 4
    for key, value in weights.items():
        assert key.startswith("head.") or torch.equal(stored["model"][key], value), key
    again = call_main("--eval", "--resume", tmp_path / "best.pth", *RUN_FLAGS, "--data-path",
                      data_path)  # fmt: skip
    assert again.returncode == 0 and len(asked) == 1, "a checkpoint asks for no other weights"


@pytest.mark.parametrize("flags", [
    ["--model", "vit_small_patch16_dinov3", "--pretrained"],
    ["--eval", "--resume", "hf-hub:no/such"],
])  # fmt: skip
def test_without_a_network_one_line_says_what_was_tried(data_path: Path, flags: list[str]) -> None:
    """As a process, so that whatever a library prints is seen; its cache is empty."""
    done = subprocess.run(
        [sys.executable, "main.py", *flags, *ONE_EPOCH, "--data-path", data_path],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=600,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nowhere"},
    )  # fmt: skip
    line = one_line(done.stderr)
    assert done.returncode == 2
    assert (
        "timm/vit_small_patch16_dinov3" if "--pretrained" in flags else "hf-hub:no/such"
    ) in line
    assert "--finetune FILE" in line if "--pretrained" in flags else "cannot be read" in line


@pytest.mark.parametrize("name", [*FAMILIES, DISTILLED])
@torch.no_grad()
def test_bare_weights_of_a_name_are_read(
    call_main: RunMain, data_path: Path, tmp_path: Path, name: str
) -> None:
    """Also at another input size, where there are positions to resample."""
    model = build(name)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    flags = ["--model", name, *SMALL_FLAGS, *ONE_EPOCH, "--data-path", data_path]
    for size in ([], ["--input-size", "48"]):
        file = ["--resume", tmp_path / "weights.safetensors"]
        done = call_main(*flags, *size, "--eval", *file)
        assert done.returncode == 0 and "on 24 images" in done.stdout, done.stderr
    found = model_from_checkpoint(
        load_checkpoint(tmp_path / "weights.safetensors"), model_name=name, keep_rate=1.0, **SMALL
    )
    torch.testing.assert_close(found(images), model(images), rtol=0, atol=1e-5)


def test_torch_hub_finds_the_models() -> None:
    """In a process that has imported nothing of this project, from another folder."""
    code = (
        f"import torch; m = torch.hub.load({str(REPOSITORY)!r}, 'bat_deit_tiny_patch16_224', "
        "source='local', keep_rate=0.5, depth=2, embed_dim=24); "
        f"r = torch.hub.load({str(REPOSITORY)!r}, 'make_reducing', m, source='local', "
        "keep_rate=0.4); print(r.keep_rates)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and done.stdout.startswith("(0.4, 0.4)"), done.stderr


# Distilled DeiT -----------------------------------------------------------------------------------

DISTILLED_FLAGS = ["--model", DISTILLED, *SMALL_FLAGS, *ONE_EPOCH]


@torch.no_grad()
def test_facebooks_distilled_file_evaluates_as_timms(
    call_main: RunMain, data_path: Path, tmp_path: Path
) -> None:
    model = build(DISTILLED)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    done = call_main(*DISTILLED_FLAGS, "--data-path", data_path, "--eval", "--resume",
                     tmp_path / "weights.pth", "--keep-rate", "0.5")  # fmt: skip
    assert done.returncode == 0 and "not loaded" not in done.stdout, done.stderr
    keywords = {"model_name": DISTILLED, **SMALL, "keep_rate": 1.0}
    found = model_from_checkpoint(load_checkpoint(tmp_path / "weights.pth"), **keywords)
    torch.testing.assert_close(found(images), model(images), rtol=0, atol=1e-5)
    features = model.forward_features(images)
    both = (model.head(features[:, 0]) + model.head_dist(features[:, 1])) / 2
    torch.testing.assert_close(found(images), both, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "hard", "soft"])
def test_distilled_training_resumes(
    call_main: RunMain, data_path: Path, trained: Run, tmp_path: Path, kind: str
) -> None:
    flags = [*DISTILLED_FLAGS, "--data-path", data_path, "--output-dir", tmp_path]
    if kind != "none":
        flags += ["--distillation-type", kind, "--teacher-model", "bat_deit_tiny_patch16_224",
                  "--teacher-path", trained.folder / "best.pth"]  # fmt: skip
    assert call_main(*flags, "--layer-decay", "0.75").returncode == 0
    more = call_main(*flags, "--layer-decay", "0.75", "--resume", "auto", "--epochs", "2")
    assert more.returncode == 0 and "at epoch 1" in more.stdout, more.stderr
    done = call_main("--eval", "--resume", tmp_path / "best.pth", *RUN_FLAGS, "--data-path",
                     data_path)  # fmt: skip
    assert done.returncode == 0 and "on 24 images" in done.stdout


@pytest.mark.parametrize("kind", ["none", "hard"])
def test_each_head_learns_from_its_own_source(kind: str, trained: Run) -> None:
    """By hand: the class head sees the labels, the distillation head the teacher's decisions."""
    teacher = ["--teacher-model", "bat_deit_tiny_patch16_224", "--teacher-path",
               str(trained.folder / "best.pth"), "--distillation-alpha", "0.25"]  # fmt: skip
    flags = [*DISTILLED_FLAGS, "--smoothing", "0", "--distillation-type", kind, *teacher]
    args = get_args_parser().parse_args(flags)
    start = main.StartingPoint("", {}, False)
    model = main.build_run_model(args, model_arguments(args) | {"num_classes": 4}, start).train()
    criterion = main.build_criterion(args, 4, torch.device("cpu"), (32, 32))
    assert isinstance(criterion, DistillationLoss)
    targets = torch.tensor([1, 3])
    loss = criterion(images, model(images), targets)
    x, *_ = model.run_blocks(images)
    x = model.norm(x)
    own, distilled = model.head(x[:, 0]), model.head_dist(x[:, 1])
    if kind == "none":
        expected = F.cross_entropy((own + distilled) / 2, targets)
    else:
        decisions = criterion.teacher_model(images).argmax(dim=1)
        expected = 0.75 * F.cross_entropy(own, targets)
        expected = expected + 0.25 * F.cross_entropy(distilled, decisions)
    torch.testing.assert_close(loss, expected)
    gradient, *_ = torch.autograd.grad(loss, model.head_dist.bias)
    if kind == "hard":
        share = distilled.softmax(1) - F.one_hot(decisions, 4)
        torch.testing.assert_close(gradient, 0.25 * share.mean(dim=0))


# A reduction of one's own -------------------------------------------------------------------------

MY_MODULE = """
def my_method(stage, budget):
    rank = stage.importance.argsort(dim=1, descending=True).argsort(dim=1)
    return rank.masked_fill(rank >= budget.kept, -1)
"""


def test_reduction_of_ones_own(
    call_main: RunMain, data_path: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_module.py").write_text(MY_MODULE)
    name = "my_own_module:my_method"
    flags = ["--model", FAMILIES[0], *SMALL_FLAGS, *ONE_EPOCH, "--data-path", data_path]
    done = call_main(*flags, "--reduction", name, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    best = tmp_path / "run" / "best.pth"
    assert load_checkpoint(best)["model_args"]["reduction"] == name
    evaluate = ["--eval", "--resume", best, *RUN_FLAGS, "--data-path", data_path]
    own = call_main(*evaluate, "--reduction", name)
    topk = call_main(*evaluate, "--reduction", "topk")
    assert own.returncode == topk.returncode == 0
    assert own.stdout.splitlines()[-1] == topk.stdout.splitlines()[-1]
    # Another process, in which nothing has been imported.
    del REDUCTIONS[name]
    monkeypatch.delitem(sys.modules, "my_own_module")
    refused = call_main(*evaluate)
    assert refused.returncode == 2 and f"--reduction {name}" in one_line(refused.stderr)
    assert "my_own_module" not in sys.modules, "a file never has code imported"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:f", "cannot import no_such_module:f: ModuleNotFoundError"),
        ("math:no_such_method", "cannot import math:no_such_method: AttributeError"),
        ("math:pi", "cannot import math:pi"),
        (":f", "cannot import :f"),
        ("nothing", "unknown method 'nothing'; choose from "),
    ],
)
def test_what_is_no_method_is_one_line(call_main: RunMain, name: str, words: str) -> None:
    done = call_main("--describe", "--reduction", name)
    assert done.returncode == 2 and words in one_line(done.stderr)
    assert name not in REDUCTIONS
