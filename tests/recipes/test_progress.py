"""What a run shows while it trains, on a terminal and in a log file, and what a sweep shows."""

import json
import re
from pathlib import Path

import pytest

from lightning_stableaa import AndersonCallback
from lightning_stableaa.recipes.progress import RunProgress, number
from lightning_stableaa.recipes.train import main
from tests.helpers.own_module import Data, Module
from tests.recipes.conftest import SMALL, Command, quiet_trainer


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.123456, "0.1235"),
        (0.001, "0.001"),
        (0.00012345, "1.23e-04"),
        (-2e-9, "-2.00e-09"),
        (43210.0, "4.321e+04"),
        (float("nan"), "nan"),
    ],
)
def test_number_small_values_are_scientific(value: float, text: str) -> None:
    assert number(value) == text


def fit() -> None:
    anderson = AndersonCallback(store_every_n_steps=2, accelerate_every_n_steps=6)
    options = {"callbacks": [RunProgress(), anderson], "enable_progress_bar": True}
    quiet_trainer(max_epochs=4, accumulate_grad_batches=1, **options).fit(Module(), Data())


def test_progress_without_terminal_prints_a_line_each_tenth(
    capfd: pytest.CaptureFixture[str],
) -> None:
    fit()
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step ")]
    pattern = r"step (\d+) of 20, epoch \d, loss [\d.e-]+, AA (\d)/(\d)(, 0:00:\d\d left)?"
    found = [re.fullmatch(pattern, line) for line in lines]
    assert all(found), lines
    assert [int(one[1]) for one in found if one] == [*range(2, 22, 2)]
    last = found[-1]
    assert last is not None
    assert (last[3], last[4]) == ("3", None)


def test_progress_on_terminal_is_one_bar(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # by which Rich takes a pipe for a terminal
    monkeypatch.setenv("COLUMNS", "160")
    fit()
    printed = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capfd.readouterr().out)
    last = printed.replace("\r", "\n").strip().splitlines()[-1]
    assert re.search(r"steps ━+ +20/20 0:00:00 left, epoch \d, loss [\d.e-]+, AA \d/3", last), last
    assert "step 2 of" not in printed


def test_sweep_names_points_and_ends_in_a_table(command: Command) -> None:
    options = [*SMALL["burgers2d"], "trainer.max_steps=5", "pictures=false", "run_name=sweep"]
    printed = command(main, "-m", *options, "callbacks=none", "optimizer.lr=1e-2,1e-3")
    runs = Path("runs/burgers2d/sweep")
    assert printed.startswith(f"sweep: the runs are in {runs}/0, {runs}/1, ...\n")
    for point, rate in enumerate(("0.01", "0.001")):
        result = json.loads((runs / f"{point}/results.json").read_text())["results"]
        for start in (f"#{point} optimizer.lr={rate}: recipe burgers2d, ", f"#{point} step 5 of 5"):
            assert f"\n{start}" in printed
        row = rf"│ {point} +│ optimizer.lr={rate} +│ {result['best/val/relative_l2']:.4g} +│ 5 +│"
        assert re.search(row, printed)
    assert printed.endswith(f"everything about these runs: {runs}\n")


def test_sweep_of_recipes_ends_in_one_table(command: Command) -> None:
    options = ["trainer.max_steps=1", "trainer.val_check_interval=1"]
    options += ["recipe=burgers2d,burgers100d", "callbacks=none", "pictures=false", "run_name=two"]
    printed = command(main, "-m", *options)
    assert printed.startswith("sweep: the runs are in runs/RECIPE/two/0, runs/RECIPE/two/1, ...\n")
    for point, recipe in enumerate(("burgers2d", "burgers100d")):
        assert Path(f"runs/{recipe}/two/{point}/results.json").is_file()
        assert re.search(rf"│ {point} +│ recipe={recipe} +│", printed)


@pytest.mark.slow
def test_submitit_says_where_runs_and_logs_are(command: Command) -> None:
    options = [*SMALL["burgers2d"], "trainer.max_steps=5", "pictures=false", "run_name=job"]
    printed = command(main, *options, "cluster=submitit_local")
    runs = "runs/burgers2d/job"
    where = f"the runs are in {runs}/0, {runs}/1, ...; what they print is in {runs}/.submitit/JOB\n"
    assert where in printed
    (log,) = Path(runs).glob(".submitit/*/*_0_log.out")
    assert "step 5 of 5" in log.read_text()
    assert json.loads(Path(runs, "0/results.json").read_text())["results"]["cost/gradients"] == 5
