"""Every option is validated at construction, and named in its error."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_stableaa import AndersonAccelerator, Smoothing
from lightning_stableaa.options import Options

INTEGER, NUMBER = "must be an integer, got", "must be a number, got"

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"history_depth": 1}, "history_depth must be >= 2, got 1"),
    ({"history_depth": 2.5}, f"history_depth {INTEGER} 2.5"),
    ({"history_depth": True}, f"history_depth {INTEGER} True"),
    ({"store_every_n_steps": 0}, "store_every_n_steps must be >= 1, got 0"),
    ({"accelerate_every_n_steps": 0}, "accelerate_every_n_steps must be >= 1, got 0"),
    (
        {"store_every_n_steps": 8, "accelerate_every_n_steps": 12},
        r"accelerate_every_n_steps must be a multiple of store_every_n_steps \(8\), got 12",
    ),
    ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
    ({"relaxation": 0.0}, r"relaxation must be in \(0, 1\], got 0.0"),
    ({"relaxation": 1.1}, r"relaxation must be in \(0, 1\], got 1.1"),
    ({"relaxation": math.nan}, r"relaxation must be in \(0, 1\], got nan"),
    ({"relaxation": "1"}, f"relaxation {NUMBER} '1'"),
    ({"lag_compensation": -0.1}, r"lag_compensation must be finite and >= 0 .*, got -0.1"),
    ({"lag_compensation": math.inf}, r"lag_compensation must be finite and >= 0 .*, got inf"),
    ({"lag_compensation": None}, f"lag_compensation {NUMBER} None"),
    ({"max_horizon": -1}, r"max_horizon must be finite and >= 0 \(0 for none\), got -1.0"),
    ({"max_horizon": math.nan}, r"max_horizon must be finite and >= 0 .*, got nan"),
    ({"max_horizon": "10"}, f"max_horizon {NUMBER} '10'"),
    ({"regularization": -1e-3}, "regularization must be finite and >= 0, got -0.001"),
    ({"regularization": math.inf}, "regularization must be finite and >= 0, got inf"),
    ({"regularization": [1e-3]}, rf"regularization {NUMBER} \[0.001\]"),
    ({"max_extrapolation": 0}, r"max_extrapolation must be > 0 \(inf for no cap\), got 0.0"),
    ({"max_extrapolation": math.nan}, "max_extrapolation must be > 0 .*, got nan"),
    ({"safeguard": "gradient"}, "safeguard must be one of 'loss', 'none', got 'gradient'"),
    ({"history": "x"}, "history must be one of 'auto', 'replicated', 'sharded', got 'x'"),
    ({"history_device": 0}, "history_device must be None or the name of a device, .*, got 0"),
    ({"history_device": "x"}, "history_device must be None or the name of a device, .*, got 'x'"),
    ({"smoothing": True}, "smoothing must be None or a Smoothing, got True"),
    (
        {"store_every_n_steps": 5, "smoothing": Smoothing(average_window=6)},
        r"average_window must be <= store_every_n_steps \(5\), got 6",
    ),
]

WRONG_SMOOTHING: list[tuple[dict[str, Any], str]] = [
    ({"average_window": 1}, "average_window must be >= 2, got 1"),
    ({"average_window": 3.0}, f"average_window {INTEGER} 3.0"),
    ({"rsd_threshold": -0.1}, "rsd_threshold must be >= 0, got -0.1"),
    ({"rsd_threshold": math.nan}, "rsd_threshold must be >= 0, got nan"),
    ({"rsd": "mean"}, "rsd must be one of 'norm', 'max', got 'mean'"),
    ({"of": "steps"}, "of must be one of 'updates', 'iterates', got 'steps'"),
    ({"apply_to": "x"}, "apply_to must be one of 'history', 'weights', got 'x'"),
    ({"rsd": "max", "of": "updates"}, "rsd='max' is defined on iterates only, got of='updates'"),
]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [(Options, *one) for one in WRONG] + [(Smoothing, *one) for one in WRONG_SMOOTHING],
)
def test_option_invalid_value_raises_with_name_and_value(
    kind: type, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        kind(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_history_device_absent_raises() -> None:
    with pytest.raises(ValueError, match=r"such as 'cpu', got 'cuda', where there is no CUDA devi"):
        Options(history_device="cuda")


def test_accelerator_takes_exactly_the_options_with_their_defaults() -> None:
    signature = inspect.signature(AndersonAccelerator.__init__).parameters
    taken = {name: one.default for name, one in signature.items() if one.kind is one.KEYWORD_ONLY}
    assert taken.pop("process_group") is None
    assert taken == {one.name: one.default for one in dataclasses.fields(Options)}


def test_options_numbers_of_numpy_become_plain() -> None:
    window: Any = np.int32(4)
    smoothing = Smoothing(rsd_threshold=np.float64(0.5), average_window=window)
    given: dict[str, Any] = {"history_depth": np.int64(4), "relaxation": np.float32(0.5)}
    options = Options(**given, smoothing=smoothing)
    numbers = (options.history_depth, options.relaxation)
    numbers += (smoothing.average_window, smoothing.rsd_threshold)
    assert numbers == (4, 0.5, 4, 0.5)
    assert [type(one) for one in numbers] == [int, float, int, float]
    too_few: Any = np.int64(1)
    with pytest.raises(ValueError, match="history_depth must be >= 2, got 1"):
        Options(history_depth=too_few)
