"""A comparison from configuration to report, its continuation, and user errors."""

import csv
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra import initialize_config_module
from lightning.pytorch import callbacks

import lightning_stableaa
from lightning_stableaa.recipes import compare as compare_command
from lightning_stableaa.recipes.compare import compare, main
from lightning_stableaa.recipes.comparison import environment, fingerprint
from lightning_stableaa.recipes.comparison.environment import processor, versions
from lightning_stableaa.recipes.comparison.report import shorten_paths, to_json
from lightning_stableaa.recipes.comparison.runner import RESULT, Run, read_run, run_all
from lightning_stableaa.recipes.comparison.variants import Plan, make_plan
from lightning_stableaa.recipes.comparison.verdict import verdict
from lightning_stableaa.recipes.errors import UserError
from tests.helpers import own_module
from tests.recipes.conftest import SMALL, Refuses

BURGERS = [*SMALL["burgers2d"], "trainer.max_steps=40", "compare.seeds=1"]
AVERAGES = ",ema,swa" if hasattr(callbacks, "WeightAveraging") else ""  # since Lightning 2.6
ONE_RUN = ["compare.variants=[plain]", "compare.seeds=1", "compare.jobs=0"]
OWN = "tests.helpers.own_module"
MakePlan = Callable[..., Plan]


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[MakePlan]:
    """Plans a comparison as the command line does; its folder is a temporary one."""

    def plan(*overrides: str, variants: str = "plain") -> Plan:
        listed = [*overrides, f"compare.variants=[{variants}]", f"compare.folder={tmp_path}"]
        return make_plan(hydra.compose("compare", listed), listed, "title")

    with initialize_config_module("lightning_stableaa.conf", version_base="1.3"):
        yield plan


def run_here(plan: Plan) -> dict[str, Run]:
    return {run.variant: run for run in run_all(plan.jobs, processes=0)}


# every variant that changes a run in its own way, more than twenty in all with the sweep
def test_variants_each_run_has_exact_cost(plan: MakePlan) -> None:
    made = plan(
        *BURGERS,
        "callbacks.anderson.store_every_n_steps=5",
        "callbacks.anderson.accelerate_every_n_steps=10",
        variants="lbfgs,anderson_smoothing,paper,aadl,smoothing,lookahead,schedule_free,plain@3x"
        + AVERAGES,
    )
    runs = run_here(made)
    assert {name: run.error for name, run in runs.items()} == dict.fromkeys(made.variants)
    for name, run in runs.items():
        assert run.curve.disabled is None
        if name != "lbfgs":
            assert run.curve.gradients == list(range(5, 41, 5))
    # due every ten steps, from the first two residuals on: the switch of the average to the history
    # takes one cycle
    late = [0, 0, 1, 1, 2, 2, 3, 3]
    assert runs["anderson_smoothing"].curve.attempted == late
    assert runs["paper"].curve.attempted == runs["paper"].curve.accepted == late
    assert runs["aadl"].curve.attempted == [0, 1, 1, 2, 2, 3, 3, 4]
    # the losses before and after, and a second one before in the first two evaluations; no
    # candidate of a PINN is vetoed as noise
    assert runs["anderson_smoothing"].curve.loss_evaluations == [0, 0, 3, 3, 6, 6, 8, 8]
    assert runs["aadl"].curve.loss_evaluations == [0, 3, 3, 6, 6, 8, 8, 10]
    assert runs["paper"].curve.loss_evaluations == [0] * 8
    assert runs["anderson_smoothing"].curve.costs == pytest.approx(
        [5, 10, 16, 21, 27, 32, 35 + 8 / 3, 40 + 8 / 3]
    )
    assert runs["plain"].curve.attempted == [0] * 8
    assert runs["plain"].smoothing_on is None
    assert len(runs["anderson_smoothing"].rsd) == 8  # windows of five steps
    assert len(runs["smoothing"].rsd) == 4  # of ten
    assert 15 < runs["lbfgs"].curve.gradients[-1] <= 40
    ends = {run.curve.values[-1] for run in runs.values()}
    assert len(ends) >= len(runs) - 1  # the average may never have been switched on


