"""A comparison from configuration to report, its continuation, and mistakes."""

import csv
import fcntl
import json
import multiprocessing
import os
import shutil
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
from tests.recipes.conftest import SMALL, Refuses

BURGERS = [*SMALL["burgers2d"], "trainer.max_steps=40", "compare.seeds=1"]
AVERAGES = ",ema,swa" if hasattr(callbacks, "WeightAveraging") else ""  # since Lightning 2.6
ONE_RUN = ["compare.variants=[plain]", "compare.seeds=1", "compare.jobs=0"]
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


# every variant that changes a run in its own way, sixteen in all with the sweep
def test_every_variant_runs_and_pays_for_what_it_evaluates(plan: MakePlan) -> None:
    made = plan(
        *BURGERS,
        "callbacks.anderson.store_every_n_steps=5",
        "callbacks.anderson.accelerate_every_n_steps=10",
        "callbacks.anderson.regularization=1e-6",
        "callbacks.anderson.sufficient_decrease=0",
        "callbacks.anderson.monitor=null",
        variants=f"lbfgs,anderson_smoothing,smoothing,lookahead,schedule_free,plain@3x{AVERAGES}",
    )
    runs = run_here(made)
    assert {name: run.error for name, run in runs.items()} == dict.fromkeys(made.variants)
    steps = list(range(5, 41, 5))
    for name, run in runs.items():
        if name != "lbfgs":
            assert run.curve.gradients == steps
            # the loss before and that of the candidate
            assert run.curve.losses == [2 * attempted for attempted in run.curve.attempted]
    # the first of the attempts, every ten steps, has the two residuals it needs
    assert runs["anderson_smoothing"].curve.attempted == [0, 1, 1, 2, 2, 3, 3, 4]
    assert runs["anderson_smoothing"].curve.costs == pytest.approx(
        [5, 10 + 2 / 3, 15 + 2 / 3, 21 + 1 / 3, 26 + 1 / 3, 32, 37, 42 + 2 / 3]
    )
    assert runs["plain"].curve.attempted == [0] * 8
    assert runs["plain"].smoothing_on is None
    assert runs["smoothing"].smoothing_on is not None
    assert len(runs["anderson_smoothing"].rsd) == 8  # windows of five steps
    assert len(runs["smoothing"].rsd) == 4  # of ten
    assert 15 < runs["lbfgs"].curve.gradients[-1] <= 40
    ends = {run.curve.values[-1] for run in runs.values()}
    assert len(ends) >= len(runs) - 1  # the average may never have been switched on


def test_names_become_settings(plan: MakePlan) -> None:
    made = plan(
        "recipe=admissions_mlp",
        "compare.seeds=[3,5]",
        "callbacks.anderson.history_depth=4",
        variants="anderson,lr_sweep,plain@3x",
    )
    assert made.variants == [
        "plain",
        "anderson",
        "plain@0.3x",
        "plain@3x",
        "plain@10x",
        "plain@cosine",
        "plain@cosine@3x",
        "plain@cosine@10x",
    ]
    assert [(job.seed, job.variant) for job in made.jobs] == [
        (seed, name) for seed in (3, 5) for name in made.variants
    ]
    assert (made.metric, made.mode) == ("val/mse", "min")
    by_name = {job.variant: job.settings for job in made.jobs if job.seed == 5}
    assert by_name["plain"]["data"]["seed"] == 5
    assert list(by_name["plain"]["callbacks"]) == ["recorder"]
    assert by_name["anderson"]["callbacks"]["anderson"]["history_depth"] == 4
    assert list(by_name["plain@cosine@3x"]["callbacks"]) == [
        "recorder",
        "cosine",
        "learning_rate_multiple",
    ]
    assert len({job.fingerprint for job in made.jobs}) == len(made.jobs)
    assert len({job.folder for job in made.jobs}) == len(made.jobs)


def test_pinns_are_compared_with_lbfgs(plan: MakePlan) -> None:
    standard = hydra.compose("compare", ["recipe=admissions_mlp"]).compare.variants
    for recipe in ("burgers2d", "burgers100d", "burgers100d_product"):
        variants = hydra.compose("compare", [f"recipe={recipe}"]).compare.variants
        assert set(variants) - set(standard) == {"lbfgs"}


