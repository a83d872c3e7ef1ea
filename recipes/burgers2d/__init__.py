"""Burgers' equation in one space dimension and time, solved by a physics-informed network."""

from lightning_stableaa.recipes.burgers2d.data import Burgers2dData
from lightning_stableaa.recipes.burgers2d.module import Burgers2dModule

__all__ = ["Burgers2dData", "Burgers2dModule"]
