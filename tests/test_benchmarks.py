"""The benchmark scripts: tiny runs of them write figures and pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from benchmarks import (
    ablation,
    batch_sizes,
    cost,
    criterion,
    full_batch,
    full_batch_images,
    in_trainer,
    optimizer_matrix,
    pinns,
    unseen,
)
from lightning_stableaa.recipes import compare

PNG = b"\x89PNG\r\n\x1a\n"
CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "a line": (
            nn.Linear(3, 1),
            lambda: (torch.randn(8, 3), torch.randn(8, 1)),
            mse_loss,
            3,
        )
    }
    monkeypatch.setattr(cost, "models", lambda: settings)
    monkeypatch.setattr(cost, "SIZES", (2_000,))
    monkeypatch.setattr(cost, "TENSORS", 3)
    monkeypatch.setattr(cost, "IDLE_STEPS", 30)
    monkeypatch.setattr(cost, "PLOTTED_SIZES", (1_000, 4_000))
    monkeypatch.setattr(cost, "PLOTTED_SIZE", 500)
    monkeypatch.setattr(cost, "PLOTTED_DEPTHS", (2, 4))


@pytest.mark.usefixtures("tiny")
def test_cost_tiny_run_writes_figures_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        cost.main(["--json", str(tmp_path / "cost.json"), "--plot", str(tmp_path / "cost.png")])
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "cost.png").read_bytes().startswith(PNG)
    written = json.loads((tmp_path / "cost.json").read_text())
    assert [(row["n"], row["m"]) for row in written["against n"]] == [(1_000, 10), (4_000, 10)]
    assert [(row["n"], row["m"]) for row in written["against m"]] == [(500, 2), (500, 4)]
    for row in written["update"] + written["against n"] + written["against m"]:
        assert row["floor_ms"] == pytest.approx((row["m"] + 1.5) * row["copy_ms"])
        assert row["update_over_floor"] == pytest.approx(row["update_ms"] / row["floor_ms"])
        assert row["update_ms"] > row["gram_ms"] > 0 < row["push_ms"]
    (model,) = written["models"]
    assert model["parameters"] == 4
    # two losses an attempt, and one more in each of the first two: six attempts in seven cycles
    assert model["losses"] == pytest.approx((6 * 2 + 2) / (6 * cost.STEPS))
    assert model["floor"] > 0
    (idle,) = written["idle step"]
    assert (idle["tensors"], idle["added_us"] > 0) == (3, True)
    assert "update_over_floor" in capsys.readouterr().out


def test_sizes_that_fit_beyond_memory_leaves_out() -> None:
    assert cost.sizes_that_fit([1_000, 10**15], 10, CPU) == [1_000]


def test_exponent_of_power_law_is_exact() -> None:
    rows: list[cost.Row] = [{"n": n, "update_ms": 3e-6 * n**1.25} for n in (10, 10**6, 10**7)]
    assert cost.exponent(rows, "update_ms") == pytest.approx(1.25)


def test_in_trainer_tiny_run_writes_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (nn.Linear(3, 1), lambda: (torch.randn(8, 3), torch.randn(8, 1)), mse_loss, 3)
    monkeypatch.setattr(in_trainer, "models", lambda: {"a line": line})
    monkeypatch.setattr(in_trainer, "TURNS", 1)
    threads = torch.get_num_threads()
    try:
        in_trainer.main(["--json", str(tmp_path / "in_trainer.json")])
    finally:
        torch.set_num_threads(threads)
    (row,) = json.loads((tmp_path / "in_trainer.json").read_text())["in a Trainer"]
    assert row["step_ms"] > 0
    assert min(row["AndersonCallback"], row["callback that does nothing"]) > -1


@pytest.mark.slow
def test_unseen_short_comparison_writes_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_here(command: list[str], **_: Any) -> None:
        assert command[:3] == [sys.executable, "-m", compare.__name__]
        monkeypatch.setattr(sys, "argv", command[2:])
        compare.main()

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(unseen, "subprocess", SimpleNamespace(run=run_here))
    unseen.main([str(tmp_path), "--only", "Waves", "--seeds", "1", "--jobs", "0", "--epochs", "4"])
    kept = json.loads((tmp_path / "results.json").read_text())
    row = kept["problems"]["Waves"]
    assert row["steps"] == 48
    assert row["accepted"].endswith(" of 2")
    assert 0.2 < float(row["best, over that of plain"].split(";")[0]) < 5
    assert kept["versions"]["torch"]
    table = (tmp_path / "table.md").read_text()
    assert "| Waves | 48 |" in table
    assert f"| {row['outcome']} |" in table


def test_full_batch_without_an_attempt_is_plain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.linspace(-1, 1, 16).reshape(-1, 1)
    monkeypatch.setattr(full_batch, "tables", lambda: {"a parabola": (x, x.square())})
    options = '{"accelerate_every_n_steps": 1000}'
    full_batch.main(["--seeds", "1", "--steps", "20", "--options", options, "{}"])
    never, default = capsys.readouterr().out.splitlines()[-2:]
    assert never == f"{options}: 1.000 (one standard error 0%)"
    assert default.startswith("{}: ")


def test_full_batch_images_tiny_run_compares_with_the_tuned_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, classes = torch.randn(24, 3, 16, 16), torch.arange(24) // 3
    monkeypatch.setattr(full_batch_images, "cifar10", lambda _: (images, classes))
    monkeypatch.setattr(full_batch_images, "IMAGES", 8)
    rates = {"SGD": (batch_sizes.momentum, (1e-4, 1e-2))}  # the second is the tuned one
    monkeypatch.setattr(full_batch_images, "OPTIMIZERS", rates)
    command = [str(tmp_path / "runs.jsonl"), "--seeds", "1", "--steps", "15"]
    full_batch_images.main(command)
    table = capsys.readouterr().out
    # no extrapolation within 15 steps: the accelerated run is the plain one
    assert "| SGD | 0 | 0.01, 0.01 | 1.00 | 1.00 | 0 of 0 |" in table
    runs = (tmp_path / "runs.jsonl").read_text()
    full_batch_images.main(command)
    assert (tmp_path / "runs.jsonl").read_text() == runs
    assert capsys.readouterr().out == table


def test_unseen_every_problem_is_validated_at_its_end() -> None:
    names = [problem.module.__name__ for problem in unseen.PROBLEMS]
    assert len(set(names)) == len(names) == 18
    for problem in unseen.PROBLEMS:
        assert problem.epochs % problem.validated_every == 0  # the last epoch is validated


def curve(
    problem: str, variant: str, values: list[float], *, accepted: str | None
) -> dict[str, Any]:
    costs = [10.0 * (k + 1) * (1.1 if accepted else 1.0) for k in range(len(values))]
    return {
        **{"problem": problem, "variant": variant, "seed": 0, "accepted": accepted},
        **{"cost": costs, "value": values, "loss": values, "average on": 0.5},
    }


def test_ablation_table_compares_best_validation_at_equal_cost() -> None:
    runs = [
        curve("Waves", "plain", [4.0, 2.0], accepted=None),
        curve("Waves", "default", [2.0, 0.5], accepted="3"),
    ]
    # plain's whole cost is 20; the accelerated run is at 11 and 22 then, and linear between
    assert ablation.best_within(runs[1], 20.0) == pytest.approx(2.0 - 1.5 * 9 / 11)
    row = ablation.table(runs, ["default"]).splitlines()[2]
    assert row.startswith("| default | 0.386 |")
    assert row.endswith("| 1 / 0 of 1 | 3 |")


def test_criterion_table_reports_late_divergence_and_share() -> None:
    runs = [
        curve("WineAdam", "plain", [4.0, 2.0], accepted=None),
        curve("WineAdam", "textbook | always", [2.0, 6.0], accepted="3"),
    ]
    row = next(line for line in criterion.table(runs).splitlines() if "always" in line)
    assert row == "| always | 1.00 (3; 50%) | 1.000 | 3 |"


def test_batch_sizes_tiny_run_writes_table_and_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def samples(seed: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 7, generator=generator)
        return x, x.sum(1, keepdim=True), x, x.sum(1, keepdim=True)

    problem = batch_sizes.PROBLEMS["admissions"]._replace(data=samples, steps=100, sizes=(8, 64))
    monkeypatch.setattr(
        batch_sizes, "PROBLEMS", {"admissions": problem, "images": problem, "text": problem}
    )
    monkeypatch.setattr(batch_sizes, "VARIANTS", {"plain": {}, "anderson": {}})
    runs = [
        batch_sizes.run(name, size, variant, 0)
        for name in ("admissions", "images")
        for size in (8, 64)
        for variant in ("plain", "anderson")
    ]
    summary = batch_sizes.summarize(runs)
    assert [row["size"] for row in summary[:4]] == [8, 8, 64, 64]
    assert summary[0]["training loss"] == 1.0
    assert summary[0]["rsd"] > summary[2]["rsd"]  # fewer samples a step are noisier
    assert batch_sizes.table(summary).count("\n") == 2 + len(summary)
    batch_sizes.draw(tmp_path / "batch_sizes.png", summary)
    assert (tmp_path / "batch_sizes.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", sorted(pinns.PROBLEMS.keys() - {"AllenCahn", "Burgers"}))
def test_solution_of_pinn_satisfies_its_equation(name: str) -> None:
    problem = pinns.PROBLEMS[name](0, interior=50, border=20)
    points = problem.inside.detach().double().requires_grad_()
    residual = problem.residual(problem.solution(points), points)
    assert float(residual.detach().abs().max()) < 1e-10


def test_optimizer_matrix_run_spends_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_matrix, "BUDGET", 45)
    found = [
        optimizer_matrix.run("Poisson", name, 1e-3, name == "Adam", 0)
        for name in ("Adam", "Adam, then L-BFGS")
    ]
    assert found[0]["accepted"][1] == 2
    assert all(45 <= one["cost"] < 70 and 0 < one["error"] < 10 for one in found)


def test_batch_sizes_transformer_sees_only_earlier_bytes() -> None:
    torch.manual_seed(0)
    model, x = batch_sizes.Transformer().eval(), torch.randint(128, (2, 20))
    changed = x.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 128
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().amax(dim=(0, 2)).min() > 1e-4
    inputs, following, *_ = batch_sizes.text(0)
    assert torch.equal(inputs[:, 1:], following[:, :-1])
