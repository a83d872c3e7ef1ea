"""neuromancer: a parametric optimization problem, learned by its own Trainer."""

from typing import Any

import torch
from neuromancer.constraint import variable
from neuromancer.dataset import DictDataset
from neuromancer.loss import PenaltyLoss
from neuromancer.modules import blocks
from neuromancer.problem import Problem
from neuromancer.system import Node
from neuromancer.trainer import LitTrainer

PACKAGE, MODEL = "neuromancer", "parametric Rosenbrock with a constraint, full batch"


def data() -> Any:
    a = torch.rand(200, 1, generator=torch.Generator().manual_seed(0))
    parts = {name: DictDataset({"a": a}, name=name) for name in ("train", "dev")}
    return parts["train"], parts["dev"], None, 200


def train(callbacks: list[Any], options: dict[str, Any]) -> Any:
    network = blocks.MLP(1, 2, hsizes=[16, 16], nonlin=torch.nn.Tanh)
    node = Node(network, ["a"], ["x"], name="map")
    x, a = variable("x"), variable("a")
    x1, x2 = x[:, [0]], x[:, [1]]
    objective = ((1 - x1) ** 2 + a * (x2 - x1**2) ** 2).minimize(weight=1.0, name="objective")
    constraint = 10.0 * (x1 >= x2)
    problem = Problem([node], PenaltyLoss([objective], [constraint]))
    trainer = LitTrainer(epochs=300, save_weights=False, accelerator="cpu", devices=1)
    trainer.callbacks += callbacks  # its constructor takes none, and not the quiet options either
    trainer.fit(problem, data)
    return problem
