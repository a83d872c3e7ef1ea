"""chemprop: a message-passing network with batch normalization, on small molecules."""

from typing import Any

from chemprop import data, models, nn
from lightning.pytorch import Trainer

PACKAGE, MODEL = "chemprop", "MPNN, 60 molecules, mini-batches"


def train(callbacks: list[Any], options: dict[str, Any]) -> Any:
    tails = ["", "O", "N", "Cl", "C=O", "C#N"]
    molecules = ["C" * length + tail for length in range(1, 11) for tail in tails]
    points = [
        data.MoleculeDatapoint.from_smi(one, [0.3 * len(one) + one.count("O")]) for one in molecules
    ]
    loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=20, seed=0)
    model = models.MPNN(
        nn.BondMessagePassing(d_h=32),
        nn.MeanAggregation(),
        nn.RegressionFFN(input_dim=32, hidden_dim=32),
        batch_norm=True,
    )
    Trainer(max_epochs=70, callbacks=callbacks, **options).fit(model, loader)
    return model
