"""Both callbacks from YAML files: LightningCLI and Hydra, there and back again."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.cli import LightningCLI
from omegaconf import OmegaConf

from lightning_stableaa import AndersonCallback, Smoothing, SmoothingMonitor
from tests.callbacks.regression import Regression, batches, counters, fit

CLI_CONFIG = """
trainer:
  accelerator: cpu
  devices: 1
  logger: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_stableaa.AndersonCallback
      init_args:
        history_depth: 5
        store_every_n_steps: 4
        accelerate_every_n_steps: 8
        regularization: [1.0e-06, 0.01]
        max_extrapolation: 30.0
        apply_to: both
        history_device: cpu
    - class_path: lightning_stableaa.SmoothingMonitor
      init_args:
        average_window: 3
        rsd_threshold: 0.2
        of: updates
"""

NESTED_CONFIG = """
trainer:
  accelerator: cpu
  devices: 1
  logger: false
  callbacks:
    class_path: lightning_stableaa.AndersonCallback
    init_args:
      smoothing:
        class_path: lightning_stableaa.Smoothing
        init_args:
          average_window: 4
          rsd: max
"""


@pytest.fixture(autouse=True)
def command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns of the arguments of pytest, jsonargparse of LightningCLI."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


class CliModule(lightning.pytorch.LightningModule):
    """For LightningCLI, which wants a class that it can import."""


def cli_of(*arguments: str) -> LightningCLI:
    return LightningCLI(CliModule, run=False, args=[*arguments], seed_everything_default=False)


def callbacks_of(cli: LightningCLI) -> list[Any]:
    return [
        one
        for one in cli.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(one, AndersonCallback | SmoothingMonitor)
    ]


@pytest.mark.parametrize("text", [CLI_CONFIG, NESTED_CONFIG], ids=["two callbacks", "nested"])
def test_lightning_cli_round_trip(text: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(text)
    cli = cli_of("--config", str(first))
    cli.parser.save(cli.config, second, skip_check=False)
    again = cli_of("--config", str(second))

    one, other = callbacks_of(cli), callbacks_of(again)
    assert [type(each) for each in one] == [type(each) for each in other]
    assert one[0].options == other[0].options
    if len(one) == 2:
        assert (
            one[0].options
            == AndersonCallback(
                history_depth=5,
                store_every_n_steps=4,
                accelerate_every_n_steps=8,
                regularization=[1e-6, 0.01],
                max_extrapolation=30.0,
                apply_to="both",
                history_device="cpu",
            ).options
        )
        assert one[1].smoothing == other[1].smoothing
        assert one[1].smoothing == Smoothing(average_window=3, rsd_threshold=0.2, of="updates")
    else:
        assert one[0].options.smoothing == Smoothing(average_window=4, rsd="max")


def test_lightning_cli_takes_the_options_from_the_command_line() -> None:
    cli = cli_of(
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.callbacks+=lightning_stableaa.AndersonCallback",
        "--trainer.callbacks.regularization=0.5",
        "--trainer.callbacks.safeguard=none",
    )
    (callback,) = callbacks_of(cli)
    assert (callback.options.regularization, callback.options.safeguard) == (0.5, "none")


def test_lightning_cli_names_a_wrong_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli_of(
            "--trainer.callbacks+=lightning_stableaa.AndersonCallback",
            "--trainer.callbacks.safeguard=closure",
        )
    assert "closure" in capsys.readouterr().err


HYDRA_CONFIG = """
anderson:
  _target_: lightning_stableaa.AndersonCallback
  store_every_n_steps: 2
  accelerate_every_n_steps: 4
  regularization: [1.0e-06, 0.01]
  smoothing:
    _target_: lightning_stableaa.Smoothing
    average_window: 2
"""


def test_hydra_round_trip(tmp_path: Path) -> None:
    config = OmegaConf.create(HYDRA_CONFIG)
    OmegaConf.save(config, tmp_path / "saved.yaml")
    again = OmegaConf.load(tmp_path / "saved.yaml")
    one, other = (instantiate(each, _convert_="all")["anderson"] for each in (config, again))

    assert one.options == other.options
    assert type(one.options.regularization) is list
    assert (
        one.options
        == AndersonCallback(
            store_every_n_steps=2,
            accelerate_every_n_steps=4,
            regularization=[1e-6, 0.01],
            smoothing=Smoothing(average_window=2),
        ).options
    )


@pytest.mark.parametrize("convert", ["all", "none"])
def test_a_checkpoint_of_a_run_that_hydra_configured_is_plain(convert: str, tmp_path: Path) -> None:
    """Also where somebody forgot ``_convert_``: no container of OmegaConf's gets into the state."""
    callback = instantiate(OmegaConf.create(HYDRA_CONFIG), _convert_=convert)["anderson"]
    trainer = fit(Regression(), batches(1), callback, max_epochs=10)
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["AndersonCallback"]
    assert state["counters"] == counters(callback)
    assert counters(callback)["attempted"] == 2
