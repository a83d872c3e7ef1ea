"""A user's mistake ends in one sentence that names the option, and leaves nothing behind."""

import contextlib
import enum
import os
import sys
import typing
from pathlib import Path

import pytest

from lightning_stableaa.recipes.compare import main as compare_main
from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.mistakes import check_options
from lightning_stableaa.recipes.train import main
from tests.recipes.conftest import SMALL, Refuses
from tests.recipes.test_files import no_file_longer_than

ADMISSIONS = ["recipe=admissions_mlp"]
BURGERS = SMALL["burgers2d"]
FAST = [*BURGERS, "trainer.max_steps=2", "trainer.val_check_interval=1"]
BURGERS100D = ["recipe=burgers100d", "trainer.max_steps=2"]
SMOOTH = [*FAST, "callbacks=stable_aa_smoothing"]

# Options of the callbacks.
ENGINE = [
    (
        [*FAST, "callbacks.anderson.relaxation=2"],
        r"callbacks.anderson: relaxation must be in \(0, 1\], got 2.0",
    ),
    (
        [*FAST, "callbacks.anderson.regularization=-1"],
        r"callbacks.anderson: regularization must be finite and >= 0, got -1.0",
    ),
    (
        [*FAST, "callbacks.anderson.regularization=[]"],
        r"callbacks.anderson: regularization must hold at least one value, got an empty list",
    ),
    (
        [*FAST, "callbacks.anderson.regularization=[1,a]"],
        r"callbacks.anderson: regularization must be a number, got 'a'",
    ),
    (
        [
            *FAST,
            "callbacks.anderson.safeguard=none",
            "callbacks.anderson.regularization=[1e-3,1e-2]",
        ],
        r"callbacks.anderson: regularization must be a single value when safeguard is 'none', .*",
    ),
    (
        [*FAST, "callbacks.anderson.store_every_n_steps=7"],
        r"callbacks.anderson: accelerate_every_n_steps must be a multiple of .* \(7\), got 20",
    ),
    (
        [*FAST, "callbacks.anderson.safeguard=maybe"],
        r"callbacks.anderson.safeguard=maybe: expected 'loss' or 'none'",
    ),
    (
        [*FAST, "callbacks.anderson.history_device=tpuu"],
        r"callbacks.anderson.history_device: .*device.*",
    ),
    (
        [*FAST, "callbacks.anderson.history_device=mps"],
        r"callbacks.anderson.history_device: .*",
    ),
    (
        [*FAST, "callbacks.anderson.max_extrapolation=nan"],
        r"callbacks.anderson: max_extrapolation must be > 0 \(inf for no cap\), got nan",
    ),
    (
        [*FAST, "callbacks.anderson.warmup_steps=-3"],
        r"callbacks.anderson: warmup_steps must be >= 0, got -3",
    ),
    (
        [*FAST, "callbacks.anderson.history_depth=many"],
        r"callbacks.anderson.history_depth=many: expected int",
    ),
    (
        [*FAST, "callbacks=none", "callbacks.anderson.history_depth=4"],
        r"callbacks.anderson: there is no such option; choose one of .*",
    ),
    ([*FAST, "callbacks.anderson=3"], r"callbacks.anderson=3: expected a dict with a _target_, .*"),
    (
        [*FAST, "callbacks.anderson._target_=lightning_stableaa.Anderson"],
        r"callbacks.anderson._target_=lightning_stableaa.Anderson: .*importable.*",
    ),
    (
        [*FAST, "+callbacks.mine.x=3"],
        r"callbacks.mine=\{'x': 3\}: expected a dict with a _target_, the class to build",
    ),
    (
        [*SMOOTH, "callbacks.smoothing.average_window=1"],
        r"callbacks.smoothing: average_window must be >= 2, got 1",
    ),
    (
        [*SMOOTH, "callbacks.smoothing.average_window=99"],
        r"callbacks: average_window must be <= store_every_n_steps \(10\), got 99",
    ),
    (
        [*SMOOTH, "callbacks.smoothing.rsd=max", "callbacks.smoothing.of=updates"],
        r"callbacks.smoothing: rsd='max' is defined on iterates only, got of='updates'; .*",
    ),
    (
        [
            *SMOOTH,
            "callbacks.smoothing.apply_to=weights",
            "callbacks.anderson.apply_to=evaluation",
        ],
        r"callbacks: smoothing.apply_to='weights' changes training, got apply_to='evaluation'; .*",
    ),
]