def test_plan_names_become_settings(plan: MakePlan) -> None:
    options = ["compare.seeds=[3,5]", "callbacks.anderson.history_depth=4"]
    made = plan("recipe=admissions_mlp", *options, variants="anderson,lr_sweep,plain@3x")
    sweep = ["0.3x", "3x", "10x", "cosine", "cosine@3x", "cosine@10x"]
    assert made.variants == ["plain", "anderson", *(f"plain@{one}" for one in sweep)]
    assert [(job.seed, job.variant) for job in made.jobs] == [
        (seed, name) for seed in (3, 5) for name in made.variants
    ]
    assert (made.metric, made.mode) == ("val/mse", "min")
    by_name = {job.variant: job.settings for job in made.jobs if job.seed == 5}
    assert by_name["plain"]["data"]["seed"] == 5
    assert list(by_name["plain"]["callbacks"]) == ["recorder"]
    assert by_name["anderson"]["callbacks"]["anderson"]["history_depth"] == 4
    expected = ["recorder", "cosine", "learning_rate_multiple"]
    assert list(by_name["plain@cosine@3x"]["callbacks"]) == expected
    assert len({job.fingerprint for job in made.jobs}) == len(made.jobs)
    assert len({job.folder for job in made.jobs}) == len(made.jobs)


@pytest.mark.usefixtures("plan")
@pytest.mark.parametrize("recipe", ["admissions_mlp", "burgers2d", "_own"])
def test_paper_every_recipe_has_same_variants(recipe: str) -> None:
    options = hydra.compose("compare", ["compare=paper", f"recipe={recipe}"]).compare
    assert list(options.variants) == [
        *("plain", "textbook_aa", "textbook_aa_smoothing_always", "paper", "paper_safeguard"),
        *("anderson", "anderson_smoothing"),
    ]
    assert (options.folder, options.subfolder) == (None, "paper")


@pytest.mark.parametrize(
    ("options", "stochastic"),
    [
        (["recipe=admissions_mlp"], "auto"),
        (["recipe=burgers2d"], False),
        (["recipe=burgers100d"], True),
        (["recipe=burgers100d", "stochastic=false"], False),
        (["recipe=_own", f"compare.module={OWN}.Module", "compare.metric=val/loss"], "auto"),
    ],
)
def test_stochastic_recipe_value_reaches_callback(
    options: list[str], stochastic: bool | str, plan: MakePlan
) -> None:
    made = plan(*options, "compare.seeds=1", variants="anderson")
    assert made.jobs[1].settings["callbacks"]["anderson"]["stochastic"] == stochastic


def test_own_module_other_tree_gets_its_trainer(plan: MakePlan) -> None:
    options = ["recipe=_own", f"compare.module={OWN}.OfTheOtherTree", "compare.metric=val/loss"]
    settings = plan("compare.seeds=1", *options, variants="ema").jobs[1].settings
    assert settings["trainer"]["_target_"] == "pytorch_lightning.Trainer"
    target = settings["callbacks"]["ema"]["_target_"]
    assert target == "pytorch_lightning.callbacks.EMAWeightAveraging"
    assert settings["data"] is None


def own(module: str, folder: Path, *, data: str = "Data", seeds: int, epochs: int) -> list[str]:
    """Options of a comparison of a module that is no recipe, in this process."""
    return [
        "recipe=_own",
        f"compare.module={OWN}.{module}",
        f"compare.datamodule={OWN}.{data}",
        "compare.metric=val/loss",
        f"compare.folder={folder}",
        "compare.variants=[anderson]",
        f"compare.seeds={seeds}",
        "compare.jobs=0",
        f"trainer.max_epochs={epochs}",
    ]


