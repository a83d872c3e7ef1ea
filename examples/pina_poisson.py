"""The callbacks in PINA: a physics-informed network of a Poisson problem, plain and accelerated.

    python examples/pina_poisson.py

Needs PINA: pip install pina-mathlab.
"""

import lightning
import pina
import torch
from pina.model import FeedForward
from pina.optim import TorchOptimizer
from pina.problem.zoo import Poisson2DSquareProblem
from pina.solver import PhysicsInformedSingleModelSolver

from lightning_stableaa import AndersonCallback, SmoothingMonitor

STEPS = 400


def train(*callbacks: lightning.Callback) -> float:
    """Trains on fixed points with these callbacks; returns the relative L2 error."""
    torch.set_num_threads(1)  # tensors this small gain nothing from a second one
    lightning.seed_everything(0, verbose=False)
    problem = Poisson2DSquareProblem()
    problem.discretise_domain(400, "random", domains=["D"])
    problem.discretise_domain(100, "random", domains=[one for one in problem.domains if one != "D"])
    network = FeedForward(2, 1, layers=[20, 20], func=torch.nn.Tanh)
    adam = TorchOptimizer(torch.optim.Adam, lr=5e-3)
    solver = PhysicsInformedSingleModelSolver(problem, network, optimizer=adam)
    trainer = pina.Trainer(
        solver,
        max_epochs=STEPS,  # without batch_size, an epoch is one step on all points
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.train()

    points = problem.spatial_domain.sample(2500, "grid")
    with torch.no_grad():
        exact = problem.solution(points)
        return float((solver(points) - exact).norm() / exact.norm())


if __name__ == "__main__":
    print(f"relative L2 error after {STEPS} steps of Adam")
    print(f"plain:       {train():.2e}")
    print(f"accelerated: {train(SmoothingMonitor(), AndersonCallback()):.2e}")
