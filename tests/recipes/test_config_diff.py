"""Options of a resumed run that differ from the earlier ones."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_stableaa.recipes.resuming import warn_config_diff

SETTINGS: dict[str, Any] = {
    "seed": 0,
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 1e-3},
    "data": {"csv": "table.csv"},
    "callbacks": {"anderson": {"history_depth": 10}, "progress": None},
    "run_folder": "runs/first",
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"run_folder": "runs/second"}, []),
        ({"seed": 3}, ["seed=3 (was 0)"]),
        ({"optimizer": {"lr": 0.1}}, ["optimizer.lr=0.1 (was 0.001)"]),
        ({"callbacks": {"anderson": None}}, ["callbacks.anderson.history_depth=None (was 10)"]),
        ({"scheduler": {"T_max": 5}}, ["scheduler.T_max=5 (was None)"]),
    ],
)
def test_config_diff_names_changed_options(
    changes: dict[str, Any], named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    warn_config_diff(tmp_path / "checkpoints/last.ckpt", SETTINGS | changes)
    printed = capsys.readouterr().err
    assert bool(printed) is bool(named)
    assert all(one in printed for one in named)
