"""The small parts that recipes share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_stableaa.recipes.metrics import RelativeL2Error
from lightning_stableaa.recipes.plots import accepted_steps, draw_run, read_metrics
from lightning_stableaa.recipes.schedules import warmup_cosine


def test_relative_l2_error_accumulates_batches() -> None:
    metric = RelativeL2Error()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
    metric.update(torch.tensor([2.0]), torch.tensor([3.0]))
    # ||(0, 2, -1)|| / ||(1, 0, 3)||
    assert metric.compute().item() == pytest.approx((5 / 10) ** 0.5, abs=1e-15)


def test_warmup_cosine_exact_rates() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = warmup_cosine(optimizer, 12, warmup_share=1 / 3, final_lr_ratio=0.1)
    rates = []
    for _ in range(14):  # two steps more than planned stay at the end
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    falling = [2 * (0.1 + 0.9 * (1 + np.cos(np.pi * k / 8)) / 2) for k in range(9)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, *falling, 0.2], rel=1e-15)


METRICS = """step,train/loss,val/mse,anderson/accepted,smoothing/rsd,smoothing/on
0,1.0,,,,
1,0.5,,0,0.2,1
2,0.4,,1,0.05,0
3,0.3,0.7,1,0.01,0
4,0.2,,2,,
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "metrics.csv").write_text(METRICS)
    (tmp_path / "config.yaml").write_text("callbacks: {smoothing: {rsd_threshold: 0.1}}")
    return tmp_path


def test_metrics_read_without_gaps(run: Path) -> None:
    metrics = read_metrics(run / "metrics.csv")
    assert metrics["val/mse"].steps.tolist() == [3]
    assert metrics["train/loss"].values.tolist() == [1.0, 0.5, 0.4, 0.3, 0.2]
    assert accepted_steps(metrics).tolist() == [2, 4]
    assert accepted_steps({}).tolist() == []


def test_plots_drawn_for_logged_metrics(run: Path) -> None:
    draw_run(run, "val/mse")
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["loss.png", "rsd.png"]
