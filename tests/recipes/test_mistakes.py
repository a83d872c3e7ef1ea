"""A user's mistake ends in one sentence that names the option, and leaves nothing behind."""

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.mistakes import check_options
from lightning_stableaa.recipes.train import main
from tests.recipes.conftest import SMALL

ADMISSIONS = ["recipe=admissions_mlp"]
BURGERS = SMALL["burgers2d"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    lightning_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = lightning_log.level
    yield tmp_path
    lightning_log.setLevel(level)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], r"recipe is not given; choose one of .*admissions_mlp.*, as in recipe=admissions_mlp"),
        (
            ["recipe=burger2d"],
            r"recipe=burger2d: there is no such choice; did you mean burgers2d\?",
        ),
        (
            [*ADMISSIONS, "optimizer=adm"],
            r"optimizer=adm: there is no such choice; did you mean adam\?",
        ),
        (
            [*ADMISSIONS, "trainer.max_stps=4"],
            r"trainer.max_stps: there is no such option; did you mean max_steps\?",
        ),
        ([*ADMISSIONS, "sed=4"], r"sed: there is no such option; did you mean seed\?"),
        (
            [*ADMISSIONS, "callbacks.anderson.histroy_depth=5"],
            r"callbacks.anderson.histroy_depth: there is no such option; "
            r"did you mean history_depth\?",
        ),
        (
            [*ADMISSIONS, "+optimizer.betas=[0.9,0.99]"],
            r"optimizer.betas: there is no such option; choose one of .*momentum.*",
        ),
        (
            [*ADMISSIONS, "trainer.max_steps"],
            r"trainer.max_steps: options are written as name=value, lists as name=\[1,2\]",
        ),
        ([*ADMISSIONS, "trainer.max_steps=abc"], r"trainer.max_steps=abc: expected int"),
        ([*ADMISSIONS, "optimizer.lr=fast"], r"optimizer.lr=fast: expected float or Tensor"),
        ([*ADMISSIONS, "data.batch_size=2.5"], r"data.batch_size=2.5: expected int"),
        ([*ADMISSIONS, "data.csv=3"], r"data.csv=3: expected str or null"),
        ([*ADMISSIONS, "seed=-1"], r"seed: -1 is not in bounds, .*"),
        ([*ADMISSIONS, "threads=0"], r"threads: .*positive.*"),
        ([*ADMISSIONS, "model.activation=cos"], r"model.activation=cos: expected 'relu' or 'tanh'"),
        (
            [*ADMISSIONS, "model.widths=[7]"],
            r"module.network: widths must be two or more positive integers, got \[7\]",
        ),
        ([*ADMISSIONS, "data.batch_size=0"], r"data: batch_size must be >= 1, got 0"),
        (
            [*ADMISSIONS, "data.validation_share=1"],
            r"data: validation_share must lie in \(0, 1\), got 1",
        ),
        (
            [*ADMISSIONS, "callbacks.anderson.history_depth=1"],
            r"callbacks.anderson: history_depth must be >= 2, got 1",
        ),
        (
            [*ADMISSIONS, "resume_from=last.ckpt"],
            r"resume_from=last.ckpt: there is no such checkpoint file",
        ),
        (
            [*ADMISSIONS, "data.csv=table.csv"],
            r"data.csv=table.csv: No such file or directory; give the path of Admission_.*csv",
        ),
        (
            [*ADMISSIONS, "trainer.accelerator=abacus"],
            r"trainer: .*accelerator='abacus'.* Available names are: .*",
        ),
        ([*BURGERS, "optimizer.lr=-1"], r"optimizer: Invalid learning rate: -1"),
        (
            [*BURGERS, "scheduler=warmup_cosine", "scheduler.warmup_share=2"],
            r"scheduler: warmup_share must .*, got 2",
        ),
        (
            [
                *BURGERS,
                "optimizer._target_=torch.optim.LBFGS",
                "~optimizer.betas",
                "~optimizer.weight_decay",
            ],
            r"callbacks: optimizer=LBFGS is not supported by AndersonCallback: .*",
        ),
        (
            [*BURGERS, "trainer.max_steps=5", "callbacks.best.monitor=val/loss"],
            r".*ModelCheckpoint\(monitor='val/loss'\).*'val/relative_l2'.*",
        ),
    ],
    ids=lambda value: " ".join(value[-1:]) if isinstance(value, list) else "",
)
def test_mistake_is_one_sentence(
    arguments: list[str],
    sentence: str,
    empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["stableaa-train", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert re.fullmatch(f"stableaa-train: {sentence}", errors.splitlines()[-1]), errors
    assert list(empty_folder.iterdir()) == []


def test_success_names_the_run_folder(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["trainer.max_steps=2", "trainer.val_check_interval=1", "callbacks=none"]
    monkeypatch.setattr(sys, "argv", ["stableaa-train", *BURGERS, *options])
    main()
    (folder,) = (empty_folder / "runs/burgers2d").iterdir()
    assert capfd.readouterr().out.splitlines()[-1] == f"everything about this run: {folder}"


class Target:
    def __init__(self, pair: tuple[float, float], name: str = "a", share: float = 0.5) -> None: ...


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pair": [1, 2], "share": 1}, None),
        ({"pair": [1, 2], "share": True}, "at.share=True: expected float"),
        ({"pair": 1}, "at.pair=1: expected tuple\\[float, float\\]"),
        ({"name": ["a"]}, "at.name=\\['a'\\]: expected str"),
        ({"name": None}, "at.name=None: expected str"),
        ({"nme": "a"}, "at.nme: there is no such option; did you mean name?"),
    ],
)
def test_options_are_compared_with_annotations(values: dict, message: str | None) -> None:
    config = {"at": {"_target_": f"{__name__}.Target", **values}}
    if message is None:
        check_options(config)
    else:
        with pytest.raises(UserError, match=message):
            check_options(config)
