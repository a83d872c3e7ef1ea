"""gpytorch: hyperparameters of an exact Gaussian process by marginal likelihood."""

from typing import Any

import gpytorch
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

PACKAGE, MODEL = "gpytorch", "exact GP, RBF kernel, full batch"


class Process(gpytorch.models.ExactGP):
    def __init__(self, x: Any, y: Any, likelihood: Any) -> None:
        super().__init__(x, y, likelihood)
        self.mean = gpytorch.means.ConstantMean()
        self.covariance = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

    def forward(self, x: Any) -> Any:
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.covariance(x))


class Fit(LightningModule):
    def __init__(self, x: Any, y: Any) -> None:
        super().__init__()
        likelihood = gpytorch.likelihoods.GaussianLikelihood()
        self.model = Process(x, y, likelihood)
        self.likelihood = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, self.model)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return -self.likelihood(self.model(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def train(callbacks: list[Any], options: dict[str, Any]) -> Any:
    x = torch.linspace(0, 1, 60)
    y = (6.28 * x).sin() + 0.2 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    module = Fit(x, y)
    trainer = Trainer(max_epochs=300, callbacks=callbacks, **options)
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=60))
    return module
