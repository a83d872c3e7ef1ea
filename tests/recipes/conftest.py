"""A small admissions table, composed configurations, and refused commands."""

import csv
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import lightning
import numpy as np
import pytest
from hydra import initialize_config_module
from omegaconf import DictConfig

from lightning_stableaa.recipes.train import RANK_ZERO_LOGGERS, is_worth_reading

Compose = Callable[..., DictConfig]
Main = Callable[[], None]
Command = Callable[..., str]
Refuses = Callable[[Main, list[str], str], None]

# as distributed, with the trailing blanks
HEADER = (
    "Serial No.,GRE Score,TOEFL Score,University Rating,SOP,LOR ,CGPA,Research,Chance of Admit "
)

# A recipe at a size that trains in a second.
SMALL = {
    "admissions_mlp": ["recipe=admissions_mlp", "data.batch_size=4", "model.widths=[7,8,1]"],
    "burgers2d": [
        *("recipe=burgers2d", "model.widths=[2,5,1]", "trainer.val_check_interval=5"),
        *("data.interior_points=20", "data.border_points=8", "data.redraw_every=4"),
        "data.grid=[6,5]",
    ],
}


def quiet_trainer(**options: Any) -> lightning.Trainer:
    """Trains on the CPU, and neither prints nor writes."""
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet: dict[str, Any] = {"accelerator": "cpu", "num_sanity_val_steps": 0}
    quiet |= dict.fromkeys(names, False)
    return lightning.Trainer(**quiet | options)


@pytest.fixture(scope="session")
def admissions_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 rows with the header of the real file; the target is a known function of the features."""
    random = np.random.default_rng(0)
    features = random.uniform(1, 5, size=(50, 7)).round(2)
    path = tmp_path_factory.mktemp("data") / "admissions.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER.split(","))
        for number, row in enumerate(features, start=1):
            writer.writerow([number, *row, row.sum() / 50])
    return path


@pytest.fixture
def compose(tmp_path: Path, admissions_csv: Path) -> Compose:
    """Composes ``conf/train.yaml`` with overrides; the run folder is a temporary one."""

    def compose(*overrides: str) -> DictConfig:
        config = composed(tmp_path / "run", *overrides)
        if "csv" in config.data:
            config.data.csv = str(admissions_csv)
        return config

    return compose


def composed(run_folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_module("lightning_stableaa.conf", version_base="1.3"):
        return hydra.compose("train", [f"run_folder={run_folder}", *overrides])


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of a command, whose changes to path and logging are taken back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    log = logging.getLogger("hydra.utils")
    level = log.level
    yield tmp_path
    log.setLevel(level)
    for name in RANK_ZERO_LOGGERS:
        logging.getLogger(name).removeFilter(is_worth_reading)


@pytest.fixture
def command(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """Runs a command in an empty folder; returns what it printed, or its errors if it fails."""

    def command(main: Main, *arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [name_of(main), *arguments])
        ended: Any = 0
        try:
            main()
        except SystemExit as error:
            ended = error.code or 0
        printed = capfd.readouterr()
        assert ended == code, printed.err
        assert "Traceback" not in printed.err
        return printed.err if code else printed.out

    return command


def name_of(main: Main) -> str:
    return f"stableaa-{main.__module__.rpartition('.')[2]}"


@pytest.fixture
def refuses(command: Command, empty_folder: Path) -> Refuses:
    """A command ends with exit code 2 and one sentence, a pattern, and leaves nothing behind."""

    def refuses(main: Main, arguments: list[str], sentence: str) -> None:
        before = sorted(empty_folder.rglob("*"))
        errors = command(main, *arguments, code=2)
        assert re.fullmatch(f"{name_of(main)}: {sentence}", errors.splitlines()[-1]), errors
        assert sorted(empty_folder.rglob("*")) == before

    return refuses
