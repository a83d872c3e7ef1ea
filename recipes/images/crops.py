"""Which part of an image is used; every crop is a box (left, upper, right, lower) in pixels."""

import math
from dataclasses import dataclass
from random import Random
from typing import Protocol

Box = tuple[int, int, int, int]


class Crop(Protocol):
    """Chooses a box for an image of ``width`` x ``height`` pixels; it may reach beyond it."""

    def __call__(self, width: int, height: int, random: Random) -> Box: ...


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random share of the area at a random aspect ratio, as in torchvision.

    Source: Szegedy et al. 2015, Going Deeper with Convolutions, section 6.
    """

    scale: tuple[float, float] = (0.08, 1.0)  # of the area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height

    def __call__(self, width: int, height: int, random: Random) -> Box:
        """Ten attempts, then the largest central box of an allowed ratio."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = width * height * random.uniform(*self.scale)
            ratio = math.exp(random.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, upper = random.randint(0, width - w), random.randint(0, height - h)
                return left, upper, left + w, upper + h
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return _central(width, height, w, h)


@dataclass(frozen=True)
class ShiftedCrop:
    """The whole image moved by up to ``pixels``, black where it leaves a gap.

    Source: He et al. 2016, Deep Residual Learning for Image Recognition, section 4.2.
    """

    pixels: int = 4

    def __call__(self, width: int, height: int, random: Random) -> Box:
        """A box of the size of the image."""
        x, y = (random.randint(-self.pixels, self.pixels) for _ in range(2))
        return x, y, x + width, y + height


@dataclass(frozen=True)
class CentralCrop:
    """The central square whose side is ``share`` of the shorter side."""

    share: float = 0.875  # 224 of 256 pixels

    def __call__(self, width: int, height: int, random: Random) -> Box:
        """The same box at every call."""
        side = max(1, round(self.share * min(width, height)))
        return _central(width, height, side, side)


def _central(width: int, height: int, w: int, h: int) -> Box:
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h
