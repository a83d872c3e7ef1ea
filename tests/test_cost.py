"""The measurement of costs: a tiny run of it writes figures and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from benchmarks import cost, in_trainer

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
def test_figures_and_picture_are_written(
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
    assert (model["parameters"], model["losses"]) == (4, pytest.approx(2 / cost.STEPS))
    assert model["floor"] > 0
    (idle,) = written["idle step"]
    assert (idle["tensors"], idle["added_us"] > 0) == (3, True)
    assert "update_over_floor" in capsys.readouterr().out


def test_sizes_beyond_the_memory_are_left_out() -> None:
    assert cost.sizes_that_fit([1_000, 10**15], 10, CPU) == [1_000]


def test_the_exponent_is_that_of_a_power_law() -> None:
    rows: list[cost.Row] = [{"n": n, "update_ms": 3e-6 * n**1.25} for n in (10, 10**6, 10**7)]
    assert cost.exponent(rows, "update_ms") == pytest.approx(1.25)


def test_the_callback_is_timed_in_a_trainer(
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
