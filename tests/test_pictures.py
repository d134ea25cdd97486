"""Pictures, checked by their pixels."""

import numpy as np
import pytest
from picture_helpers import CLUSTER, DROPPED, PAIR, SINGLE, find_panel, random_image

from models.trace import PatchKind
from pictures import (
    BORDER_COLOURS,
    Picture,
    StagePanel,
    border_width,
    choose_scale,
    describe_tokens,
    draw_contact_sheet,
    draw_picture,
    draw_stage,
    draw_strip,
)


def draw_slowly(image, group, kind, grid_size, scale):
    """The definition in `draw_stage`, pixel by pixel."""
    rows, columns = grid_size
    cell_height, cell_width = (
        image.shape[0] * scale // rows,
        image.shape[1] * scale // columns,
    )
    width = max(1, min(cell_height, cell_width) // 12)
    panel = np.zeros((image.shape[0] * scale, image.shape[1] * scale, 3), dtype=np.uint8)

    def patch_at(y, x):
        if 0 <= y < panel.shape[0] and 0 <= x < panel.shape[1]:
            return y // cell_height * columns + x // cell_width
        return None

    def is_border(y, x, own):
        for near_y in range(y - width, y + width + 1):
            for near_x in range(x - width, x + width + 1):
                patch = patch_at(near_y, near_x)
                if patch is None or group[patch] != own:
                    return True
        return False

    for y in range(panel.shape[0]):
        for x in range(panel.shape[1]):
            patch = patch_at(y, x)
            if kind[patch] == DROPPED:
                panel[y, x] = 255
            elif kind[patch] == SINGLE:
                panel[y, x] = image[y // scale, x // scale]
            elif is_border(y, x, group[patch]):
                panel[y, x] = BORDER_COLOURS[kind[patch]]
            else:
                pixels = [
                    image[i, j]
                    for i in range(image.shape[0])
                    for j in range(image.shape[1])
                    if group[patch_at(i * scale, j * scale)] == group[patch]
                ]
                panel[y, x] = np.rint(np.mean(np.array(pixels, dtype=np.float64), axis=0))
    return panel


@pytest.mark.parametrize(
    ("grid_size", "patch", "scale"),
    [((3, 4), (4, 4), 1), ((4, 3), (6, 4), 2), ((2, 5), (5, 8), 5), ((3, 3), (1, 1), 3)],
)
def test_panel_equals_its_definition(grid_size, patch, scale):
    rows, columns = grid_size
    image = random_image(rows * patch[0], columns * patch[1])
    rng = np.random.default_rng(rows * columns)
    group = rng.integers(-1, 4, rows * columns)
    token_kind = {-1: DROPPED, 0: PAIR, 1: CLUSTER, 2: CLUSTER, 3: PAIR}
    group[0], group[-1] = 4, -1  # a token of one patch, and a dropped one
    kind = np.array([{**token_kind, 4: SINGLE}[token] for token in group.tolist()])
    panel = draw_stage(image, group, kind, grid_size, scale)
    assert panel.dtype == np.uint8
    np.testing.assert_array_equal(panel, draw_slowly(image, group, kind, grid_size, scale))


def test_one_border_colour_per_kind_along_regions_and_none_inside():
    # One image row of 4 patches of 12 pixels at scale 2: a cluster of two patches beside each
    # other, a lone patch, and the pair's only patch in sight; its other patch is in row 2.
    image = random_image(24, 48)
    group = np.array([0, 0, 1, 2, 2, 3, -1, -1])
    kind = np.array([CLUSTER, CLUSTER, SINGLE, PAIR, PAIR, SINGLE, DROPPED, DROPPED])
    panel = draw_stage(image, group, kind, (2, 4), 2)
    assert panel.shape == (48, 96, 3)
    assert border_width(24, 24) == 2

    cluster = panel[:24, :48]
    mean = np.rint(image[:12, :24].reshape(-1, 3).mean(axis=0))
    assert (cluster[2:-2, 2:-2] == mean).all()  # no line between the two patches either
    for edge in (cluster[:2], cluster[-2:], cluster[:, :2], cluster[:, -2:]):
        assert (edge == BORDER_COLOURS[PatchKind.CLUSTER]).all()

    pair_mean = np.rint(
        np.concatenate([image[:12, 36:].reshape(-1, 3), image[12:, :12].reshape(-1, 3)]).mean(0)
    )
    for region in (panel[:24, 72:], panel[24:, :24]):  # two regions of one token: one colour
        assert (region[2:-2, 2:-2] == pair_mean).all()
        for edge in (region[:2], region[-2:], region[:, :2], region[:, -2:]):
            assert (edge == BORDER_COLOURS[PatchKind.PAIR]).all()

    own = image.repeat(2, axis=0).repeat(2, axis=1)
    assert (panel[:24, 48:72] == own[:24, 48:72]).all()
    assert (panel[24:, 24:48] == own[24:, 24:48]).all()
    assert (panel[24:, 48:] == 255).all()


def test_inner_corners_of_a_region_are_closed():
    group, kind = np.array([0, 0, 0, 1]), np.array([CLUSTER, CLUSTER, CLUSTER, SINGLE])
    panel = draw_stage(random_image(24, 24), group, kind, (2, 2), 2)
    assert (panel[22:24, 22:24] == BORDER_COLOURS[PatchKind.CLUSTER]).all()
    assert not (panel[20:22, 20:22] == BORDER_COLOURS[PatchKind.CLUSTER]).all(axis=-1).any()


def test_panel_refuses_what_does_not_fit():
    ones = np.ones(4, dtype=np.int64)
    with pytest.raises(ValueError, match=r"grid_size \(2, 2\) must divide the image size \(9, 8\)"):
        draw_stage(random_image(9, 8), ones, ones, (2, 2), 1)
    with pytest.raises(ValueError, match=r"must be \(4,\): one a patch"):
        draw_stage(random_image(8, 8), ones[:3], ones, (2, 2), 1)


@pytest.mark.parametrize(
    ("size", "grid", "scale"),
    [
        ((224, 224), (14, 14), 2),
        ((32, 32), (8, 8), 9),
        ((96, 384), (6, 24), 1),
        ((300, 300), (75, 75), 2),
    ],
)
def test_panels_are_enlarged_until_they_are_legible(size, grid, scale):
    assert choose_scale(*size, grid) == scale


def make_stage(image_patches, seed):
    rng = np.random.default_rng(seed)
    group = rng.integers(-1, 6, image_patches)
    kinds = np.array([DROPPED, PAIR, PAIR, CLUSTER, CLUSTER, CLUSTER, SINGLE])
    return StagePanel(f"stage {seed}", group, kinds[group + 1])


@pytest.mark.parametrize("num_stages", [0, 1, 3, 6])
def test_picture_holds_the_original_and_every_panel(num_stages):
    image = random_image(24, 40)
    stages = tuple(make_stage(15, seed) for seed in range(num_stages))
    canvas = draw_picture(Picture("a header", "cat", "predicted: dog", image, (3, 5), stages))
    scale = choose_scale(24, 40, (3, 5))
    assert find_panel(canvas, image.repeat(scale, axis=0).repeat(scale, axis=1))
    for stage in stages:
        assert find_panel(canvas, draw_stage(image, stage.group, stage.kind, (3, 5), scale))
    strip = draw_strip(Picture("", "", "", image, (3, 5), stages), "name")
    for stage in stages:
        assert find_panel(strip, draw_stage(image, stage.group, stage.kind, (3, 5), 3))


def test_contact_sheet_holds_every_strip_once():
    images = [random_image(160, 200, seed) for seed in range(5)]
    strips = [
        draw_strip(Picture("", "", "", image, (4, 5), (make_stage(20, 1),)), "name")
        for image in images
    ]
    sheet = np.asarray(draw_contact_sheet(strips, "a header that is longer than the sheet " * 5))
    for strip in strips:
        assert find_panel(sheet, np.asarray(strip))
    for colour in BORDER_COLOURS.values():  # the legend
        assert (sheet[-40:] == colour).all(axis=-1).any()


def test_tokens_are_counted_by_kind():
    group = np.array([0, 0, 1, 2, 2, 3, 3, 4, -1, -1])
    kind = np.array([PAIR, PAIR, SINGLE, CLUSTER, CLUSTER, CLUSTER, CLUSTER, SINGLE, 0, 0])
    expected = "2 of one patch, 1 matched, 2 clustered; dropped patches: 2"
    assert describe_tokens(StagePanel("", group, kind)) == expected
