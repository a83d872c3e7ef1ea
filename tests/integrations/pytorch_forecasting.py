"""pytorch-forecasting: a temporal fusion transformer with dropout, on noisy sines."""

from typing import Any

import numpy as np
import pandas
from lightning.pytorch import Trainer
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.metrics import QuantileLoss

PACKAGE, MODEL = "pytorch-forecasting", "temporal fusion transformer, mini-batches"


def train(callbacks: list[Any], options: dict[str, Any]) -> Any:
    noise, time = np.random.default_rng(0).normal(0, 0.1, (5, 80)), np.arange(80)
    series = [
        pandas.DataFrame(
            {"time": time, "group": str(k), "value": np.sin(time / (3 + k)) + noise[k]}
        )
        for k in range(5)
    ]
    data = TimeSeriesDataSet(
        pandas.concat(series, ignore_index=True),
        time_idx="time",
        target="value",
        group_ids=["group"],
        max_encoder_length=16,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
    )
    model = TemporalFusionTransformer.from_dataset(
        data, hidden_size=8, attention_head_size=1, loss=QuantileLoss(), learning_rate=3e-3
    )
    trainer = Trainer(max_steps=200, gradient_clip_val=0.1, callbacks=callbacks, **options)
    trainer.fit(model, data.to_dataloader(train=True, batch_size=32))
    return model
