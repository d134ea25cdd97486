"""What the tests of the pictures share: kinds of patches, random images, a search for a panel."""

import numpy as np

from models.trace import PatchKind

DROPPED, SINGLE, PAIR, CLUSTER = (int(kind) for kind in PatchKind)


def random_image(height, width, seed=0):
    """(height, width, 3) independent random pixels, none of them white."""
    return np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8)


def find_panel(canvas, panel):
    """Whether `panel` is in `canvas` somewhere, exactly."""
    height, width = panel.shape[:2]
    canvas = np.asarray(canvas).astype(np.int64) @ [65536, 256, 1]
    panel = panel.astype(np.int64) @ [65536, 256, 1]
    hits = np.ones((canvas.shape[0] - height + 1, canvas.shape[1] - width + 1), dtype=bool)
    for y, x in ((0, 0), (height // 2, width // 3), (height - 1, width - 1), (height // 3, 0)):
        hits &= canvas[y : y + hits.shape[0], x : x + hits.shape[1]] == panel[y, x]
    return any(
        (canvas[y : y + height, x : x + width] == panel).all()
        for y, x in zip(*np.nonzero(hits), strict=True)
    )
