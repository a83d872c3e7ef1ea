"""Loggers of other makers, on this machine alone."""

import sqlite3
from pathlib import Path

import pytest
import wandb

from lightning_stableaa.recipes.train import train
from tests.recipes.conftest import SMALL, Compose

RUN = [*SMALL["burgers2d"], "trainer.max_steps=5", "pictures=false"]


def test_wandb_offline_run_is_in_run_folder(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # the settings that another test has read
    train(compose(*RUN, "logger=wandb"))
    assert wandb.run is None  # or the next run of a sweep would go on with it
    wandb.teardown()  # waits until everything is written
    (log,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    written = log.read_bytes()
    assert all(name in written for name in (b"train/loss", b"cost/gradients", b"history_depth"))
    assert (tmp_path / "run/metrics.csv").is_file()


def test_mlflow_without_server_is_in_run_folder(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    train(compose(*RUN, "logger=mlflow"))
    with sqlite3.connect(tmp_path / "run/mlflow.db") as database:
        query = "SELECT step FROM metrics WHERE key = 'train/loss' ORDER BY step"
        assert [step for (step,) in database.execute(query)] == [0, 1, 2, 3, 4]
    assert (tmp_path / "run/metrics.csv").is_file()
