"""The script that draws the pictures, and its pictures by their pixels."""

import io
import os

import numpy as np
import pytest
import timm
import torch
from conftest import DESIGN
from data_helpers import config_of, dataset_args
from PIL import Image
from torchvision import transforms

import models  # noqa: F401 (registers the models)
import visualize_mask
from datasets import build_transform
from models.trace import PatchKind, trace_patches
from visualize_mask import BORDER_COLOURS, Panel, Picture, Source, draw_stage

DROPPED, SINGLE, PAIR, CLUSTER, MIXED, WAITING = (int(kind) for kind in PatchKind)
SHAPE = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
MODEL_ARGS = {"model_name": "bat_deit_tiny_patch16_224", "img_size": (32, 48), **SHAPE, **DESIGN}
MODEL_ARGS["reduction_loc"] = (1, 2)
MODEL_FLAGS = [
    "--model", MODEL_ARGS["model_name"], "--input-size", "32", "48", "--reduction-loc", "1", "2",
    "--model-kwargs", *(f"{name}={value}" for name, value in SHAPE.items()),
]  # fmt: skip
CONFIG = config_of(dataset_args(""), (32, 48))
TRANSFORM = build_transform(False, dataset_args(""), CONFIG)


def random_image(height, width, seed=0):
    """(height, width, 3) independent random pixels, none of them white."""
    return np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8)


def find_panel(canvas, panel):
    """Whether `panel` is in `canvas` somewhere, exactly."""
    canvas, panel = (np.asarray(pixels) @ [65536, 256, 1] for pixels in (canvas, panel))
    rows, columns = (c - p + 1 for c, p in zip(canvas.shape, panel.shape, strict=True))
    hits = np.ones((rows, columns), dtype=bool)
    for y, x in np.random.default_rng(0).integers(0, panel.shape, (20, 2)):
        hits &= canvas[y : y + rows, x : x + columns] == panel[y, x]
    windows = np.lib.stride_tricks.sliding_window_view(canvas, panel.shape)
    return any((windows[y, x] == panel).all() for y, x in np.argwhere(hits))


