"""Random pixels and folders of random pictures for the data tests."""

import numpy as np
from PIL import Image


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_folder(root, sizes, *, classes=("",), seed=0):
    """Random RGB pictures `0.png` ... of the given (height, width) in each class folder; returns them in the listing's order."""
    pictures = []
    for number, name in enumerate(sorted(classes)):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index, (height, width) in enumerate(sizes):
            pixels = random_pixels(height, width, 3, seed=seed + 100 * number + index)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
            pictures.append(pixels)
    return pictures