def test_own_module_writes_report(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        f"compare.module={OWN}.Module",
        "+compare.module_args.width=4",
        f"compare.datamodule={OWN}.Data",
        "compare.metric=val/loss",
        "compare=paper",
        "compare.variants=[anderson,plain@3x]",
        "callbacks.anderson.store_every_n_steps=2",
        "callbacks.anderson.accelerate_every_n_steps=4",
        "compare.seeds=2",
        "compare.jobs=0",
        "trainer.max_epochs=5",
    ]
    monkeypatch.setattr(sys, "argv", ["stableaa-compare", *options])
    main()
    printed = capsys.readouterr().out.splitlines()
    folder = empty_folder / "comparisons" / f"{OWN}.Module" / "paper"
    report = json.loads((folder / "results.json").read_text())
    assert report["verdict"] == printed
    assert printed[0].startswith("anderson ")
    assert printed[0].endswith("fewer than five seeds prove little.")
    assert " ".join(report["variants"]) == "plain anderson plain@3x"
    ones = dict.fromkeys(("median", "lower", "upper", "worst"), 1)
    assert report["variants"]["plain"]["cost_ratio"] == ones | {"never": 0, "count": 2}
    assert report["variants"]["plain"]["diverged"] == 0
    assert report["config"]["module"] == {"_target_": f"{OWN}.Module", "width": 4}
    assert report["callbacks"]["plain@3x"]["learning_rate_multiple"]["multiple"] == 3
    assert (report["seeds"], len(report["runs"])) == ([0, 1], 6)
    assert report["hardware"]["cores"] == os.cpu_count()
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [row["variant"] for row in rows] == [v for v in report["variants"] for _ in range(2)]
    assert {(row["gradients"], row["diverged"]) for row in rows} == {("25", "0")}
    table = (folder / "table.md").read_text()
    assert all(sentence in table for sentence in printed)
    assert table.count("\n| ") == 4
    assert "| diverged | worst after best |" in table
    for name in ("curves.png", "variants.png", "seeds.png", "ratios.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert str(empty_folder) not in (folder / "results.json").read_text()


@pytest.mark.parametrize(
    ("module", "data", "sentence"),
    [
        ("Breaks", "Data", "plain failed with its first seed, RuntimeError: broken; fix that "),
        ("Module", "Empty", "training ended before its first step: train_dataloader has no b"),
        ("Module", "Unvalidated", "the run has no validation, which has to log val/loss: define "),
        ("Skips", "Data", "no gradient was taken in the whole run: training_step returned None "),
    ],
)
@pytest.mark.filterwarnings("ignore:Total length of", "ignore:`training_step` returned")
@pytest.mark.usefixtures("plan")
def test_plain_first_seed_fails_ends_comparison(
    module: str, data: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "table.md").write_text("of an earlier comparison")
    options = own(module, tmp_path, data=data, seeds=2, epochs=1)
    with pytest.raises(UserError, match=sentence):
        compare(hydra.compose("compare", options), options, "own")
    assert (tmp_path / "table.md").read_text() == "of an earlier comparison"
    assert len(list(tmp_path.glob("runs/*/*"))) <= 1


@pytest.mark.parametrize(
    ("module", "sentence", "tried"),
    [
        ("StepsItself", "callbacks: automatic_optimization=False: training_step steps the", []),
        ("BreaksAccelerated", "RuntimeError: broken", ["seed0", "seed1"]),
    ],
)
def test_variant_fails_other_seeds_are_skipped(
    module: str,
    sentence: str,
    tried: list[str],
    empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = own(module, empty_folder, seeds=3, epochs=8)
    monkeypatch.setattr(sys, "argv", ["stableaa-compare", *options])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"stableaa-compare: anderson failed with every seed: {sentence}")
    report = json.loads((empty_folder / "results.json").read_text())
    assert [run["error"] is None for run in report["runs"]] == [True] * 3 + [False] * 3
    assert sorted(one.name[:5] for one in empty_folder.glob("runs/anderson/*")) == tried


@pytest.mark.usefixtures("plan")
def test_variant_disabled_is_reported(tmp_path: Path) -> None:
    options = own("Unrepeatable", tmp_path, seeds=1, epochs=8)
    options.append("stochastic=false")
    compare(hydra.compose("compare", options), options, "own")
    first = json.loads((tmp_path / "results.json").read_text())["verdict"][0]
    assert first.startswith("anderson: acceleration was switched off in 1 of 1 seeds: two losses ")


@pytest.mark.usefixtures("plan")
def test_metric_not_finite_is_reported(tmp_path: Path) -> None:
    options = own("Diverges", tmp_path, seeds=1, epochs=1)
    summary = compare(hydra.compose("compare", options), options, "own")
    assert verdict(summary) == [
        "anderson: val/loss did not end in a finite number in any seed finished by both it and "
        "plain, so they cannot be compared.",
        "Of no variant was the median val/loss at equal cost a finite number.",
    ]
    assert [one.diverged for one in summary.variants.values()] == [1, 1]


def edited(plan: MakePlan, folder: Path, name: str) -> Plan:
    """A plan for a module in the file ``name`` of ``folder``."""
    options = ["recipe=_own", f"compare.module={name}.Module", f"compare.datamodule={name}.Data"]
    if not (folder / f"{name}.py").exists():
        (folder / f"{name}.py").write_text(Path(own_module.__file__).read_text())
    return plan(*options, "compare.metric=val/loss", variants="plain")


def test_fingerprint_edited_module_differs(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    fingerprints = []
    for text in ("", "LR = 0.1\n", "LR = 1\n"):
        (tmp_path / "beside.py").write_text(text)
        fingerprints.append(edited(plan, tmp_path, "edited_module").jobs[0].fingerprint)
    assert len(set(fingerprints)) == 3
    assert edited(plan, tmp_path, "edited_module").jobs[0].fingerprint == fingerprints[-1]


def test_fingerprint_other_source_or_version_differs(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lightning_stableaa, "__path__", [str(tmp_path)])
    hashes = []
    for text in ("X = 1\n", "X = 2\n", "X = 1\n"):
        (tmp_path / "module.py").write_text(text)
        environment.hash_of_package.cache_clear()
        hashes.append(environment.hash_of_package())
    environment.hash_of_package.cache_clear()
    monkeypatch.undo()
    assert hashes[0] == hashes[2] != hashes[1]

    (known,) = plan(*BURGERS).jobs
    monkeypatch.setattr(fingerprint, "hash_of_package", lambda: hashes[1])
    (other_source,) = plan(*BURGERS).jobs
    monkeypatch.undo()
    monkeypatch.setattr(fingerprint, "versions", lambda: versions() | {"numpy": "0"})
    (older,) = plan(*BURGERS).jobs
    assert len({known.fingerprint, other_source.fingerprint, older.fingerprint}) == 3


@pytest.mark.usefixtures("plan")
def test_report_interrupted_names_missing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*BURGERS, f"compare.folder={tmp_path}", "compare.variants=[plain,anderson]"]
    options += ["compare.jobs=0", "compare.seeds=1"]

    def stopped(jobs: Any, *, processes: int) -> Iterator[Run]:
        yield next(run_all(jobs, processes=processes))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compare_command, "run_all", stopped)
        with pytest.raises(KeyboardInterrupt):
            compare(hydra.compose("compare", options), options, "burgers2d")
    sentence = "Only 1 of 2 runs were made; the same command makes the others."
    assert f"- {sentence}\n" in (tmp_path / "table.md").read_text()

    (kept,) = tmp_path.glob(f"runs/plain/*/{RESULT}")
    result = json.loads(kept.read_text())
    assert result["processor"] == processor()
    kept.write_text(json.dumps(result | {"processor": "8086"}))
    compare(hydra.compose("compare", options), options, "burgers2d")
    first = json.loads((tmp_path / "results.json").read_text())["verdict"][0]
    assert first in " ".join(capsys.readouterr().err.split())
    assert first.startswith(f"Runs were made on 8086 and on {processor()}: times do not ")