# Options of the run and of the Trainer.
RUN = [
    ([*FAST, "seed=abc"], r"seed=abc: expected int"),
    ([*FAST, "seed=null"], r"seed=None: expected int"),
    ([*FAST, "threads=1.5"], r"threads=1.5: expected int or null"),
    ([*FAST, "pictures=maybe"], r"pictures=maybe: expected bool"),
    ([*FAST, "resume_from=3"], r"resume_from=3: expected str or null"),
    (
        [*FAST, "resume_from=notes.txt"],
        r"resume_from=notes.txt: is no checkpoint, or not a complete one",
    ),
    ([*FAST, "run_folder="], r"run_folder=: expected the path of a folder"),
    ([*FAST, "run_folder=null"], r"run_folder=None: expected the path of a folder"),
    ([*FAST, "run_folder=notes.txt"], r"run_folder=notes.txt: is a file; choose another folder"),
    ([*FAST, "run_folder=notes.txt/run"], r"run_folder=notes.txt/run: Not a directory; .*"),
    ([*FAST, "run_folder=/proc/run"], r"run_folder=/proc/run: .*; make room or choose .*"),
    ([*FAST, "trainer.precision=half"], r"trainer.precision=half: expected 64 or .*"),
    ([*FAST, "trainer.devices=-5"], r"trainer: .*should be an int > 0."),
    ([*FAST, "trainer.max_steps=-7"], r"trainer: `max_steps` must be .* You passed in -7."),
    (
        [*FAST, "trainer.gradient_clip_val=abc"],
        r"trainer.gradient_clip_val=abc: expected float or int or null",
    ),
    (
        [*FAST, "trainer.accumulate_grad_batches=0"],
        r"trainer.accumulate_grad_batches=0: expected at least 1",
    ),
    ([*FAST, "trainer.val_check_interval=0"], r"trainer.val_check_interval=0: expected at le.*"),
    ([*FAST, "+trainer.limit_val_batches=1.5"], r"trainer: .* 1.5 for limit_val_batches, .*"),
    ([*FAST, "+trainer.fast_dev_run=yes"], r"trainer.fast_dev_run=yes: expected int or bool"),
    ([*FAST, "strategy=ddpp"], r"strategy=ddpp: there is no such choice; did you mean ddp\?"),
    ([*FAST, "logger=wandb"], r"logger=wandb: there is no such choice; choose one of csv, .*"),
    (["--nosuchflag"], r"error: unrecognized arguments: --nosuchflag"),
    (["--config-dir=nowhere", *FAST], r"Additional config directory '.*nowhere' not found"),
    (["--config-name=trian"], r"--config-name=trian: there is no such configuration"),
    ([*FAST, "optimizer.lr=[1"], r"optimizer.lr=\[1: options are written as name=value, .*"),
    ([*FAST, "optimizer.lr=1e-3,1e-2"], r"Ambiguous value for argument 'optimizer.lr=.*"),
    ([*FAST, "optimizer.lr=${nope}"], r"optimizer.lr: Interpolation key 'nope' not found.*"),
]

