"""Ctrl-C: where the run is, and the command that goes on with it."""

import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning
import pytest

from lightning_stableaa.recipes.plots import read_metrics
from lightning_stableaa.recipes.train import main
from tests.recipes.conftest import SMALL, Command
from tests.recipes.test_preemption import notice

OPTIONS = [*SMALL["burgers2d"], "trainer.max_steps=12", "pictures=false", "logger=csv"]


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """As in a terminal; a job in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("step", "begins"), [(3, "from the beginning"), (7, r"from its checkpoint \w+\.ckpt")]
)
def test_interrupt_names_command_that_resumes(
    step: int, begins: str, command: Command, empty_folder: Path
) -> None:
    interrupt = notice(signal.SIGINT, "after backward", step)
    sentence = command(main, *OPTIONS, "run_name=mine", *interrupt, code=130).splitlines()[-1]
    folder = empty_folder / "runs/burgers2d/mine"
    pattern = rf"stableaa-train: interrupted; the run is in {folder}, and goes on {begins} with: "
    assert re.match(pattern, sentence)

    _, *options = shlex.split(sentence.partition(" with: ")[2])
    command(main, *(one for one in options if one not in interrupt))
    assert read_metrics(folder / "metrics.csv")["train/loss"].steps.tolist() == [*range(12)]


class EndedSteps(lightning.Callback):
    steps: ClassVar[list[int]] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any, **__: Any) -> None:
        self.steps.append(trainer.global_step)


def test_interrupt_within_a_batch_lets_it_end(command: Command) -> None:
    EndedSteps.steps.clear()
    ended = f"+callbacks.ended={{_target_: {__name__}.EndedSteps}}"
    command(main, *OPTIONS, ended, *notice(signal.SIGINT, "after backward", 3), code=130)
    assert EndedSteps.steps == [1, 2, 3, 4]  # the fourth batch made its step


def test_interrupt_before_training_is_one_sentence(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lightning_stableaa.recipes.train._train_from_command_line",
        lambda: signal.raise_signal(signal.SIGINT),
    )
    assert command(main, *OPTIONS, code=130) == (
        "stableaa-train: interrupted; nothing was written\n"
    )
