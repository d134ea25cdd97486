"""The script that draws the pictures."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from picture_helpers import CLUSTER, DROPPED, SINGLE, find_panel, random_image
from PIL import Image

import models  # noqa: F401 (registers the models)
import visualize_mask
from models.trace import trace_patches
from pictures import draw_stage

WHITE = (255, 255, 255)
MODEL_ARGS = {
    "model_name": "bat_deit_tiny_patch16_224",
    "img_size": (32, 48),
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 3,
    "reduction_loc": (1, 2),
}
MODEL_FLAGS = [
    "--model", MODEL_ARGS["model_name"], "--input-size", "32", "48", "--reduction-loc", "1", "2",
    "--model-kwargs", "patch_size=8", "embed_dim=24", "depth=4", "num_heads=3",
]  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    """Folder of two class folders with three images in all, of different shapes."""
    for i, name in enumerate(("cat/a.png", "cat/b.jpg", "dog/c.png")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(random_image(5, 6, i))
        small.resize((60 + 10 * i, 50), Image.Resampling.BICUBIC).save(path)
    return tmp_path / "photos"


def save_checkpoint(path, **model_args):
    torch.manual_seed(3)
    model_args = MODEL_ARGS | model_args
    model = timm.create_model(**model_args)
    classes = ["cat", "dog", "fox"]
    torch.save({"model": model.state_dict(), "model_args": model_args, "classes": classes}, path)
    return model.eval()


def run(*flags):
    return visualize_mask.main([str(flag) for flag in flags])


def expected_panels(model, path):
    """Panels of an image file, worked out beside the script."""
    args = SimpleNamespace(input_size=(32, 48), eval_crop_ratio=0.875)
    tensor = visualize_mask.build_transform(False, args)(visualize_mask.load_image(str(path)))
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    image = ((tensor * std + mean) * 255).round().byte().permute(1, 2, 0).numpy()
    with torch.no_grad():
        _, assignments = model.forward_with_assignments(tensor[None])
    panels = [image.repeat(6, axis=0).repeat(6, axis=1)]  # 6 x 48 >= 280
    for trace in trace_patches(assignments, model.stages()):
        panels.append(draw_stage(image, trace.group[0].numpy(), trace.kind[0].numpy(), (4, 6), 6))
    return panels


@pytest.mark.parametrize("reduction", ["bat", "topk", "evit", "none"])
def test_script_draws_what_the_checkpoint_assigns(photos, tmp_path, reduction, capsys):
    model = save_checkpoint(tmp_path / "c.pth", reduction=reduction, keep_rate=0.5)
    out = tmp_path / "out"
    assert run("--checkpoint", tmp_path / "c.pth", "--data-path", photos, "--output-dir", out) == 0
    names = ["001_a.png", "002_b.png", "003_c.png", "contact_sheet.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert "3 of 3 images" in capsys.readouterr().out
    for source, name in zip(("cat/a.png", "cat/b.jpg", "dog/c.png"), names, strict=False):
        canvas = np.asarray(Image.open(out / name))
        panels = expected_panels(model, photos / source)
        assert len(panels) == 3
        for panel in panels:
            assert find_panel(canvas, panel)
    has_white = (panels[-1] == WHITE).all(axis=-1).any()
    assert has_white == (reduction == "topk")


def test_keep_rate_on_the_command_line_wins(photos, tmp_path):
    model = save_checkpoint(tmp_path / "c.pth", keep_rate=0.9)
    flags = ["--checkpoint", tmp_path / "c.pth", "--data-path", photos / "dog"]
    assert run(*flags, "--output-dir", tmp_path / "out", "--keep-rate", "0.5", "0.3") == 0
    model.set_keep_rate((0.5, 0.3))
    canvas = np.asarray(Image.open(tmp_path / "out" / "001_c.png"))
    for panel in expected_panels(model, photos / "dog" / "c.png"):
        assert find_panel(canvas, panel)


def load(*flags):
    args = visualize_mask.get_args_parser().parse_args([str(flag) for flag in flags])
    return visualize_mask.prepare(args)


def test_titles_name_model_weights_and_classes(photos, tmp_path):
    save_checkpoint(tmp_path / "c.pth", keep_rate=0.5)
    common = ["--data-path", photos, "--output-dir", tmp_path / "out"]
    loaded, sources, _ = load("--checkpoint", tmp_path / "c.pth", *common)
    picture = visualize_mask.make_picture(loaded, sources[2], sources[2].load())
    assert picture.header.startswith("c.png  |  bat_deit_tiny_patch16_224, bat, keep rate 0.5, ")
    assert picture.header.endswith("c.pth")
    assert picture.true_class == "dog"
    assert picture.prediction.startswith("predicted: ") and picture.prediction.endswith(" %)")
    assert [stage.title for stage in picture.stages] == [
        "stage 1 (block 2): 24 -> 12 tokens",
        "stage 2 (block 3): 12 -> 6 tokens",
    ]

    loaded, sources, _ = load(*MODEL_FLAGS, *common)
    picture = visualize_mask.make_picture(loaded, sources[2], sources[2].load())
    assert picture.header.endswith("keep rate 0.7, random weights")
    assert picture.true_class == picture.prediction == ""


def test_only_the_model_s_own_assignments_are_drawn():
    """A made-up model: its assignments, whatever they are, decide the picture."""

    class MadeUp(torch.nn.Linear):
        patch_embed = SimpleNamespace(grid_size=(2, 2), patch_size=(3, 4))

        def stages(self):
            counts = {"num_outputs": 3, "num_clusters": 1, "num_tokens": 4, "block": 6}
            return (SimpleNamespace(**counts),)

        def forward_with_assignments(self, x):
            return torch.zeros(1, 2), [torch.tensor([[2, 0, 2, -1]])]

    loaded = visualize_mask.LoadedModel(MadeUp(1, 1), "made up", (), True)
    source = visualize_mask.Source("name", "", None)
    picture = visualize_mask.make_picture(loaded, source, torch.zeros(3, 7, 9))
    assert picture.image.shape == (6, 8, 3)  # what the patches cover
    assert picture.prediction == "predicted: class 0 (50 %)"
    (stage,) = picture.stages
    assert stage.title == "stage 1 (block 7): 4 -> 3 tokens"
    assert stage.group.tolist() == [2, 0, 2, -1]
    assert stage.kind.tolist() == [CLUSTER, SINGLE, CLUSTER, DROPPED]


def test_a_list_an_image_a_data_set_and_a_random_choice(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listing = tmp_path / "list.txt"
    listing.write_text(f"# chosen\n{photos}/dog/c.png\n\nphotos/cat/a.png\n")
    common = [*MODEL_FLAGS, "--output-dir", tmp_path / "out"]
    _, sources, _ = load(*common, "--data-path", listing)
    assert [source.name for source in sources] == ["c.png", "a.png"]
    _, sources, _ = load(*common, "--data-path", photos / "cat" / "b.jpg")
    assert [source.name for source in sources] == ["b.jpg"]

    photos.rename(tmp_path / "val")
    flags = [*common, "--data-path", tmp_path, "--data-set", "IMNET"]
    loaded, sources, _ = load(*flags)
    assert [source.name for source in sources] == ["cat_00000", "cat_00001", "dog_00002"]
    assert [source.true_class for source in sources] == ["cat", "cat", "dog"]
    assert loaded.model.num_classes == 2
    assert sources[0].load().shape == (3, 32, 48)
    _, first, _ = load(*flags, "--num-images", 2)
    assert [source.name for source in first] == ["cat_00000", "cat_00001"]
    orders = {
        tuple(source.name for source in load(*flags, "--shuffle", "--seed", seed)[1])
        for seed in (0, 1, 2, 0, 1, 2)
    }
    assert 1 < len(orders) <= 3


def test_pixels_survive_normalisation():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, axis=2)
    args = SimpleNamespace(input_size=(16, 16), eval_crop_ratio=1.0)
    tensor = visualize_mask.build_transform(False, args)(Image.fromarray(image))
    np.testing.assert_array_equal(visualize_mask.denormalize(tensor), image)


def test_unreadable_images_are_named_and_the_others_drawn(photos, tmp_path, capsys):
    (photos / "cat" / "a.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert run(*MODEL_FLAGS, "--data-path", photos, "--output-dir", out) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and "a.png" in errors[0]
    assert errors[1] == "1 of 3 images could not be read"
    assert sorted(path.name for path in out.iterdir()) == [
        "002_b.png",
        "003_c.png",
        "contact_sheet.png",
    ]


def test_missing_files_of_a_list_and_bad_samples_of_a_data_set_count(photos, tmp_path, capsys):
    listing = tmp_path / "list.txt"
    listing.write_text(f"{photos}/dog/c.png\n{photos}/dog/none.png\n")
    assert run(*MODEL_FLAGS, "--data-path", listing, "--output-dir", tmp_path / "out") == 1
    assert "none.png" in capsys.readouterr().err
    (photos / "cat" / "a.png").write_bytes(b"no image")
    photos.rename(tmp_path / "val")
    flags = ["--data-path", tmp_path, "--data-set", "IMNET", "--bad-images", "skip"]
    assert run(*MODEL_FLAGS, *flags, "--output-dir", tmp_path / "out2") == 1
    error = capsys.readouterr().err
    assert "a.png" in error and "1 of 3 images could not be read" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-path", "{tmp}/nowhere"], "nowhere"),
        (["--data-path", "{tmp}/empty"], "no image in"),
        (["--data-path", "{tmp}/binary"], "neither an image nor a text file"),
        (["--data-path", "{photos}", "--checkpoint", "{tmp}/none.pth"], "none.pth"),
        (["--data-path", "{photos}", "--checkpoint", "{tmp}/cut.pth"], "cut.pth"),
        (["--data-path", "{photos}", "--checkpoint", "{tmp}/c.pth", "--model-kwargs", "depth=5"],
         "blocks.4"),
        (["--data-path", "{photos}", "--keep-rate", "0"], "keep_rate"),
        (["--data-path", "{photos}", "--keep-rate", "1.2"], "keep_rate"),
        (["--data-path", "{photos}", "--keep-rate", "0.5", "0.5", "0.5", "0.5"], "keep_rate"),
        (["--data-path", "{photos}", "--model", "bat_deit_huge"], "bat_deit_huge"),
        (["--data-path", "{photos}", "--model", "deit_tiny_patch16_224"], "tokens"),
        (["--data-path", "{photos}", "--num-images", "0"], "--num-images"),
        (["--data-path", "{photos}", "--model-kwargs", "img_size=64"], "--input-size"),
        (["--data-path", "{photos}", "--device", "abacus"], "abacus"),
        (["--data-path", "{tmp}", "--data-set", "IMNET"], "val"),
        (["--data-path", "{photos}", "--output-dir", "{tmp}/binary/out"], "--output-dir"),
        ([], "--data-path"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(photos, tmp_path, flags, message, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    if "--checkpoint" in flags:
        save_checkpoint(tmp_path / "c.pth")
        (tmp_path / "cut.pth").write_bytes((tmp_path / "c.pth").read_bytes()[:5000])
    out = tmp_path / "out"
    flags = [flag.format(tmp=tmp_path, photos=photos) for flag in flags]
    with pytest.raises(SystemExit) as exit_info:
        run("--output-dir", out, *flags)
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    assert len(output.err.strip().splitlines()) == 1
    assert message in output.err
    assert not out.exists() or not list(out.iterdir())
