"""Every script in ``examples`` runs as it is, and is short."""

import logging
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
LOSS = r"(\d\.\d+e[+-]\d+)"

Run = Callable[[str], str]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Runs a script as ``python SCRIPT`` would, in this process; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # set by the command, for all later tests
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch.utilities.rank_zero",)]
    loggers.append(logging.getLogger("hydra.utils"))
    levels = [one.level for one in loggers]

    def run_script(name: str) -> str:
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    yield run_script
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_example_plain_torch_ends_lower_with_acceleration(run: Run) -> None:
    output = run("plain_torch.py")

    accepted = re.search(r"accepted (\d+) of 30 extrapolations", output)
    losses = re.search(rf"{LOSS} plain, {LOSS} accelerated", output)
    assert accepted is not None
    assert losses is not None
    assert int(accepted[1]) >= 1
    assert float(losses[2]) < float(losses[1])


def test_example_fabric_loop_resumes_bitwise(run: Run) -> None:
    losses = re.findall(LOSS, run("fabric_loop.py"))
    assert len(losses) == 2
    assert losses[0] == losses[1]


def test_example_lightning_trainer_ends_lower_with_acceleration(run: Run) -> None:
    output = run("lightning_trainer.py")
    plain, accelerated, smoothed = [float(one) for one in re.findall(LOSS, output)]
    assert accelerated < plain
    assert smoothed < plain


def test_example_lightning_cli_uses_the_callbacks_of_its_configuration(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        run("lightning_cli.py")
    assert "extrapolations accepted in 200 optimizer steps" in caplog.text


def test_example_hydra_own_module_writes_a_report(run: Run) -> None:
    output = run("hydra_own_module.py")

    (table,) = Path("comparisons").rglob("table.md")
    assert table.parent.name == "hydra_own_module.Regression"
    assert " anderson " in output
    assert output.endswith("table.md\n")
    assert table.read_text().startswith("# Regression: val/loss (less is better), 2 seeds\n")


@pytest.mark.slow
@pytest.mark.ddp
def test_example_ddp_keeps_the_weights_of_its_processes_equal(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, str(FOLDER / "ddp.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        timeout=240,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "weights of 2 processes are equal: True" in finished.stdout


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda one: one.stem)
def test_example_is_short(script: Path) -> None:
    assert len(script.read_text().splitlines()) < 80
