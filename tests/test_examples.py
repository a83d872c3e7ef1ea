"""Every script and notebook in ``examples`` runs as it is, and the scripts are short."""

import contextlib
import logging
import multiprocessing
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

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


@pytest.mark.slow
# of torch_geometric, which PINA imports, and of PINA's solvers
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:You defined a `validation_step`")
def test_example_pina_poisson_ends_lower_with_acceleration(run: Run) -> None:
    plain, accelerated = [float(one) for one in re.findall(LOSS, run("pina_poisson.py"))]
    assert accelerated < plain


def test_example_accelerate_loop_resumes_bitwise(run: Run) -> None:
    plain, accelerated, resumed = re.findall(LOSS, run("accelerate_loop.py"))
    assert float(accelerated) < float(plain)
    assert resumed == accelerated


def test_example_hf_trainer_attempts_every_20_steps(run: Run) -> None:
    accepted = re.search(r"accepted (\d+) of 10 extrapolations in 200 steps", run("hf_trainer.py"))
    assert accepted is not None
    assert int(accepted[1]) >= 1


def code_of(name: str, **parameters: int) -> list[Any]:
    """Cells of a notebook with other parameters."""
    cells = nbformat.read(FOLDER / name, as_version=4).cells
    (cell,) = [one for one in cells if "parameters" in one.metadata.get("tags", ())]
    for parameter, value in parameters.items():
        line = rf"^{parameter} = \d+"
        assert re.search(line, cell.source, re.MULTILINE), parameter
        cell.source = re.sub(line, f"{parameter} = {value}", cell.source, flags=re.MULTILINE)
    return [new_code_cell(one.source) for one in cells if one.cell_type == "code"]


@pytest.mark.slow
def test_notebooks_compare_at_equal_cost_and_give_no_verdict_on_two_seeds(tmp_path: Path) -> None:
    burgers = code_of("burgers.ipynb", STEPS=60, POINTS=100)
    does_it_help = code_of("does_it_help.ipynb", STEPS=60, SEEDS=2)
    # one after the other in one process, where the second finds no name of the first
    cells = [*burgers, new_code_cell("%reset -f"), *does_it_help]
    notebook = new_notebook(cells=cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=240, resources=resources).execute()

    printed = []
    for part in (burgers, does_it_help):
        outputs = [one for cell in part for one in cell.outputs]
        assert any("image/png" in one.get("data", ()) for one in outputs)
        printed.append("".join(one.text for one in outputs if one.output_type == "stream"))
    plain, accelerated = [int(one) for one in re.findall(r"cost +(\d+)", printed[0])]
    assert plain == accelerated > 60
    assert "extrapolations accepted" in printed[0]
    assert re.search(r"better in [012] of 2 seeds\nverdict: too few seeds\n", printed[1])


@pytest.mark.parametrize("notebook", sorted(FOLDER.glob("*.ipynb")), ids=lambda one: one.stem)
def test_notebook_is_committed_without_outputs(notebook: Path) -> None:
    cells = nbformat.read(notebook, as_version=4).cells
    code = [one for one in cells if one.cell_type == "code"]
    assert not any(one.outputs or one.execution_count for one in code)


def test_example_hydra_own_module_writes_a_report(run: Run) -> None:
    output = run("hydra_own_module.py")

    (table,) = Path("comparisons").rglob("table.md")
    assert table.parent.name == "hydra_own_module.Regression"
    assert " anderson " in output
    assert output.endswith("table.md\n")
    assert table.read_text().startswith("# Regression: val/loss (less is better), 2 seeds\n")


def run_into(output: Path, script: Path) -> None:
    """Runs a script as ``python SCRIPT`` would, with what it prints in a file."""
    warnings.simplefilter("ignore")
    sys.argv = [str(script)]  # by which Lightning starts the other process
    with output.open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.mark.slow
@pytest.mark.ddp
def test_example_ddp_keeps_the_weights_of_its_processes_equal(tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    # a fork, which has nothing to import
    first = multiprocessing.get_context("fork").Process(
        target=run_into, args=(output, FOLDER / "ddp.py"), daemon=True
    )
    first.start()
    first.join(timeout=240)
    assert first.exitcode == 0
    assert "weights of 2 processes are equal: True" in output.read_text()


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda one: one.stem)
def test_example_is_short(script: Path) -> None:
    assert len(script.read_text().splitlines()) < 80
