"""From a file to the pixels that the network sees."""

from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from lightning_stableaa.recipes.images.crops import Box, Crop


def read_crop(path: Path, crop: Crop, size: int, random: Random) -> np.ndarray:
    """One crop of an image in RGB, scaled to ``size`` x ``size``: (size, size, 3), uint8.

    A JPEG is decoded at half, a quarter or an eighth of its size where the crop still has ``size``
    pixels then, which skips most of the inverse cosine transform.

    Raises:
        Exception: whatever Pillow raises for a file that it cannot read.
    """
    with Image.open(path) as image:
        width, height = image.size
        box = crop(width, height, random)
        crop_width, crop_height = box[2] - box[0], box[3] - box[1]
        # the size of the whole image at which the crop has size x size pixels
        target = (max(1, width * size // crop_width), max(1, height * size // crop_height))
        image.draft(None, target)
        return np.array(_resize(image, box, (width, height), size))


def _resize(image: Image.Image, box: Box, full_size: tuple[int, int], size: int) -> Image.Image:
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")  # palettes, transparency, 16 bits: not to be interpolated
    left, upper, right, lower = box
    if left < 0 or upper < 0 or right > full_size[0] or lower > full_size[1]:
        image = image.resize(full_size).crop(box)  # black outside
        scaled = (0.0, 0.0, float(image.width), float(image.height))
    else:
        x, y = image.width / full_size[0], image.height / full_size[1]
        scaled = (left * x, upper * y, right * x, lower * y)
    image = image.resize((size, size), Image.Resampling.BILINEAR, scaled)
    return image if image.mode == "RGB" else image.convert("RGB")
