"""Checkpoints of other projects: what they show, what they say, and going on from them."""

import argparse
import contextlib
import copy
import io
import math
import pathlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import (
    PLAIN_FLAGS,
    RUN_FLAGS,
    Run,
    RunMain,
    build_tiny,
    draw_batch,
    main_in_process,
    randomise,
    read_log,
)
from fault_helpers import rewrite_archive
from torch import Tensor, nn

from arguments import DEFAULT_MODEL
from checkpoints import load_checkpoint, model_from_checkpoint
from utils import InputError

SMALL = {
    "img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 3, "num_heads": 2, "num_classes": 4,
}  # fmt: skip
SAID = {"base_keep_rate": 0.5, "drop_loc": "(1, 2)", "fuse_token": True, "input_size": 32}
FILE_FLAGS = [*RUN_FLAGS, "--batch-size", "16"]  # the model is the file's


def build(name: str, **changes: object) -> nn.Module:
    return randomise(timm.create_model(name, **SMALL | changes))


def save(path: Path, model: nn.Module, **more: object) -> Path:
    """As DeiT's and EViT's main.py write it."""
    torch.save({"model": model.state_dict(), **more}, path)
    return path


# What the weights show --------------------------------------------------------------------------


def facebooks_deit3(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for name, value in weights.items()
    }


