"""A user error ends in one sentence that names the option, and leaves nothing behind."""

import contextlib
import enum
import typing
from pathlib import Path

import pytest
import torch

from lightning_stableaa.recipes import compare, train
from lightning_stableaa.recipes.cli_errors import check_options
from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.train import main
from tests.recipes.conftest import SMALL, Command, Refuses
from tests.recipes.test_files import no_file_longer_than

ADMISSIONS = ["recipe=admissions_mlp"]
BURGERS = [*SMALL["burgers2d"], "trainer.max_steps=2", "trainer.val_check_interval=1"]
BURGERS100D = ["recipe=burgers100d", "trainer.max_steps=2"]
LBFGS = ["optimizer._target_=torch.optim.LBFGS", "~optimizer.betas", "~optimizer.weight_decay"]

# (override of a small burgers2d run, sentence)
CALLBACKS = [
    ("callbacks.anderson.relaxation=2", r"callbacks.anderson: relaxation must be in .*, got 2.0"),
    ("callbacks.anderson.regularization=-1", r".*regularization must be finite and >= 0, got -1.0"),
    ("callbacks.anderson.store_every_n_steps=7", r".*must be a multiple of .* \(7\), got 20"),
    ("callbacks.anderson.safeguard=maybe", r".*safeguard=maybe: expected 'loss' or 'none'"),
    ("callbacks.anderson.history_device=tpuu", r"callbacks.anderson: history_device must be .*"),
    ("callbacks.anderson.max_extrapolation=0", r".*must be > 0 \(inf for no cap\), got 0.0"),
    ("callbacks.anderson.max_extrapolation=nan", r".*max_extrapolation=nan: expected a number"),
    ("callbacks.anderson.history_depth=many", r".*history_depth=many: expected int"),
    ("callbacks.anderson.histroy_depth=5", r".*no such option; did you mean history_depth\?"),
    ("callbacks.anderson=3", r"callbacks.anderson=3: expected a dict with a _target_, .*"),
    (
        "callbacks.anderson._target_=lightning_stableaa.Anderson",
        r"callbacks.anderson: .*Anderson.*",
    ),
    ("+callbacks.mine.x=3", r"callbacks.mine=\{'x': 3\}: expected a dict with a _target_, .*"),
    (
        "+callbacks.mine._target_=torch.nn.Identity",
        r".*mine._target_: expected Callback .*",
    ),
    ("callbacks.best.monitor=val/loss", r".*ModelCheckpoint\(monitor='val/loss'\).*"),
    ("stochastic=maybe", r"stochastic=maybe: expected bool or 'auto'"),
]
RUN = [
    ("seed=abc", r"seed=abc: expected int"),
    ("seed=-1", r"seed=-1: expected an integer from 0 to 4294967295, .*"),
    ("sed=4", r"sed: there is no such option; did you mean seed\?"),
    ("threads=0", r"threads=0: expected at least 1"),
    (
        "trainer.devices=4096",
        r"trainer.devices=4096: .* CPU of \d+ cores would wait .* or add oversubscribe=true",
    ),
    ("oversubscribe=perhaps", r"oversubscribe=perhaps: expected bool"),
    ("resume_from=last.ckpt", r"resume_from=last.ckpt: there is no such checkpoint file"),
    ("resume_from=notes.txt", r"resume_from=notes.txt: is no checkpoint, or not a complete one"),
    ("run_name=..", r"run_name=\.\.: expected the name of a folder below runs/RECIPE"),
    ("run_folder=notes.txt", r"run_folder=notes.txt: is a file; choose another folder"),
    ("run_folder=notes.txt/run", r"run_folder=notes.txt/run: Not a directory; .*"),
    ("run_folder=/proc/run", r"run_folder=/proc/run: .*; make room or choose .*"),
    ("trainer.precision=half", r"trainer.precision=half: expected 64 or .*"),
    ("trainer.max_stps=4", r"trainer.max_stps: .* did you mean max_steps\?"),
    ("trainer.max_steps", r"trainer.max_steps: options are written as name=value, lists as .*"),
    ("trainer.accelerator=abacus", r"trainer: .*accelerator='abacus'.* names are: .*"),
    ("trainer.accumulate_grad_batches=0", r".*accumulate_grad_batches=0: expected at least 1"),
    ("trainer.max_epochs=0", r"trainer.max_epochs=0: expected at least 1, or -1 for no limit"),
    ("trainer.max_steps=0", r"trainer.max_steps=0: expected at least 1, or -1 for no limit"),
    ("trainer.devices=0", r"trainer.devices=0: expected at least 1, or -1 for all"),
    ("trainer.num_nodes=-1", r"trainer.num_nodes=-1: expected at least 1"),
    ("+trainer.limit_train_batches=0", r"trainer.limit_train_batches=0: expected more than 0"),
    ("strategy=ddpp", r"strategy=ddpp: there is no such choice; did you mean ddp\?"),
    ("logger=neptune", r"logger=neptune: there is no such choice; choose one of csv, .*"),
    ("logger=wandb", r"logger.wandb: No API key configured. .*"),
    ("+logger.mine._target_=torch.nn.Identity", r"logger.mine._target_: expected Logger .*"),
    ("--nosuchflag", r"--nosuchflag: options are written without dashes, as in .*"),
    ("--config-dir=nowhere", r"Additional config directory '.*nowhere' not found"),
    ("--config-name=trian", r"--config-name=trian: there is no such configuration"),
    ("optimizer.lr=[1", r"optimizer.lr=\[1: options are written as name=value, .*"),
    ("optimizer.lr=1e-3,1e-2", r"optimizer.lr=1e-3,1e-2: several values are a sweep, .* -m; .*"),
    ("optimizer.lr=${nope}", r"optimizer.lr: Interpolation key 'nope' not found.*"),
]
PARTS = [
    ("scheduler=linear", r"scheduler=linear: there is no such choice; choose one of .*"),
    ("model=null", r"Config group override must be a string or a list. Got NoneType"),
    ("~optimizer", r"optimizer=.*: expected a dict with a _target_, .*"),
    (
        "module._target_=no.such.Module",
        r"module._target_=.*: there is no module no; .*",
    ),
    (
        "module._target_=lightning.LightningModule",
        r"module._target_=.* has no monitor; with recipe=own, name .*",
    ),
    ("model.widths=[2,5.5,1]", r".*must be two or more positive integers, got \[2, 5.5, 1\]"),
    ("model.widths=[3,5,1]", r".*the data have 2 inputs and 1 outputs.*=\[2,...,1\]"),
    ("model.activation=cos", r"model.activation=cos: expected 'relu' or 'tanh'"),
    ("model._target_=builtins.dict", r"module: network must be a torch.nn.Module, .*"),
    ("data.interior_points=0", r"data\.interior_points=0: expected at least 1"),
    ("data.grid=[6]", r"data.grid=\[6\]: expected tuple\[int, int\]"),
    ("data._target_=torch.nn.Identity", r"data._target_: expected LightningDataModule .*"),
    ("optimizer=adm", r"optimizer=adm: there is no such choice; did you mean adam\?"),
    ("optimizer.lr=-1", r"optimizer.lr=-1: expected a finite number >= 0"),
    ("optimizer.lr=nan", r"optimizer.lr=nan: expected a number"),
    ("optimizer.lr=fast", r"optimizer.lr=fast: expected float or Tensor"),
    ("optimizer.betas=[0.9,2]", r"optimizer: Invalid beta parameter at index 1: 2"),
    ("+optimizer.momentum=0.9", r"optimizer.momentum: there is no such option; choose one .*"),
    ("optimizer._target_=torch.optim.Adamm", r"optimizer._target_=torch.optim.Adamm: .*"),
    ("optimizer._target_=torch.nn.Identity", r"optimizer._target_: expected Optim.*"),
]
if not torch.cuda.is_available():
    RUN.append(("trainer=gpu", r"trainer.accelerator=gpu: torch .* sees no GPU here; .*"))
