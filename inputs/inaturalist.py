"""iNaturalist 2018 and 2019, by torchvision, cut to the splits of the competition."""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path

from torchvision.datasets import INaturalist

from inputs.images import load_image
from utils import InputError

# DeiT's names for torchvision's target types of iNaturalist 2018 and 2019.
INAT_CATEGORIES = {"name": "full", "full": "full", "supercategory": "super", "super": "super"}


def build_inaturalist(year: str, root: Path, is_train: bool, args: Namespace) -> INaturalist:
    """torchvision's iNaturalist, cut to the competition's train or val split.

    torchvision reads the images of both splits as one set, so the split comes from the
    competition's own lists of images, train2018.json and val2018.json (or 2019), in `root`.
    """
    if args.inat_category not in INAT_CATEGORIES:
        allowed = ", ".join(INAT_CATEGORIES)
        raise InputError(f"inat_category is {args.inat_category!r}, allowed: {allowed}")
    level = INAT_CATEGORIES[args.inat_category]
    loader = partial(load_image, max_pixels=args.max_image_pixels)
    source = INaturalist(
        root, version=year, target_type=level, download=args.download, loader=loader
    )
    split_list = root / f"{'train' if is_train else 'val'}{year}.json"
    if not split_list.is_file():
        raise InputError(
            f"{split_list} does not exist: it lists the images of the split; "
            "get it from https://github.com/visipedia/inat_comp"
        )
    images = json.loads(split_list.read_text(encoding="utf-8"))["images"]
    # train_val2018/SUPER/ID/NAME.jpg -> SUPER/ID/NAME.jpg
    wanted = {image["file_name"].partition("/")[2] for image in images}
    # Sorted, since torchvision takes the file system's order.
    source.index = sorted(
        item for item in source.index if f"{source.all_categories[item[0]]}/{item[1]}" in wanted
    )
    if not source.index:
        raise InputError(f"none of the images listed in {split_list} is in {source.root}")
    if level == "full":
        source.classes = list(source.all_categories)
        source.targets = [category for category, _ in source.index]
    else:
        source.classes = list(source.categories_index[level])
        source.targets = [source.categories_map[c][level] for c, _ in source.index]
    return source