def kill_the_worker(folder: Path) -> None:
    """Waits until a worker trains in ``folder``, and kills it."""
    while not (folder / "training" / "config.yaml").exists():
        time.sleep(0.01)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)


@pytest.mark.slow  # starts processes
def test_run_killed_is_repeated_finished_is_reused(plan: MakePlan) -> None:
    (job,) = plan(*BURGERS, "trainer.max_steps=400").jobs
    killer = threading.Thread(target=kill_the_worker, args=(job.folder,))
    killer.start()
    (killed,) = run_all([job], processes=1)
    killer.join()
    assert killed.error == "the worker process ended with signal SIGKILL"
    assert read_run(job) is None

    (made,) = run_all([job], processes=1)
    assert (made.error, made.curve.gradients[-1]) == (None, 400)
    assert made.peak_memory is not None
    assert 2**27 < made.peak_memory < 2**31  # bytes: 128 MiB would not hold PyTorch

    written = (job.folder / RESULT).stat().st_mtime_ns
    assert list(run_all([job], processes=1)) == [made]  # read, to the last digit
    assert (job.folder / RESULT).stat().st_mtime_ns == written


def test_report_json_is_finite_without_paths() -> None:
    text = to_json({"a": [1.23456789, float("inf")], "b": {"c": float("nan")}})
    assert json.loads(text) == {"a": [1.23457, None], "b": {"c": None}}
    paths = ["data.csv=/home/me/a.csv", {"b": "/data/c"}, "val/loss", 3]
    assert shorten_paths(paths) == ["data.csv=a.csv", {"b": "c"}, "val/loss", 3]
    message = "FileNotFoundError: no '/home/me/a.csv' nor /data/b.csv, at 3 / 4 of them"
    assert shorten_paths(message) == "FileNotFoundError: no 'a.csv' nor b.csv, at 3 / 4 of them"


