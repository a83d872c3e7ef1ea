"""neuralforecast: NHITS on the passengers of an airline, windows drawn within the step."""

from typing import Any

from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS
from neuralforecast.utils import AirPassengersDF

PACKAGE, MODEL = "neuralforecast", "NHITS, air passengers, windows drawn in the step"


def train(callbacks: list[Any], options: dict[str, Any]) -> Any:
    model = NHITS(
        h=12, input_size=24, max_steps=200, scaler_type="robust", callbacks=callbacks, **options
    )
    forecast = NeuralForecast(models=[model], freq="ME")
    forecast.fit(AirPassengersDF)
    return forecast.models[0]