def facebooks_dinov2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a mask token; with registers the class token has a position of its own."""
    weights = dict(weights) | {"mask_token": torch.zeros(1, 128)}
    if "reg_token" in weights:
        place = torch.randn(1, 1, 128)
        weights["register_tokens"] = weights.pop("reg_token")
        weights["cls_token"] = weights["cls_token"] - place
        weights["pos_embed"] = torch.cat([place, weights["pos_embed"]], dim=1)
    return weights


LAYOUTS = {
    "deit": ("deit_small_patch16_224", {}, dict),
    "deit-size": ("deit_small_patch16_224", {"img_size": 48, "patch_size": 16}, dict),
    "deit3": ("deit3_small_patch16_224", {}, dict),
    "deit3-facebook": ("deit3_small_patch16_224", {}, facebooks_deit3),
    "dinov2": ("vit_small_patch14_dinov2", {"patch_size": 4}, dict),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {}, dict),
    "dinov2-facebook": ("vit_small_patch14_dinov2", {}, facebooks_dinov2),
    "dinov2-registers-facebook": ("vit_small_patch14_reg4_dinov2", {}, facebooks_dinov2),
    "registers-with-positions": ("vit_small_patch16_224", {"reg_tokens": 3}, dict),
    "mae": ("vit_base_patch16_224", {"global_pool": "avg"}, dict),
    "no-biases": ("vit_base_patch16_224", {"qkv_bias": False, "proj_bias": False}, dict),
    "norms": ("vit_base_patch16_224", {"qk_norm": True, "num_heads": 8, "pre_norm": True}, dict),
    "scaled": ("vit_base_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}, dict),
    "width-16-heads": (
        "vit_base_patch16_224", {"embed_dim": 1408, "depth": 1, "num_heads": 16,
                                 "mlp_ratio": 48 / 11}, dict,
    ),
    "flat-patch": ("vit_base_patch16_224", {"patch_size": (8, 4), "img_size": (32, 16)}, dict),
    "module": ("deit_tiny_patch16_224", {}, lambda w: {f"module.{n}": v for n, v in w.items()}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_show_their_model(layout: str, tmp_path: Path) -> None:
    """At keep rate 1 the model that is built from the weights alone is the one they are of."""
    name, changes, rename = LAYOUTS[layout]
    model = build(name, **changes)
    torch.save({"model": rename(model.state_dict())}, tmp_path / "weights.pth")
    checkpoint = load_checkpoint(tmp_path / "weights.pth")
    shown = checkpoint["model_args"]
    assert "model_name" not in shown
    assert checkpoint["model"].keys() == model.state_dict().keys()
    keywords = {"model_name": DEFAULT_MODEL, "keep_rate": 1.0, "reduction_loc": (0,)}
    found = model_from_checkpoint(checkpoint, **shown | keywords)
    images = draw_batch(2, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        torch.testing.assert_close(found(images), model(images), rtol=0, atol=1e-5)


def test_what_weights_do_not_tell_is_left_open(tmp_path: Path) -> None:
    shown = load_checkpoint(save(tmp_path / "odd.pth", build_tiny()))["model_args"]
    assert "num_heads" not in shown and shown["embed_dim"] == 32
    flat = save(tmp_path / "flat.pth", build_tiny(img_size=(32, 48)))  # 4 x 6 and 1 are 5 x 5
    assert not {"no_embed_class", "img_size"} & load_checkpoint(flat)["model_args"].keys()
    assert load_checkpoint(save(tmp_path / "other.pth", nn.Linear(2, 2)))["model_args"] == {}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("deit_tiny_distilled_patch16_224", {}, "is for a distilled model, from which --finetune"),
        (
            "vit_giant_patch14_dinov2",
            {"mlp_ratio": 2.66667 * 2},
            "is for a model with gated MLPs (SwiGLU)",
        ),
        ("vit_base_patch16_siglip_224", {"num_classes": 4}, "cannot build bat_deit_small"),
        ("eva02_tiny_patch14_224", {}, "is for "),
        ("beit_base_patch16_224", {}, "is for another model"),
    ],
)
def test_what_no_reducing_model_has_is_one_line(
    call_main: RunMain, data_path: Path, tmp_path: Path, name: str, changes: dict, words: str
) -> None:
    path = save(tmp_path / "foreign.pth", build(name, **changes))
    done = call_main(
        *FILE_FLAGS, "--data-path", data_path, "--reduction-loc", "1", "--eval", "--resume", path
    )
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("layout", ["deit3-facebook", "dinov2-registers-facebook"])
def test_file_of_another_size_evaluates_and_finetunes(
    call_main: RunMain, data_path: Path, tmp_path: Path, layout: str
) -> None:
    """Its position embedding is resampled from its own grid, whatever tokens have a position."""
    name, _, rename = LAYOUTS[layout]
    torch.save(rename(build(name, img_size=48).state_dict()), tmp_path / "weights.pth")
    flags = [*FILE_FLAGS, "--data-path", data_path, "--reduction-loc", "1"]
    size = ["--input-size", "32", "--mixup", "0", "--cutmix", "0"]
    for mode in ([], size):
        done = call_main(*flags, *mode, "--eval", "--resume", tmp_path / "weights.pth")
        assert done.returncode == 0 and "on 24 images" in done.stdout, done.stderr
    done = call_main(
        *flags, *size, "--finetune", tmp_path / "weights.pth", "--epochs", "1",
        "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0 and "not loaded" not in done.stdout, done.stderr
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pth")["model_args"]
    assert saved["no_embed_class"] and saved["init_values"] and saved["embed_dim"] == 128


# What the args say ------------------------------------------------------------------------------


def test_evits_args_choose_the_reduction(
    call_main: RunMain, data_path: Path, tmp_path: Path
) -> None:
    path = save(tmp_path / "evit.pth", build("deit_small_patch16_224"),
                args=argparse.Namespace(**SAID))  # fmt: skip
    flags = [*FILE_FLAGS, "--data-path", data_path, "--resume", path]
    lines = {
        (): "reduction evit, keep rates 0.5 0.5, blocks 1 2, proportional attention off",
        ("--keep-rate", "0.8"): "reduction evit, keep rates 0.8 0.8, blocks 1 2",
        ("--reduction", "topk", "--reduction-loc", "1"): "reduction topk, keep rates 0.5, blocks 1",
    }
    for more, line in lines.items():
        for mode in ("--eval", "--describe"):
            done = call_main(*flags, *more, mode)
            assert done.returncode == 0 and line in done.stdout, done.stderr
    torch.save({"model": build("deit_small_patch16_224").state_dict(),
                "args": SAID | {"fuse_token": False}}, path)  # fmt: skip
    assert load_checkpoint(path)["model_args"]["reduction"] == "topk"


def test_describe_is_about_the_files_model(call_main: RunMain, trained: Run) -> None:
    done = call_main("--describe", "--resume", trained.folder / "best.pth")
    assert done.returncode == 0 and "keep rates 0.6 0.8, blocks 1 2" in done.stdout
    table = [line.split()[:3] for line in done.stdout.splitlines() if line[:5].strip().isdigit()]
    assert table == [["0", "16", "16"], ["1", "16", "10"], ["2", "10", "8"]]


@pytest.mark.parametrize("text", ["(3, 6", "__import__('os')", "7", "('a',)", "(99,)", None])
def test_senseless_locations_are_one_line(
    call_main: RunMain, data_path: Path, tmp_path: Path, text: object
) -> None:
    path = save(tmp_path / "evit.pth", build("deit_small_patch16_224"),
                args=argparse.Namespace(**SAID | {"drop_loc": text}))  # fmt: skip
    done = call_main(*FILE_FLAGS, "--data-path", data_path, "--eval", "--resume", path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "_loc" in done.stderr


def test_evaluation_crop_travels(tmp_path: Path) -> None:
    model, args = build_tiny(), {"eval_crop_ratio": 1.0}
    own = {"crop_pct": 0.9, "input_size": (3, 32, 32)}
    for more, expected in (
        ({}, {}),
        ({"args": argparse.Namespace(**args)}, {"crop_pct": 1.0}),
        ({"args": args, "data_config": own}, own),
    ):
        path = save(tmp_path / "crop.pth", model, **more)
        assert load_checkpoint(path)["data_config"] == expected


def test_plain_values_of_other_systems_are_read(tmp_path: Path) -> None:
    """submitit keeps paths in args; Python 3.13 and NumPy 1 have other names for the types."""
    args = argparse.Namespace(
        output_dir=pathlib.PurePosixPath("/runs/a"), lr=np.float64(5e-4), epochs=np.int64(3),
        dist=np.bool_(True), name=np.str_("a"),
    )  # fmt: skip
    path = save(tmp_path / "args.pth", build_tiny(), args=args)
    names = {
        "PurePosixPath": "WindowsPath", "pathlib\n": "pathlib._local\n",
        "numpy._core.multiarray": "numpy.core.multiarray",
    }  # fmt: skip
    for old, new in [("", ""), *names.items()]:
        changed = tmp_path / "changed.pth"
        rewrite_archive(path, changed, {"data.pkl": lambda data, o=old, n=new: data.replace(
            o.encode(), n.encode()) if o else data})  # fmt: skip
        found = load_checkpoint(changed)["args"]
        assert found["lr"] == 5e-4 and found["epochs"] == 3 and found["dist"]
        assert isinstance(found["output_dir"], pathlib.PurePath) and found["name"] == "a"


class Odd:
    """No plain value."""


@pytest.mark.parametrize("archive", [True, False])
def test_refused_types_are_named_with_a_remedy(
    call_main: RunMain, data_path: Path, tmp_path: Path, archive: bool
) -> None:
    path = tmp_path / "odd.pth"
    contents = {"model": build_tiny().state_dict(), "args": argparse.Namespace(value=Odd())}
    torch.save(contents, path, _use_new_zipfile_serialization=archive)
    done = call_main(*FILE_FLAGS, "--data-path", data_path, "--eval", "--resume", path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"it holds {__name__}.Odd, and reading that could run code" in done.stderr
    command = done.stderr.partition('python -c "')[2].partition('"')[0]
    exec(command.replace("weights.pth", str(tmp_path / "weights.pth")))
    assert load_checkpoint(tmp_path / "weights.pth")["model"].keys() == contents["model"].keys()


# Going on ---------------------------------------------------------------------------------------


def deits_run(own: dict) -> dict:
    """The state of a run of this project after an epoch as DeiT's main.py would have saved it."""
    groups = [dict(group) for group in own["optimizer"]["param_groups"]]
    args = own["args"] | {"lr": max(own["lr_scheduler"]["base_values"])}  # DeiT overwrites it
    return {
        "model": own["model"], "model_ema": own["model_ema"], "scaler": {},
        "optimizer": {"state": own["optimizer"]["state"], "param_groups": groups},
        "lr_scheduler": own["lr_scheduler"], "epoch": own["epoch"] - 1,
        "args": argparse.Namespace(**args),
    }  # fmt: skip