MODULE = [f"compare.module={OWN}.Module", "compare.metric=val/loss"]
SWEEP = [*BURGERS, "compare.variants=[lr_sweep]"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], r"recipe is not given; choose one of .*, as in recipe=admissions_mlp"),
        ([*BURGERS, "compare.variants=[andersen]"], r".*no such choice; did you mean anderson\?"),
        ([*BURGERS, "compare.variants=[plain@3]"], r".* modifier @3; write @3x for .*"),
        ([*BURGERS, "compare.variants=[plain@3x@2x]"], r".*plain@3x@2x has two modifiers .*"),
        ([*BURGERS, "compare.variant=[plain]"], r"compare.variant: .* did you mean variants\?"),
        ([*BURGERS, "seed=3"], r"seed=3: a comparison has several, as in compare.seeds=.*"),
        ([*BURGERS, "callbacks=stable_aa"], r"callbacks=stable_aa: each variant brings its .*"),
        (
            [*BURGERS, "callbacks.anderson.history_depth=4", "compare.variants=[ema]"],
            r"callbacks.anderson.history_depth=4: no variant among plain, ema has that callback",
        ),
        ([*BURGERS, *ONE_RUN, "trainer.devices=2"], r".*every run of a comparison has one.*"),
        ([*SWEEP, "compare.lr_sweep=[3]"], r"compare.lr_sweep: 3 is no change .*"),
        ([*BURGERS, *ONE_RUN, "compare.metric=val/top1"], r"compare.mode is not given: .*"),
        ([*BURGERS, *ONE_RUN, "compare.metric=val/neg_mse"], r"compare.mode is not given: .*"),
        ([*BURGERS, "run_name=mine"], r"run_name=mine: .*; choose where by compare.folder"),
        ([*BURGERS, "-m"], r"-m: a comparison makes its own runs, and the points of a sweep .*"),
        ([*BURGERS, *ONE_RUN, "compare.folder=/proc/no"], r"compare.folder=/proc/no: .*; make .*"),
        (
            [*BURGERS, *ONE_RUN, "trainer.val_check_interval=50", "data.redraw_every=50"],
            r"the run ended before its first validation: train longer, .*",
        ),
        (
            [*BURGERS, "compare.variants=[anderson]", "callbacks.anderson.history_depth=0"],
            r"callbacks.anderson: history_depth must be >= 2, got 0",
        ),
        (["compare.module=nowhere.Module"], r".*No module named 'nowhere'; give an import .*"),
        ([f"compare.module={OWN}.Modle", MODULE[1]], rf".*{OWN} has no Modle; give an .*"),
        ([*ONE_RUN, MODULE[0]], r"compare.metric is not given: name what validation logs, .*"),
        ([*MODULE, *ONE_RUN, "+compare.module_args.depth=3"], r".*did you mean width\?"),
        ([f"compare.module={OWN}.NeedsWidth", MODULE[1]], r".*its __init__ needs width; .*"),
        ([*MODULE, "optimizer=adam"], r"optimizer=adam: has no effect beside compare.module; .*"),
        ([*MODULE, "+data.batch_size=4"], r".*write compare.datamodule_args.NAME=VALUE"),
    ],
    ids=lambda value: " ".join(value[-1:]) if isinstance(value, list) else "",
)
def test_command_user_error_is_one_sentence(
    arguments: list[str], sentence: str, refuses: Refuses
) -> None:
    refuses(main, arguments, sentence)
