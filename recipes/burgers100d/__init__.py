"""Two Burgers-type equations in 100 variables, and a network trained on their residual."""

from lightning_stableaa.recipes.burgers100d.data import Burgers100dData
from lightning_stableaa.recipes.burgers100d.module import Burgers100dModule
from lightning_stableaa.recipes.burgers100d.problems import LogisticBurgers, ProductBurgers

__all__ = ["Burgers100dData", "Burgers100dModule", "LogisticBurgers", "ProductBurgers"]