def draw_slowly(image, group, kind, grid_size, scale):
    """The definition in `draw_stage`, pixel by pixel."""
    cell = [scale * side // count for side, count in zip(image.shape, grid_size, strict=False)]
    patches = np.kron(np.arange(group.size).reshape(grid_size), np.ones(cell, dtype=int))
    owner, own_kind = np.pad(group[patches], 1, constant_values=-2), np.pad(kind[patches], 1)
    panel = np.kron(image, np.ones((scale, scale, 1), dtype=np.uint8))
    period = max(4, min(cell) // 4)
    for y, x in np.ndindex(*patches.shape):
        token, token_kind = group[patches[y, x]], kind[patches[y, x]]
        if token_kind == DROPPED:
            panel[y, x] = 150 if (y + x) % period < period // 4 else 255
        elif token_kind != SINGLE:
            other_kind = (own_kind[y : y + 3, x : x + 3] != token_kind).any()
            is_border = other_kind or (owner[y : y + 2, x : x + 2] != token).any()
            mean = image[group[patches[::scale, ::scale]] == token].mean(axis=0, dtype=np.float64)
            panel[y, x] = BORDER_COLOURS[token_kind] if is_border else np.rint(mean)
    return panel


@pytest.mark.parametrize(
    ("grid_size", "patch", "scale"),
    [((4, 3), (6, 4), 2), ((2, 5), (5, 8), 5), ((3, 3), (1, 1), 3)],
)
def test_panel_equals_its_definition(grid_size, patch, scale):
    image = random_image(*np.multiply(grid_size, patch))
    group = np.random.default_rng(0).integers(-1, 4, np.prod(grid_size))
    group[0], group[-1] = 4, -1  # a token of one patch, and a dropped one
    kind = np.array([PAIR, CLUSTER, CLUSTER, MIXED, SINGLE, DROPPED])[group]
    panel = draw_stage(image, group, kind, grid_size, scale)
    assert panel.dtype == np.uint8
    np.testing.assert_array_equal(panel, draw_slowly(image, group, kind, grid_size, scale))


@pytest.mark.parametrize(("side", "cell"), [(224, 7), (32, 1), (512, 16)])
@pytest.mark.parametrize("draw", [visualize_mask.PANEL, visualize_mask.THUMBNAIL])
def test_colours_show_at_32_by_32_patches(side, cell, draw):
    """Each patch a token of its own: one line between two, four fifths of the length visible."""
    image, grid_size = random_image(side, side), (32, 32)
    scale = visualize_mask.choose_scale(image, grid_size, draw)
    group, kind = np.arange(1024) // 2, np.full(1024, CLUSTER)
    is_border = (draw_stage(image, group, kind, grid_size, scale) == BORDER_COLOURS[CLUSTER]).all(2)
    for line in (is_border[cell * scale // 2], is_border[:, cell * scale // 2]):
        assert line[0] and line[-1] and not (line[1:] & line[:-1]).any()
        assert (~line).mean() >= 0.8


def test_a_dropped_patch_is_no_white_token():
    white = np.full((32, 32, 3), 255, dtype=np.uint8)
    panel = draw_stage(white, np.array([0, -1]), np.array([SINGLE, DROPPED]), (1, 2), 2)
    assert (panel[:, :32] == 255).all()
    assert 0.1 < (panel[:, 32:] < 255).mean() < 0.5


def make_picture(image, grid_size, num_stages, name="name.png"):
    """A picture of made-up stages."""
    stages = []
    for seed in range(num_stages):
        group = np.random.default_rng(seed).integers(-1, 6, grid_size[0] * grid_size[1])
        kinds = np.array([PAIR, PAIR, CLUSTER, CLUSTER, CLUSTER, SINGLE, DROPPED])
        stages.append(Panel(f"stage {seed}", group, kinds[group]))
    return Picture(Source(name, "cat", None), "W" * 300, image, grid_size, stages)


def rendered(figure):
    """(H, W, 3) pixels of the PNG of a figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


@pytest.mark.parametrize(("num_stages", "name"), [(0, "$a_$b^{.png"), (1, "x" * 300), (6, "a.png")])
def test_picture_holds_every_panel_and_text_that_fits(num_stages, name):
    picture = make_picture(random_image(24, 40), (3, 5), num_stages, name)
    figure = visualize_mask.draw_picture(picture, "words " * 200)
    canvas, strip = rendered(figure), visualize_mask.draw_strip(picture)
    for board, scale in ((canvas, 8), (strip, 3)):  # 8 x 40 >= 300, 3 x 40 >= 112
        for panel in visualize_mask.draw_panels(picture, picture.image, scale):
            assert find_panel(board, panel)
    header, *titles = [text.get_window_extent() for text in figure.texts]
    assert header.x1 <= figure.bbox.width
    assert all(title.width <= 320 and title.y1 < header.y0 for title in titles)


def test_contact_sheet_holds_every_strip_and_the_legend():
    pictures = [make_picture(random_image(160, 240, seed), (4, 5), 1) for seed in range(3)]
    sheet = rendered(visualize_mask.draw_contact_sheet(pictures, "a long description " * 20))
    for picture in pictures:
        strip = visualize_mask.draw_strip(picture)
        assert strip.shape == (80 + 6, 2 * 120 + 9, 3)  # half the size, whole pixels a patch
        assert find_panel(sheet, strip)
    for kind, colour in BORDER_COLOURS.items():
        assert (sheet[-45:] == colour).all(axis=-1).any() == (kind != MIXED)


@pytest.mark.parametrize("kinds", [[SINGLE], [SINGLE, DROPPED], [PAIR, CLUSTER, MIXED]])
def test_the_legend_explains_what_is_there(kinds):
    stage = Panel("", np.arange(len(kinds)), np.array(kinds))
    picture = Picture(Source("", "", None), "", random_image(32, 96), (1, len(kinds)), [stage])
    for figure in (
        visualize_mask.draw_picture(picture, ""),
        visualize_mask.draw_contact_sheet([picture], ""),
    ):
        labels = [text.get_text() for text in figure.legends[0].texts]
        assert labels == [visualize_mask.KIND_LABELS[kind] for kind in kinds if kind] + (
            [visualize_mask.KIND_LABELS[DROPPED]] if DROPPED in kinds else []
        )
        legend = figure.legends[0].get_window_extent()
        assert legend.x1 <= figure.bbox.width


def test_tokens_are_counted_by_kind():
    group = np.array([0, 0, 1, 2, 2, 3, 3, 4, -1, -1, 5, 5])
    kind = [PAIR, PAIR, SINGLE, CLUSTER, CLUSTER, CLUSTER, CLUSTER, SINGLE, 0, 0, MIXED, MIXED]
    kind = np.array(kind)
    expected = "2 single, 1 matched, 2 clustered, 1 mixed; dropped patches: 2"
    assert visualize_mask.describe_tokens(Panel("", group, kind)) == expected


@pytest.fixture
def photos(tmp_path):
    """Folder of two class folders with three images in all, of different shapes."""
    for i, name in enumerate(("cat/a.png", "cat/b.jpg", "dog/c.png")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_image(50, 60 + 10 * i, i)).save(path)
    return tmp_path / "photos"


def save_checkpoint(path, **model_args):
    """Writes a model of three classes and, as its moving average, the same with a larger head."""
    torch.manual_seed(3)
    model = timm.create_model(**MODEL_ARGS | model_args, num_classes=3)
    weights, head = model.state_dict(), model.head.weight.detach()
    checkpoint = {"model": weights, "model_ema": weights | {"head.weight": head + 1}}
    checkpoint |= {"model_args": MODEL_ARGS | model_args, "classes": ["cat", "dog", "fox"]}
    torch.save(checkpoint, path)
    return model.eval()


def run(*flags):
    return visualize_mask.main([str(flag) for flag in flags])


def load(*flags):
    parser = visualize_mask.get_args_parser()
    return visualize_mask.prepare(parser.parse_args([str(flag) for flag in flags]))


@pytest.mark.parametrize("reduction", ["bat", "topk", "none"])
def test_script_draws_what_the_checkpoint_assigns(photos, tmp_path, reduction, capsys):
    model = save_checkpoint(tmp_path / "c.pth", reduction=reduction, keep_rate=0.9)
    out = tmp_path / "out"
    flags = ["--checkpoint", tmp_path / "c.pth", "--data-path", photos, "--output-dir", out]
    assert run(*flags, "--keep-rate", "0.5", "0.3", "--num-images", 2) == 0  # flags win
    model.set_keep_rate((0.5, 0.3))
    names = ["001_a.png", "002_b.png", "contact_sheet.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert "2 of 3 images" in capsys.readouterr().out
    for source, name in zip(("cat/a.png", "cat/b.jpg"), names, strict=False):
        tensor = TRANSFORM(Image.open(photos / source).convert("RGB"))
        image = tensor.permute(1, 2, 0).numpy()
        normalized = transforms.Normalize(CONFIG["mean"], CONFIG["std"])(tensor / 255)
        with torch.no_grad():
            _, assignments = model.forward_with_assignments(normalized[None])
        panels = [image.repeat(7, axis=0).repeat(7, axis=1)]  # 7 x 48 >= 300
        for trace in trace_patches(assignments, model.stages()):
            group, kind = trace.group[0].numpy(), trace.kind[0].numpy()
            panels.append(draw_stage(image, group, kind, (4, 6), 7))
        canvas = Image.open(out / name).convert("RGB")
        assert len(panels) == 3 and all(find_panel(canvas, panel) for panel in panels)
    assert (panels[-1] == 255).all(axis=-1).any() == (reduction == "topk")


def test_titles_name_model_weights_and_classes(photos, tmp_path):
    model = save_checkpoint(tmp_path / "c.pth", keep_rate=0.5)

    def pictured(*flags):
        loaded, sources = load("--data-path", photos / "dog", *flags)
        image = TRANSFORM(sources[0].read())
        return loaded, visualize_mask.make_picture(loaded, sources[0], image)

    loaded, picture = pictured("--checkpoint", tmp_path / "c.pth")
    assert loaded.description.startswith("bat_deit_tiny_patch16_224, bat, keep rate 0.5, ")
    assert loaded.description.endswith("c.pth")
    assert torch.equal(loaded.model.head.weight, model.head.weight)
    assert picture.source[:2] == ("c.png", "dog")
    assert picture.prediction.startswith("predicted (") and "%): " in picture.prediction
    assert [stage.title for stage in picture.stages] == [
        "stage 1 (block 1): 24 -> 12 tokens",
        "stage 2 (block 2): 12 -> 6 tokens",
    ]
    loaded, _ = pictured("--checkpoint", tmp_path / "c.pth", "--ema")
    assert loaded.description.endswith("c.pth (exponential moving average)")
    assert torch.equal(loaded.model.head.weight, model.head.weight + 1)
    loaded, _ = load("--checkpoint", tmp_path / "c.pth", "--data-path", photos, "--input-size", 64)
    assert loaded.model.patch_embed.grid_size == (8, 8)
    loaded, picture = pictured(*MODEL_FLAGS)
    assert loaded.description.endswith("keep rate 0.7, random weights")
    assert picture.source.true_class == picture.prediction == ""


def test_pixels_that_no_patch_covers_are_cut_off():
    model = timm.create_model(**MODEL_ARGS | {"img_size": (37, 52)}, num_classes=2)
    loaded = visualize_mask.LoadedModel(model.eval(), "", ("class 0", "class 1"), CONFIG)
    image = torch.zeros(3, 37, 52, dtype=torch.uint8)
    picture = visualize_mask.make_picture(loaded, Source("", "", None), image)
    assert picture.image.shape == (32, 48, 3)
    assert picture.prediction.endswith(("class 0", "class 1"))


def test_a_list_an_image_a_data_set_and_a_random_choice(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listing = tmp_path / "list.txt"
    listing.write_text(f"# chosen\n{photos}/dog/c.png\n\nphotos/cat/a.png\n")

    def names(*flags):
        return [source.name for source in load(*MODEL_FLAGS, "--data-path", *flags)[1]]

    assert names(listing) == ["c.png", "a.png"]
    assert names(photos / "cat" / "b.jpg") == ["b.jpg"]
    photos.rename(tmp_path / "val")
    flags = [tmp_path, "--data-set", "IMNET"]
    loaded, sources = load(*MODEL_FLAGS, "--data-path", *flags)
    assert [source.name for source in sources] == ["cat_00000", "cat_00001", "dog_00002"]
    assert [source.true_class for source in sources] == ["cat", "cat", "dog"]
    assert loaded.model.num_classes == 2
    assert [source.read().size for source in sources] == [(60, 50), (70, 50), (80, 50)]
    assert names(*flags, "--num-images", 2) == ["cat_00000", "cat_00001"]
    seeds = (0, 1, 2, 0, 1, 2)
    assert 1 < len({tuple(names(*flags, "--shuffle", "--seed", seed)) for seed in seeds}) <= 3


def test_a_picture_shows_the_very_pixels():
    image = random_image(32, 48)
    model = timm.create_model(**MODEL_ARGS, num_classes=2)
    config = CONFIG | {"crop_pct": 1.0, "mean": (0.1, 0.5, 0.7)}
    loaded = visualize_mask.LoadedModel(model.eval(), "", (), config)
    tensor = build_transform(False, dataset_args(""), config)(Image.fromarray(image))
    picture = visualize_mask.make_picture(loaded, Source("", "", None), tensor)
    np.testing.assert_array_equal(picture.image, image)


@pytest.mark.parametrize("bad", ["text", "FIFO"])
@pytest.mark.parametrize("kind", ["folder", "list", "data set"])
def test_unreadable_images_are_named_and_the_others_drawn(photos, tmp_path, kind, bad, capsys):
    (photos / "cat" / "a.png").unlink()
    if bad == "FIFO":
        os.mkfifo(photos / "cat" / "a.png")
    else:
        (photos / "cat" / "a.png").write_bytes(b"no image")
    flags = ["--data-path", photos, "--num-images", 2]
    if kind == "list":
        (tmp_path / "list.txt").write_text(f"{photos}/cat/a.png\n{photos}/cat/b.jpg\n")
        flags = ["--data-path", tmp_path / "list.txt"]
    elif kind == "data set":
        photos.rename(tmp_path / "val")
        flags = ["--data-path", tmp_path, "--data-set", "IMNET", *flags[2:]]
    out = tmp_path / "out"
    assert run(*MODEL_FLAGS, *flags, "--output-dir", out) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and "a.png" in errors[0]
    assert errors[1] == "1 of 2 images could not be read"
    drawn = "002_cat_00001.png" if kind == "data set" else "002_b.png"
    assert sorted(path.name for path in out.iterdir()) == [drawn, "contact_sheet.png"]
    with pytest.raises(SystemExit, match="2"):
        run(*MODEL_FLAGS, *flags, "--bad-images", "error", "--output-dir", tmp_path / "none")
    assert "a.png" in capsys.readouterr().err
    assert not any((tmp_path / "none").iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-path", "{tmp}/nowhere"], "nowhere"),
        (["--data-path", "{tmp}/binary"], "neither an image nor a text file"),
        (["--data-path", "{photos}", "--checkpoint", "{tmp}/none.pth"], "none.pth"),
        (["--data-path", "{photos}", "--checkpoint", "{tmp}/c.pth", "--model-kwargs", "depth=5"],
         "blocks.4"),
        (["--data-path", "{photos}", "--num-images", "0"], "--num-images"),
        (["--data-path", "{photos}", "--ema"], "--ema"),
        (["--data-path", "{photos}", *MODEL_FLAGS, "--output-dir", "{tmp}/binary/out"], "binary"),
        ([], "--data-path"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(photos, tmp_path, flags, message, capsys):
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    save_checkpoint(tmp_path / "c.pth")
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_info:
        run("--output-dir", out, *(flag.format(tmp=tmp_path, photos=photos) for flag in flags))
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    assert len(output.err.strip().splitlines()) == 1
    assert message in output.err
    assert not out.exists() or not list(out.iterdir())