# (whole command line, sentence)
LINES = [
    (
        [*BURGERS, "run_name=a", "run_folder=b"],
        r"run_name=a and run_folder=b: a folder says where the run goes by itself; give one .*",
    ),
    (
        [*BURGERS, "resume_from=auto", "evaluate=a.ckpt"],
        r"evaluate=a.ckpt trains nothing, and resume_from=auto goes on training: give one of them",
    ),
    ([], r"recipe is not given; choose one of .*admissions_mlp.*, as in recipe=admissions_mlp"),
    (["recipe=burger2d"], r"recipe=burger2d: there is no such choice; did you mean burgers2d\?"),
    ([*ADMISSIONS, "data.batch_size=0"], r"data\.batch_size=0: expected at least 1"),
    (
        [*ADMISSIONS, "data.validation_share=1"],
        r"data\.validation_share=1: expected a number between 0 and 1",
    ),
    ([*ADMISSIONS, "data.csv=table.csv"], r"data.csv=table.csv: No such file .*; give the path .*"),
    (
        [*BURGERS, "scheduler=warmup_cosine", "scheduler.warmup_share=2"],
        r"scheduler: warmup_share must .*, got 2",
    ),
    (
        [*BURGERS, "scheduler=cosine", "scheduler._target_=torch.nn.Identity"],
        r"scheduler._target_: expected LRScheduler .*",
    ),
    ([*BURGERS, "--epochs", "5"], r"--epochs: options are written without dashes, as in .*"),
    (["--recipe=burgers2d"], r"--recipe=burgers2d: options are written without dashes, .*"),
    ([*BURGERS, *LBFGS], r"callbacks: optimizer=LBFGS is not supported by AndersonCallback: .*"),
    (
        [*BURGERS, "callbacks=none", "callbacks.anderson.history_depth=4"],
        r"callbacks.anderson: there is no such option; choose one of .*",
    ),
    (
        [*BURGERS, "callbacks=paper", "callbacks.smoothing.average_window=99"],
        r"callbacks: average_window must be <= store_every_n_steps \(10\), got 99",
    ),
    (
        [*BURGERS, "callbacks=paper", "callbacks.smoothing.rsd=max"],
        r"callbacks.smoothing: rsd='max' is defined on iterates only, got of='updates'; .*",
    ),
    ([*BURGERS100D, "model.widths=[100,5,1]"], r"module.network: .*set .*=\[101,...,1\]"),
    ([*BURGERS100D, "model.activation=relu"], r"module: .* Tanh, .*, Linear; got .*ReLU.*"),
    (
        [*BURGERS100D, "module.laplacian=sampled", "module.probes=200"],
        r"module: probes must be in 1 .. 100 for sampled dimensions, got 200",
    ),
]