def test_a_recipe_with_a_schedule_is_not_swept_over_schedules(plan: MakePlan) -> None:
    options = ["scheduler=cosine", "compare.lr_sweep_of=[plain,anderson]"]
    made = plan("recipe=admissions_mlp", *options, variants="lr_sweep")
    assert made.variants == [
        "plain",
        *("plain@0.3x", "plain@3x", "plain@10x"),
        *("anderson@0.3x", "anderson@3x", "anderson@10x"),
    ]


def test_a_module_of_the_other_tree_gets_its_trainer(plan: MakePlan) -> None:
    made = plan(
        *ONE_RUN[1:],
        "recipe=_own",
        "compare.module=tests.recipes.own_module.OfTheOtherTree",
        "compare.metric=val/loss",
        variants="ema",
    )
    settings = made.jobs[1].settings
    assert settings["trainer"]["_target_"] == "pytorch_lightning.Trainer"
    target = settings["callbacks"]["ema"]["_target_"]
    assert target == "pytorch_lightning.callbacks.EMAWeightAveraging"
    assert settings["data"] is None


def test_own_module_becomes_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = [
        "compare.module=tests.recipes.own_module.Module",
        "+compare.module_args.width=4",
        "compare.datamodule=tests.recipes.own_module.Data",
        "compare.metric=val/loss",
        "compare.variants=[anderson,plain@3x]",
        "callbacks.anderson.store_every_n_steps=2",
        "callbacks.anderson.accelerate_every_n_steps=4",
        "compare.seeds=2",
        "compare.jobs=0",
        "trainer.max_epochs=5",
    ]
    monkeypatch.setattr(sys, "argv", ["stableaa-compare", *options])
    main()
    said = capsys.readouterr().out.splitlines()
    folder = tmp_path / "comparisons" / "tests.recipes.own_module.Module"
    report = json.loads((folder / "results.json").read_text())
    assert report["verdict"] == said
    assert said[0].startswith("anderson ")
    assert said[0].endswith("fewer than five seeds prove little.")
    assert " ".join(report["variants"]) == "plain anderson plain@3x"
    assert report["variants"]["plain"]["cost_ratio"] == {
        "median": 1,
        "lower": 1,
        "upper": 1,
        "worst": 1,
        "never": 0,
        "count": 2,
    }
    assert report["config"]["module"] == {
        "_target_": "tests.recipes.own_module.Module",
        "width": 4,
    }
    assert report["callbacks"]["plain@3x"]["learning_rate_multiple"]["multiple"] == 3
    assert report["seeds"] == [0, 1]
    assert report["hardware"]["cores"] == os.cpu_count()
    assert report["versions"]["schedulefree"] is not None
    assert len(report["runs"]) == 6
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [(row["variant"], row["seed"]) for row in rows[:3]] == [
        ("plain", "0"),
        ("plain", "1"),
        ("anderson", "0"),
    ]
    assert [row["gradients"] for row in rows] == ["25"] * 6
    table = (folder / "table.md").read_text()
    assert all(sentence in table for sentence in said)
    assert table.count("\n| ") == 4
    for name in ("curves.png", "variants.png", "ratios.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in (folder / "results.json").read_text()


OWN_MODULE = "tests.recipes.own_module"


def own(module: str, folder: Path, *, data: str = "Data", seeds: int, epochs: int) -> list[str]:
    """Options of a comparison of a module that is no recipe, in this process."""
    return [
        "recipe=_own",
        f"compare.module={OWN_MODULE}.{module}",
        f"compare.datamodule={OWN_MODULE}.{data}",
        "compare.metric=val/loss",
        f"compare.folder={folder}",
        "compare.variants=[anderson]",
        f"compare.seeds={seeds}",
        "compare.jobs=0",
        f"trainer.max_epochs={epochs}",
    ]


@pytest.mark.parametrize(
    ("module", "data", "sentence"),
    [
        ("Breaks", "Data", "plain failed with its first seed, RuntimeError: broken; mend that "),
        ("Module", "Empty", "training ended before its first step: train_dataloader has no b"),
        ("Module", "Unvalidated", "the run has no validation, which has to log val/loss: define "),
        ("Skips", "Data", "no gradient was taken in the whole run: training_step returned None "),
    ],
)
@pytest.mark.filterwarnings("ignore:Total length of", "ignore:`training_step` returned")
def test_what_plain_cannot_do_ends_the_comparison(
    module: str, data: str, sentence: str, plan: MakePlan, tmp_path: Path
) -> None:
    (tmp_path / "table.md").write_text("of an earlier comparison")
    options = own(module, tmp_path, data=data, seeds=2, epochs=1)
    with pytest.raises(UserError, match=sentence):
        compare(hydra.compose("compare", options), options, "own")
    assert (tmp_path / "table.md").read_text() == "of an earlier comparison"
    assert len(list(tmp_path.glob("runs/*/*"))) <= 1


@pytest.mark.parametrize(
    ("module", "sentence", "tried", "finished"),
    [
        (
            "StepsItself",
            "every seed: callbacks: automatic_optimization=False is not supported by",
            [],
            [False] * 3,
        ),
        ("CannotBeJudged", "every seed: RuntimeError: no judge", ["seed0", "seed1"], [False] * 3),
        (
            "CannotBeJudgedOnce",
            "1 of the seeds: RuntimeError: no judge",
            ["seed0", "seed1", "seed2"],
            [True, False, True],
        ),
    ],
)
def test_a_variant_that_fails_is_left_where_it_always_does_and_said(
    module: str,
    sentence: str,
    tried: list[str],
    finished: list[bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = own(module, tmp_path, seeds=3, epochs=8)
    monkeypatch.setattr(sys, "argv", ["stableaa-compare", *options])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"stableaa-compare: anderson failed with {sentence}")
    report = json.loads((tmp_path / "results.json").read_text())
    assert [run["error"] is None for run in report["runs"]] == [True] * 3 + finished
    assert sorted(one.name[:5] for one in tmp_path.glob("runs/anderson/*")) == tried


def test_a_refused_comparison_leaves_the_folders_that_were_there(
    plan: MakePlan, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    options = own("Module", there / "made" / "too", seeds=1, epochs=1)
    options[options.index("compare.metric=val/loss")] = "compare.metric=val/mse"
    with pytest.raises(UserError, match=r"validation does not log it; choose one of val/loss$"):
        compare(hydra.compose("compare", options), options, "own")
    assert list(there.iterdir()) == []


def test_a_metric_that_is_not_finite_is_called_so(plan: MakePlan, tmp_path: Path) -> None:
    options = own("Diverges", tmp_path, seeds=1, epochs=1)
    summary = compare(hydra.compose("compare", options), options, "own")
    assert verdict(summary) == [
        "anderson: val/loss did not end in a finite number in any seed finished by both it and "
        "plain, so nothing is known.",
        "Of no variant was the median val/loss at equal cost a finite number.",
    ]


def test_a_metric_counts_where_validation_logs_it(plan: MakePlan, tmp_path: Path) -> None:
    options = own("LogsNowAndThen", tmp_path, seeds=1, epochs=6)
    compare(hydra.compose("compare", options), options, "own")
    curve = json.loads((tmp_path / "results.json").read_text())["runs"][0]["curve"]
    assert curve["values"] == [0.0, 2.0, 4.0]
    assert curve["gradients"] == [5, 15, 25]


def test_an_edited_module_is_another_run(plan: MakePlan, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = (Path(__file__).parent / "own_module.py").read_text()
    fingerprints = []
    for name, text in (("edited_module", source), ("beside", "LR = 0.1\n"), ("beside", "LR = 1\n")):
        (tmp_path / f"{name}.py").write_text(text)
        options = ["compare.module=edited_module.Module", "compare.datamodule=edited_module.Data"]
        made = plan("recipe=_own", *options, "compare.metric=val/loss", variants="plain")
        fingerprints.append(made.jobs[0].fingerprint)
    assert len(set(fingerprints)) == 3
    assert (
        plan("recipe=_own", *options, "compare.metric=val/loss", variants="plain")
        .jobs[0]
        .fingerprint
        == fingerprints[-1]
    )


def test_a_module_that_is_edited_meanwhile_ends_the_comparison(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = (Path(__file__).parent / "own_module.py").read_text()
    (tmp_path / "meanwhile.py").write_text(source)
    options = ["compare.module=meanwhile.Module", "compare.datamodule=meanwhile.Data"]
    made = plan("recipe=_own", *options, "compare.metric=val/loss", variants="plain")
    (tmp_path / "meanwhile.py").write_text(source + "# edited\n")
    with pytest.raises(UserError, match=r"^data/meanwhile.py was edited while the comparison "):
        list(run_all(made.jobs, processes=1))


def test_another_version_or_source_of_this_package_is_another_run(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module.py").write_text("X = 1\n")
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
    (edited,) = plan(*BURGERS).jobs
    monkeypatch.undo()
    monkeypatch.setattr(fingerprint, "versions", lambda: versions() | {"numpy": "0"})
    (older,) = plan(*BURGERS).jobs
    assert len({known.fingerprint, edited.fingerprint, older.fingerprint}) == 3


def test_a_part_of_the_runs_is_called_so(
    plan: MakePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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
    assert json.loads((tmp_path / "results.json").read_text())["verdict"][0] == sentence

    (kept,) = tmp_path.glob(f"runs/plain/*/{RESULT}")
    found = json.loads(kept.read_text())
    assert found["processor"] == processor()
    kept.write_text(json.dumps(found | {"processor": "An abacus"}))
    compare(hydra.compose("compare", options), options, "burgers2d")
    first = json.loads((tmp_path / "results.json").read_text())["verdict"][0]
    assert first in " ".join(capsys.readouterr().err.split())
    assert first.startswith(f"Runs were made on An abacus and on {processor()}: times do not ")


def test_other_data_are_another_run(plan: MakePlan, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    fingerprints = []
    for text in ("1,2\n", "1,3\n", "1,2\n"):
        table.write_text(text)
        made = plan("recipe=admissions_mlp", f"data.csv={table}", variants="plain")
        fingerprints.append(made.jobs[0].fingerprint)
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


@pytest.mark.usefixtures("plan")
def test_two_comparisons_do_not_share_a_folder(tmp_path: Path) -> None:
    options = [*BURGERS, *ONE_RUN, f"compare.folder={tmp_path}"]
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another comparison is at work there"):
            compare(hydra.compose("compare", options), options, "burgers2d")


def test_a_folder_may_be_a_number(plan: MakePlan) -> None:
    listed = [*BURGERS, *ONE_RUN, "compare.folder=3"]
    assert make_plan(hydra.compose("compare", listed), listed, "title").folder == Path("3")


def test_loggers_that_were_asked_for_are_kept(plan: MakePlan) -> None:
    for options, names in (([], ["csv"]), (["logger=tensorboard"], ["tensorboard", "csv"])):
        job = plan("recipe=burgers2d", *options, variants="plain").jobs[0]
        assert list(job.settings["logger"]) == names
        assert all(one["save_dir"].endswith("training") for one in job.settings["logger"].values())


def test_a_run_that_fails_does_not_stop_the_others(plan: MakePlan, tmp_path: Path) -> None:
    options = [
        *BURGERS,
        f"compare.folder={tmp_path}",
        "compare.variants=[schedule_free,smoothing]",
        "compare.jobs=0",
        # Schedule-Free has nothing to put in the place of Rprop
        "optimizer={_target_:torch.optim.Rprop,_partial_:true,lr:1e-3}",
        "~optimizer.betas",
        "~optimizer.weight_decay",
    ]
    summary = compare(hydra.compose("compare", options), options, "burgers2d")
    sentence = (
        "schedule_free replaces SGD, Adam and AdamW, and the optimizer is Rprop: "
        "leave it out of compare.variants"
    )
    assert [one.errors for one in summary.variants.values()] == [{}, {0: sentence}, {}]
    assert f"- schedule_free, seed 0: {sentence}" in (tmp_path / "table.md").read_text()


def kill_the_worker(folder: Path) -> None:
    """Waits until a worker trains in ``folder``, and kills it."""
    while not (folder / "training" / "config.yaml").exists():
        time.sleep(0.01)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)


@pytest.mark.slow  # starts processes
def test_an_interrupted_run_is_made_again_and_a_finished_one_is_not(plan: MakePlan) -> None:
    (job,) = plan(*BURGERS, "trainer.max_steps=400").jobs
    killer = threading.Thread(target=kill_the_worker, args=(job.folder,))
    killer.start()
    (killed,) = run_all([job], processes=1)
    killer.join()
    assert killed.error == "the worker process ended with signal SIGKILL"
    assert read_run(job) is None

    (made,) = run_all([job], processes=1)
    assert made.error is None
    assert made.curve.gradients[-1] == 400
    assert made.peak_memory is not None
    assert 2**27 < made.peak_memory < 2**31  # bytes: 128 MiB would not hold PyTorch

    written = (job.folder / RESULT).stat().st_mtime_ns
    assert list(run_all([job], processes=1)) == [made]  # read, to the last digit
    assert (job.folder / RESULT).stat().st_mtime_ns == written


def test_other_settings_are_another_run(plan: MakePlan) -> None:
    (job,) = plan(*BURGERS).jobs
    list(run_all([job], processes=0))
    (other,) = plan(*BURGERS, "optimizer.lr=2e-3").jobs
    assert read_run(job) is not None
    assert read_run(other) is None
    shutil.copytree(job.folder, other.folder)
    assert read_run(other) is None  # the fingerprint in the file decides, not the folder


def test_report_is_valid_json_without_paths() -> None:
    text = to_json({"a": [1.23456789, float("inf")], "b": {"c": float("nan")}})
    assert json.loads(text) == {"a": [1.23457, None], "b": {"c": None}}
    assert shorten_paths(["data.csv=/home/me/a.csv", {"b": "/data/c"}, "val/loss", 3]) == [
        "data.csv=a.csv",
        {"b": "c"},
        "val/loss",
        3,
    ]
    message = "FileNotFoundError: no '/home/me/a.csv' nor /data/b.csv, at 3 / 4 of them"
    assert shorten_paths(message) == "FileNotFoundError: no 'a.csv' nor b.csv, at 3 / 4 of them"


OWN = ["compare.module=tests.recipes.own_module.Module", "compare.metric=val/loss"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], r"recipe is not given; choose one of .*admissions_mlp.*, as in recipe=admissions_mlp"),
        (
            [*BURGERS, "compare.variants=[andersen]"],
            r"compare/variant=andersen: there is no such choice; did you mean anderson\?",
        ),
        (
            [*BURGERS, "compare.variants=[plain@3]"],
            r"compare.variants: plain@3 has the unknown modifier @3; write @3x for .*",
        ),
        (
            [*BURGERS, "compare.variants=plain"],
            r"compare.variants=plain: expected a list such as \[plain,anderson\]",
        ),
        (
            [*BURGERS, "compare.variant=[plain]"],
            r"compare.variant: there is no such option; did you mean variants\?",
        ),
        (
            [*BURGERS, "compare.seeds=0"],
            r"compare.seeds=0: expected a positive number, or a list.*",
        ),
        ([*BURGERS, "compare.jobs=-1"], r"compare.jobs=-1: expected a whole number >= 0"),
        ([*BURGERS, *ONE_RUN, "compare.mode=less"], r"compare.mode=less: choose min or max"),
        ([*BURGERS, "seed=3"], r"seed=3: a comparison has several, as in compare.seeds=\[7,8,9\]"),
        (
            [*BURGERS, "callbacks=stable_aa"],
            r"callbacks=stable_aa: each variant brings its callbacks; see compare.variants",
        ),
        (
            [*BURGERS, "callbacks.anderson.history_depth=4", "compare.variants=[ema]"],
            r"callbacks.anderson.history_depth=4: no variant among plain, ema has that callback",
        ),
        (
            [*BURGERS, *ONE_RUN, "trainer.devices=2"],
            r"trainer.devices=2: every run of a comparison has one.*",
        ),
        (
            ["compare.module=nowhere.Module"],
            r"compare.module=nowhere.Module: No module named 'nowhere'; give an import path .*",
        ),
        (
            [*ONE_RUN, "compare.module=tests.recipes.own_module.Module"],
            r"compare.metric is not given: name what validation logs, as in compare.metric=val/l.*",
        ),
        (
            [*OWN, "compare.datamodule=tests.recipes.own_module.Dat"],
            r"compare.datamodule=tests.recipes.own_module.Dat: .*",
        ),
        (
            [*OWN, *ONE_RUN, "+compare.module_args.depth=3"],
            r"compare.module_args.depth: there is no such option; did you mean width\?",
        ),
        (
            [*OWN, *ONE_RUN, "compare.module_args.width=3"],
            r"compare.module_args.width: there is no such option; a new one is written with a .*",
        ),
        (
            ["compare.module=tests.recipes.own_module.Modle", "compare.metric=val/loss"],
            r"compare.module=.*: tests.recipes.own_module has no Modle; give an import path .*",
        ),
        (
            [
                *OWN,
                "compare.datamodule=tests.recipes.own_module.Data",
                "compare.metric=val/mse",
                "trainer.max_epochs=1",
                *ONE_RUN,
            ],
            r"compare.metric=val/mse: validation does not log it; choose one of val/loss",
        ),
        (
            [*BURGERS, *ONE_RUN, "compare.metric=val/top1"],
            r"compare.mode is not given: say whether less of val/top1 is better .*",
        ),
        *(
            (
                [*BURGERS, *ONE_RUN, f"compare.metric={metric}"],
                rf"compare.mode is not given: say whether less of {metric} is better .*",
            )
            for metric in ("neg_mse", "val/neg_mean_squared_error", "negative_loss")
        ),
        ([*BURGERS, *ONE_RUN, "compare.metric=3"], r"compare.metric=3: expected a name, as in .*"),
        (
            [*BURGERS, "compare.variants=[plain@3x@2x]"],
            r"compare.variants: plain@3x@2x has two modifiers of a kind; .*",
        ),
        (
            [*BURGERS, "compare.variants=[lr_sweep]", "compare.lr_sweep=3x"],
            r"compare.lr_sweep=3x: expected a list such as \[3x\]",
        ),
        (
            [*BURGERS, "compare.variants=[lr_sweep]", "compare.lr_sweep=[3]"],
            r"compare.lr_sweep: 3 is no change .*, as in compare.lr_sweep=\[3x,10x,cosine\]",
        ),
        (
            ["compare.module=tests.recipes.own_module.NeedsWidth", "compare.metric=val/loss"],
            r"compare.module=.*: its __init__ needs width; write \+compare.module_args.width=.*",
        ),
        (["compare.module=3"], r"compare.module=3: expected an import path such as .*"),
        ([*OWN, "compare.datamodule=3"], r"compare.datamodule=3: expected an import path .*"),
        (
            [*OWN, "compare.module_args=8"],
            r"compare.module_args=8: expected a dict; write \+compare.module_args.NAME=VALUE",
        ),
        (
            [*OWN, "compare.datamodule_args=8"],
            r"compare.datamodule_args=8: expected a dict; write \+compare.datamodule_args.NAME=.*",
        ),
        (
            [*BURGERS, "run_name=mine"],
            r"run_name=mine: a comparison names its own runs .*; choose where by compare.folder",
        ),
        (
            [*OWN, "optimizer=adam"],
            r"optimizer=adam: has no effect beside compare.module; the module brings its own; .*",
        ),
        (
            [*OWN, "+data.batch_size=4"],
            r"\+data.batch_size=4: has no effect .*; write compare.datamodule_args.NAME=VALUE",
        ),
        ([*BURGERS, "-m"], r"-m: a comparison makes its own runs, and the points of a sweep .*"),
        (
            [*BURGERS, *ONE_RUN, "compare.folder=/proc/nowhere"],
            r"compare.folder=/proc/nowhere: .*; make room or choose another folder",
        ),
        (
            [
                *BURGERS,
                "compare.variants=[anderson]",
                "compare.seeds=1",
                "compare.jobs=0",
                "callbacks.anderson.history_depth=0",
            ],
            r"callbacks.anderson: history_depth must be >= 2, got 0",
        ),
        (
            [*BURGERS, *ONE_RUN, "trainer.val_check_interval=50", "data.redraw_every=50"],
            r"the run ended before its first validation: train longer, .*",
        ),
    ],
    ids=lambda value: " ".join(value[-1:]) if isinstance(value, list) else "",
)
def test_mistake_is_one_sentence(arguments: list[str], sentence: str, refuses: Refuses) -> None:
    refuses(main, arguments, sentence)