# What the run is made of.
PARTS = [
    ([*FAST, "scheduler=linear"], r"scheduler=linear: there is no such choice; choose one of .*"),
    ([*FAST, "model=null"], r"Config group override must be a string or a list. Got NoneType"),
    ([*FAST, "~model"], r"model=.*: expected a dict with a _target_, the class to build"),
    ([*FAST, "~optimizer"], r"optimizer=.*: expected a dict with a _target_, .*"),
    ([*FAST, "module._target_=no.such.Module"], r".*Error loading 'no.such.Module'.*"),
    (
        [*FAST, "optimizer._target_=torch.optim.Adamm"],
        r"optimizer._target_=torch.optim.Adamm: .*importable from module 'torch.optim'.*",
    ),
    (
        [*FAST, "model.widths=[2,5.5,1]"],
        r"module.network: widths must be two or more positive integers, got \[2, 5.5, 1\]",
    ),
    ([*FAST, "data.interior_points=0"], r"data: interior_points must be >= 2, got 0"),
    ([*FAST, "data.grid=[6]"], r"data.grid=\[6\]: expected tuple\[int, int\]"),
    ([*FAST, "optimizer.lr=nan"], r"optimizer: Invalid learning rate: nan"),
    (
        [*FAST, "model.widths=[3,5,1]"],
        r"module.network: the data have 2 inputs and 1 outputs, got a network of widths "
        r"\[3, 5, 1\]; set model.widths=\[2,...,1\]",
    ),
    ([*FAST, "model.widths=[2,5,2]"], r"module.network: .*widths \[2, 5, 2\]; .*"),
    ([*BURGERS100D, "model.widths=[100,5,1]"], r"module.network: .*set .*=\[101,...,1\]"),
    ([*BURGERS100D, "model.activation=relu"], r"module: .* Tanh, .*, Linear; got .*ReLU.*"),
    (
        [*BURGERS100D, "module.laplacian=sampled", "module.probes=200"],
        r"module: probes must be in 1 .. 100 for sampled dimensions, got 200",
    ),
    (
        [*BURGERS100D, "module.laplacian=hutchinson", "module.probes=0"],
        r"module: probes must be >= 1, got 0",
    ),
    (
        [*FAST, "data._target_=torch.nn.Identity"],
        r"data._target_: expected LightningDataModule or a class .*, got one that builds Identity",
    ),
    (
        [*FAST, "module._target_=lightning.LightningModule"],
        r"module._target_=lightning.LightningModule: has no decisive_metric; name a class .*",
    ),
    ([*FAST, "model._target_=builtins.dict"], r"module: network must be a torch.nn.Module, .*"),
    ([*FAST, "trainer._target_=torch.nn.Identity"], r"trainer._target_: expected Trainer .*"),
    ([*FAST, "optimizer._target_=torch.nn.Identity"], r"optimizer._target_: expected Optim.*"),
    (
        [*FAST, "scheduler=cosine", "scheduler._target_=torch.nn.Identity"],
        r"scheduler._target_: expected LRScheduler .*",
    ),
    (
        [*FAST, "+callbacks.mine._target_=torch.nn.Identity"],
        r"callbacks.mine._target_: expected Callback .*",
    ),
    (
        [*FAST, "+logger.mine._target_=torch.nn.Identity"],
        r"logger.mine._target_: expected Logger .*",
    ),
    ([*FAST, "optimizer.betas=[0.9]"], r"optimizer.betas=\[0.9\]: expected tuple.*"),
    ([*FAST, "optimizer.betas=[0.9,2]"], r"optimizer: Invalid beta parameter at index 1: 2"),
    ([*FAST, "optimizer.weight_decay=-1"], r"optimizer: Invalid weight_decay value: -1"),
]

# A recipe of the user's own, as a file.
HEADER = "# @package _global_\ndefaults:\n  - burgers2d\n  - _self_\n"
FILES = [
    ("a: [1,\nb: 2", r".*mine.yaml, line 2: expected ',' or '\]', but got .*"),
    ("\tseed: 1", r".*mine.yaml, line 1: found character '\\t' that cannot start any token"),
    ("seed: 3\nseed: 4\n", r".*mine.yaml, line 2: found duplicate key seed"),
    ("", r"data is not given; choose one of .*"),
    (HEADER + "sed: 3\n", r"sed: there is no such option; did you mean seed\?"),
    (HEADER + "optimizer: fast\n", r"optimizer=fast: expected a dict with a _target_, .*"),
    (HEADER + "optimizer: {lr: '${rate}'}\n", r"optimizer.lr: Interpolation key 'rate' not .*"),
    (HEADER + "data: {interior: 3}\n", r"data.interior: there is no such option; .*"),
    (HEADER + "trainer: {max_steps: soon}\n", r"trainer.max_steps=soon: expected int"),
]


