import inspect
from typing import Any

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
    ({"relaxation": float("nan")}, r"relaxation must be in \(0, 1\], got nan"),
    ({"relaxation": "1"}, f"relaxation {NUMBER} '1'"),
    ({"lag_compensation": -0.1}, r"lag_compensation must be finite and >= 0 .*, got -0.1"),
    ({"lag_compensation": float("inf")}, r"lag_compensation must be finite and >= 0 .*, got inf"),
    ({"lag_compensation": None}, f"lag_compensation {NUMBER} None"),
    ({"look_ahead_cycles": -1}, r"look_ahead_cycles must be finite and >= 0 .*, got -1.0"),
    ({"look_ahead_cycles": float("nan")}, r"look_ahead_cycles must be finite and >= 0 .*, got nan"),
    ({"sufficient_decrease": -0.1}, r"sufficient_decrease must be in \[0, 1\), got -0.1"),
    ({"sufficient_decrease": 1}, r"sufficient_decrease must be in \[0, 1\), got 1.0"),
    ({"sufficient_decrease": "1"}, f"sufficient_decrease {NUMBER} '1'"),
    ({"look_ahead_cycles": "10"}, f"look_ahead_cycles {NUMBER} '10'"),
    ({"regularization": -1e-3}, "regularization must be finite and >= 0, got -0.001"),
    ({"regularization": [1e-3, float("inf")]}, "regularization must be finite and >= 0, got inf"),
    ({"regularization": []}, "regularization must hold at least one value, got an empty list"),
    ({"regularization": "1e-3"}, f"regularization {NUMBER} '1e-3'"),
    (
        {"regularization": [1e-3, 1e-2], "safeguard": "none"},
        "regularization must be a single value when safeguard is 'none'",
    ),
    ({"max_extrapolation": 0}, r"max_extrapolation must be > 0 \(inf for no cap\), got 0.0"),
    ({"max_extrapolation": float("nan")}, "max_extrapolation must be > 0"),
    ({"safeguard": "gradient"}, "safeguard must be one of 'loss', 'none', got 'gradient'"),
    ({"optimizer_state": "x"}, "optimizer_state must be one of 'keep', 'mix', 'reset', got 'x'"),
    ({"apply_to": "all"}, "apply_to must be one of 'training', 'evaluation', 'both', got 'all'"),
    ({"history": "x"}, "history must be one of 'auto', 'replicated', 'sharded', got 'x'"),
    ({"smoothing": True}, "smoothing must be None or a Smoothing, got True"),
    (
        {
            "store_every_n_steps": 8,
            "accelerate_every_n_steps": 8,
            "smoothing": Smoothing(average_window=9),
        },
        r"average_window must be <= store_every_n_steps \(8\), got 9",
    ),
    (
        {"apply_to": "evaluation", "smoothing": Smoothing(apply_to="weights")},
        "smoothing.apply_to='weights' changes training, got apply_to='evaluation'",
    ),
]

WRONG_SMOOTHING: list[tuple[dict[str, Any], str]] = [
    ({"average_window": 1}, "average_window must be >= 2, got 1"),
    ({"average_window": 3.0}, f"average_window {INTEGER} 3.0"),
    ({"rsd_threshold": -0.1}, "rsd_threshold must be >= 0, got -0.1"),
    ({"rsd_threshold": float("nan")}, "rsd_threshold must be >= 0, got nan"),
    ({"rsd": "mean"}, "rsd must be one of 'norm', 'max', got 'mean'"),
    ({"of": "steps"}, "of must be one of 'iterates', 'updates', got 'steps'"),
    ({"apply_to": "x"}, "apply_to must be one of 'history', 'weights', got 'x'"),
    ({"rsd": "max", "of": "updates"}, "rsd='max' is defined on iterates only, got of='updates'"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_a_wrong_option_is_named_with_its_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Options(**options)


@pytest.mark.parametrize(("options", "message"), WRONG_SMOOTHING)
def test_a_wrong_smoothing_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Smoothing(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"such as 'cpu', got 'cuda', where there is no CUDA devi"):
        Options(history_device="cuda")


def test_a_single_lambda_is_a_grid_of_one_and_the_default_is_none() -> None:
    assert Options().regularization_grid is None
    assert Options(regularization=1).regularization_grid == (1.0,)
    assert Options(regularization=[1, 2]).regularization_grid == (1.0, 2.0)


def test_the_accelerator_takes_exactly_the_options_with_their_defaults() -> None:
    signature = inspect.signature(AndersonAccelerator.__init__).parameters
    taken = {name: one.default for name, one in signature.items() if one.kind is one.KEYWORD_ONLY}
    assert taken.pop("process_group") is None
    defaults = Options()
    assert taken == {name: getattr(defaults, name) for name in Options.__dataclass_fields__}