@pytest.fixture(scope="module")
def halfway(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The trained run's checkpoint after two of its four epochs."""
    folder = tmp_path_factory.mktemp("halfway")
    with contextlib.redirect_stdout(io.StringIO()):
        flags = [*trained.flags, "--keep-checkpoints", "3", "--output-dir", folder]
        assert main_in_process(flags) == 0
    return load_checkpoint(folder / "checkpoint.2.pth")


def facebooks_order(contents: dict) -> dict:
    """With the parameters of a block in another order, in the weights and in the optimizer."""
    names = list(contents["model"])
    order = sorted(range(len(names)), key=lambda i: (names[i].split(".")[:2], -i))
    weights = {names[i]: contents["model"][names[i]] for i in order}
    state, groups = {}, []
    for group in contents["optimizer"]["param_groups"]:
        is_decayed = group["weight_decay"] > 0
        own = [n for n in names if _is_decayed(contents["model"][n], n) == is_decayed]
        theirs = [n for n in weights if n in own]
        start = sum(len(g["params"]) for g in groups)
        for index, name in enumerate(theirs):
            old = group["params"][own.index(name)]
            state[start + index] = contents["optimizer"]["state"][old]
        groups.append(group | {"params": list(range(start, start + len(theirs)))})
    return contents | {"model": weights, "optimizer": {"state": state, "param_groups": groups}}


def _is_decayed(value: Tensor, name: str) -> bool:
    return value.ndim > 1 and name not in ("pos_embed", "cls_token")


@pytest.mark.parametrize("change", [dict, facebooks_order])
def test_a_run_of_deit_is_continued(
    call_main: RunMain, trained: Run, halfway: dict, tmp_path: Path, change: Callable
) -> None:
    """Here even exactly: its images and augmentation happen to be this project's."""
    path = tmp_path / "deit.pth"
    torch.save(change(deits_run(copy.deepcopy(halfway))), path)
    done = call_main(*trained.flags, "--resume", path, "--output-dir", tmp_path / "out")
    assert done.returncode == 0 and f"resumed {path} at epoch 2, step 0" in done.stdout, done.stderr
    assert "the order of the images and what is drawn for them are not that run's" in done.stdout
    found, expected = (
        load_checkpoint(folder / "checkpoint.pth") for folder in (tmp_path / "out", trained.folder)
    )
    assert found["updates"] == expected["updates"] == 16
    for key in ("model", "model_ema"):
        assert all(torch.equal(found[key][n], value) for n, value in expected[key].items())
    assert read_log(tmp_path / "out")[0]["train_lr"] == read_log(trained.folder)[2]["train_lr"]


def smaller_moment(contents: dict) -> None:
    contents["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1, 1)


def fewer_parameters(contents: dict) -> None:
    contents["optimizer"]["param_groups"][0]["params"].pop()


STATES = {
    "no optimizer": (lambda c: c.pop("optimizer"), "no training state"),
    "no epoch": (lambda c: c.pop("epoch"), "no training state"),
    "epoch": (lambda c: c.update(epoch=math.nan), "cannot be continued"),
    "epoch huge": (lambda c: c.update(epoch=10**30), "cannot be continued"),
    "epoch of another run": (lambda c: c.update(epoch=0), "schedule is at"),
    "other rate": (
        lambda c: c["optimizer"]["param_groups"][0].update(lr=0.1),
        "learning rate 0.1 after",
    ),
    "other decay": (
        lambda c: c["optimizer"]["param_groups"][1].update(weight_decay=0.1),
        "weight_decay was 0.1 and is 0.05",
    ),
    "other optimizer": (lambda c: setattr(c["args"], "opt", "sgd"), "--opt was sgd and is adamw"),
    "one group": (lambda c: c["optimizer"]["param_groups"].pop(), "cannot be continued"),
    "parameters": (fewer_parameters, "cannot be continued"),
    "shapes": (smaller_moment, "exp_avg has the shape of another parameter"),
    "no moments": (lambda c: c["optimizer"]["state"].clear(), "cannot be continued"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_cannot_be_continued(
    call_main: RunMain, trained: Run, halfway: dict, tmp_path: Path, name: str
) -> None:
    change, words = STATES[name]
    contents = deits_run(copy.deepcopy(halfway))
    change(contents)
    torch.save(contents, tmp_path / "deit.pth")
    done = call_main(*trained.flags, "--resume", tmp_path / "deit.pth")
    assert done.returncode == 2 and words in done.stderr and "--finetune" in done.stderr
    assert done.stderr.count("\n") == 1


# Their own later defaults -----------------------------------------------------------------------


def test_every_setting_of_the_reduction_is_recorded(
    call_main: RunMain, trained: Run, data_path: Path, tmp_path: Path
) -> None:
    saved = torch.load(trained.folder / "best.pth", weights_only=True)["model_args"]
    assert tuple(saved["keep_rate"]) == (0.6, 0.8) and tuple(saved["reduction_loc"]) == (1, 2)
    now = {
        "reduction": "bat", "cluster_ratio": 0.0, "match_ratio": 0.5, "features": "tokens",
        "merge_weights": "importance", "density_neighbors": 5, "proportional_attention": "on",
        "reduction_seed": 0, "tome_r": None,
    }  # fmt: skip
    assert now.items() <= saved.items()
    first = now | {"cluster_ratio": 0.4, "match_ratio": 0.1, "proportional_attention": "off"}
    first.pop("tome_r")
    # Checkpoints of before say less: they mean the defaults of that time.
    settings = {"model_name": "bat_deit_tiny_patch16_224", **SMALL, "depth": 12}
    save(tmp_path / "old.pth", build(settings["model_name"], depth=12), model_args=SMALL | settings)
    old = load_checkpoint(tmp_path / "old.pth")["model_args"]
    assert first.items() <= old.items()
    assert old["keep_rate"] == 0.7 and tuple(old["reduction_loc"]) == (3, 6, 9)
    done = call_main(*FILE_FLAGS, "--data-path", data_path, *PLAIN_FLAGS, "--eval",
                     "--resume", trained.folder / "best.pth")  # fmt: skip
    assert "reduction bat, keep rates 0.6 0.8, blocks 1 2, cluster ratio 0, " in done.stdout
    with pytest.raises(InputError, match="its depth is 3, its weights' 12"):
        save(tmp_path / "wrong.pth", build(settings["model_name"], depth=12),
             model_args=settings | {"depth": 3})  # fmt: skip
        load_checkpoint(tmp_path / "wrong.pth")