@pytest.fixture(autouse=True)
def notes(empty_folder: Path) -> None:
    (empty_folder / "notes.txt").write_text("not a checkpoint")


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
        (
            [*ADMISSIONS, "run_name=.."],
            r"run_name=\.\.: expected the name of a folder below runs/RECIPE",
        ),
        ([*ADMISSIONS, "run_name="], r"run_name=: expected the name of a folder below .*"),
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
        *ENGINE,
        *RUN,
        *PARTS,
    ],
    ids=lambda value: " ".join(value[-1:]) if isinstance(value, list) else "",
)
def test_mistake_is_one_sentence(arguments: list[str], sentence: str, refuses: Refuses) -> None:
    refuses(main, arguments, sentence)


@pytest.mark.parametrize(("recipe", "sentence"), FILES)
def test_a_mistake_in_a_file_is_one_sentence(
    recipe: str, sentence: str, tmp_path_factory: pytest.TempPathFactory, refuses: Refuses
) -> None:
    path = tmp_path_factory.mktemp("mine") / "recipe" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(recipe)
    refuses(main, [f"--config-dir={path.parent.parent}", "recipe=mine"], sentence)


def test_a_network_that_does_not_fit_the_table_is_refused(
    admissions_csv: Path, refuses: Refuses
) -> None:
    for widths in ("5, 64, 1", "7, 64, 2"):
        refuses(
            main,
            [*ADMISSIONS, f"data.csv={admissions_csv}", f"model.widths=[{widths}]"],
            rf"module.network: the data have 7 inputs and 1 outputs, got a network of widths "
            rf"\[{widths}\]; set model.widths=\[7,...,1\]",
        )


def test_a_full_disk_ends_in_one_sentence(refuses: Refuses) -> None:
    # room for the configuration, and not for a checkpoint
    with no_file_longer_than(8000):
        refuses(
            main,
            [*FAST, "logger=csv", "pictures=false"],
            r"run_folder=.*; make room .*choose another folder",
        )


def test_success_names_the_run_folder(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # a progress bar may leave its last lines for later
    options = ["callbacks=none", "callbacks.progress=null"]
    monkeypatch.setattr(sys, "argv", ["stableaa-train", *FAST, *options])
    main()
    (folder,) = (empty_folder / "runs/burgers2d").iterdir()
    assert capfd.readouterr().out.splitlines()[-1] == f"everything about this run: {folder}"


class Sized(typing.Protocol):
    size: int


class Kind(enum.Enum):
    ONE = 1


class Target:
    def __init__(self, pair: tuple[float, float], name: str = "a", share: float = 0.5) -> None: ...


class Unannotated:
    def __init__(self, width, path: Path, kind: Kind, sized: Sized) -> None: ...  # type: ignore[no-untyped-def]


@pytest.mark.parametrize("value", [8, None, [1], "a", 0.5, True])
def test_what_is_not_annotated_takes_anything(value: object) -> None:
    options = {"width": value, "path": "a/b", "kind": "one", "sized": 3}
    check_options({"at": {"_target_": f"{__name__}.Unannotated", **options}})


@pytest.mark.parametrize("main", [main, compare_main])
@pytest.mark.parametrize("option", ["--help", "--cfg=job"])
def test_what_there_is_can_be_shown_without_a_recipe(
    main: typing.Any,
    option: str,
    empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["stableaa", *option.split("=")])
    with contextlib.suppress(SystemExit):
        main()
    assert "store_every_n_steps: 10" in capfd.readouterr().out
    assert not list(empty_folder.glob("runs")) + list(empty_folder.glob("comparisons"))


@pytest.mark.parametrize("main", [main, compare_main])
def test_what_is_shown_may_be_read_to_its_first_line(
    main: typing.Any, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "argv", ["stableaa", "--help"])
    with open(writing, "w") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        with contextlib.suppress(SystemExit):
            main()


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