# A recipe of the user's own, as a file.
HEADER = "# @package _global_\ndefaults:\n  - burgers2d\n  - _self_\n"
FILES = [
    ("a: [1,\nb: 2", r".*mine.yaml, line 2: expected ',' or '\]', but got .*"),
    ("seed: 3\nseed: 4\n", r".*mine.yaml, line 2: found duplicate key seed"),
    ("", r"data is not given; choose one of .*"),
    (HEADER + "sed: 3\n", r"sed: there is no such option; did you mean seed\?"),
    (HEADER + "optimizer: fast\n", r"optimizer=fast: expected a dict with a _target_, .*"),
    (HEADER + "data: {interior: 3}\n", r"data.interior: there is no such option; .*"),
]


@pytest.fixture(autouse=True)
def notes(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_folder / "notes.txt").write_text("not a checkpoint")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [*(([*BURGERS, option], text) for option, text in [*CALLBACKS, *RUN, *PARTS]), *LINES],
    ids=lambda value: " ".join(value[-1:]) if isinstance(value, list) else "",
)
def test_command_user_error_is_one_sentence(
    arguments: list[str], sentence: str, refuses: Refuses
) -> None:
    refuses(main, arguments, sentence)


@pytest.mark.parametrize(("recipe", "sentence"), FILES)
def test_command_error_in_file_is_one_sentence(
    recipe: str, sentence: str, tmp_path_factory: pytest.TempPathFactory, refuses: Refuses
) -> None:
    path = tmp_path_factory.mktemp("mine") / "recipe" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(recipe)
    refuses(main, [f"--config-dir={path.parent.parent}", "recipe=mine"], sentence)


def test_command_full_disk_is_one_sentence(refuses: Refuses) -> None:
    # room for the configuration, and not for a checkpoint
    with no_file_longer_than(8000):
        options = [*BURGERS, "logger=csv", "pictures=false"]
        refuses(main, options, r"run_folder=.*; make room .*choose another folder")


def test_command_read_only_folder_is_one_sentence(
    refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/proc")
    refuses(main, BURGERS, r"current folder /proc: .*; change to one that can be written to")
    refuses(main, ["-m", *BURGERS], r"current folder /proc: .*; change to one that .*")


def test_command_success_names_run_folder(
    command: Command, empty_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header, *_, last = command(main, *BURGERS, "trainer.max_steps=30").splitlines()
    (folder,) = (empty_folder / "runs/burgers2d").iterdir()
    assert header == f"recipe burgers2d, callbacks stable_aa, seed 0, run folder {folder}"
    assert last == f"everything about this run: {folder}"
    assert [text.partition(":")[0] for text in caplog.messages] == ["Anderson acceleration"]


@pytest.mark.parametrize("module", [train, compare])
@pytest.mark.parametrize("option", ["--help", "--cfg=job"])
def test_command_config_without_recipe_is_shown(
    module: typing.Any, option: str, command: Command, empty_folder: Path
) -> None:
    assert "store_every_n_steps: 10" in command(module.main, *option.split("="))
    assert not list(empty_folder.glob("runs")) + list(empty_folder.glob("comparisons"))


class Sized(typing.Protocol):
    size: int


class Kind(enum.Enum):
    ONE = 1


class Target:
    def __init__(self, pair: tuple[float, float], name: str = "a", share: float = 0.5) -> None: ...


class Unannotated:
    def __init__(self, width, path: Path, kind: Kind, sized: Sized) -> None: ...  # type: ignore[no-untyped-def]


@pytest.mark.parametrize(
    ("target", "values", "message"),
    [
        ("Unannotated", {"width": 3, "path": "a", "kind": "ONE", "sized": [1]}, None),
        ("Target", {"pair": [1, 2], "share": 1}, None),
        ("Target", {"pair": [1, 2], "share": True}, "at.share=True: expected float"),
        ("Target", {"pair": 1}, "at.pair=1: expected tuple\\[float, float\\]"),
        ("Target", {"name": ["a"]}, "at.name=\\['a'\\]: expected str"),
        ("Target", {"name": None}, "at.name=None: expected str"),
        ("Target", {"nme": "a"}, "at.nme: there is no such option; did you mean name?"),
    ],
)
def test_options_values_are_checked_against_annotations(
    target: str, values: dict[str, typing.Any], message: str | None
) -> None:
    config = {"at": {"_target_": f"{__name__}.{target}", **values}}
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_options(config)
