"""What a resumed run is told otherwise than the one before it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_stableaa.recipes.resuming import tell_differences

SETTINGS: dict[str, Any] = {
    "seed": 0,
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 1e-3},
    "data": {"csv": "table.csv"},
    "callbacks": {"anderson": {"history_depth": 10}, "progress": None},
    "run_folder": "runs/first",
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"run_folder": "runs/second"}, []),
        ({"seed": 3}, ["seed=3 (was 0)"]),
        (
            {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}},
            ["optimizer.lr=0.1 (was 0.001)"],
        ),
        ({"callbacks": {"anderson": None}}, ["callbacks.anderson.history_depth=None (was 10)"]),
        (
            {"scheduler": {"T_max": 5}, "seed": 1},
            ["scheduler.T_max=5 (was None)", "seed=1 (was 0)"],
        ),
    ],
)
def test_options_that_decide_the_course_are_compared(
    changes: dict[str, Any], said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    tell_differences(tmp_path / "checkpoints/last.ckpt", SETTINGS | changes)
    told = capsys.readouterr().err
    assert bool(told) is bool(said)
    assert all(one in told for one in said)


def test_nothing_is_said_of_a_checkpoint_without_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell_differences(tmp_path / "last.ckpt", SETTINGS)
    assert not capsys.readouterr().err
