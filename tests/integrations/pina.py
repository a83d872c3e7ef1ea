"""PINA: a physics-informed network of the Poisson problem, on fixed points."""

from typing import Any

import pina
import torch
from pina.model import FeedForward
from pina.optim import TorchOptimizer
from pina.problem.zoo import Poisson2DSquareProblem
from pina.solver import PhysicsInformedSingleModelSolver

PACKAGE, MODEL = "pina-mathlab", "PINN, Poisson 2d, full batch"


def train(callbacks: list[Any], options: dict[str, Any]) -> Any:
    problem: Any = Poisson2DSquareProblem()
    problem.discretise_domain(200, "random", domains=list(problem.domains))
    network = FeedForward(2, 1, layers=[16, 16], func=torch.nn.Tanh)
    adam = TorchOptimizer(torch.optim.Adam, lr=1e-3)
    solver = PhysicsInformedSingleModelSolver(problem, network, optimizer=adam)
    pina.Trainer(solver, max_epochs=400, callbacks=callbacks, **options).train()
    return solver
