"""A comparison from configuration to report, its continuation, and user errors."""

import csv
import json
import multiprocessing
import os
import re
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
from benchmarks import paper_tables
from lightning_stableaa.recipes import compare as compare_command
from lightning_stableaa.recipes.compare import compare, main
from lightning_stableaa.recipes.comparison import provenance
from lightning_stableaa.recipes.comparison.plots import COLORS, style
from lightning_stableaa.recipes.comparison.provenance import processor, versions
from lightning_stableaa.recipes.comparison.report import to_json
from lightning_stableaa.recipes.comparison.runner import RESULT, Run, finished_run, run_all
from lightning_stableaa.recipes.comparison.statistics import LOSS_COST
from lightning_stableaa.recipes.comparison.variants import Plan, make_plan
from lightning_stableaa.recipes.errors import UserError
from tests.helpers import own_module
from tests.recipes.conftest import SMALL, Refuses

BURGERS = [*SMALL["burgers2d"], "trainer.max_steps=40", "compare.seeds=1"]
AVERAGES = ",ema,swa" if hasattr(callbacks, "WeightAveraging") else ""  # since Lightning 2.6
ONE_RUN = ["compare.variants=[plain]", "compare.seeds=1", "compare.jobs=0"]
OWN = "tests.helpers.own_module"
PICTURES = ("curves.png", "variants.png", "seeds.png", "ratios.png")
MakePlan = Callable[..., Plan]


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[MakePlan]:
    """Plans a comparison as the command line does; its folder is a temporary one."""

    def plan(*overrides: str, variants: str = "plain") -> Plan:
        listed = [*overrides, f"compare.variants=[{variants}]", f"compare.folder={tmp_path}"]
        return make_plan(hydra.compose("compare", listed), listed, "title")

    with initialize_config_module("lightning_stableaa.conf", version_base="1.3"):
        yield plan


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports come with empty pictures: drawing takes most of the time of a small comparison."""

    def draw(plan: Plan, *_: Any) -> None:
        for name in PICTURES:
            (plan.folder / name).touch()

    monkeypatch.setattr("lightning_stableaa.recipes.comparison.plots.draw", draw)


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
    assert {run.disabled for run in runs.values()} == {None}
    curves = {name: run.curve for name, run in runs.items()}
    for name, curve in curves.items():
        if name != "lbfgs":
            assert curve["gradients"] == list(range(5, 41, 5))
    # due every ten steps, from the first two residuals on: the switch of the average to the history
    # takes one cycle
    late = [0, 0, 1, 1, 2, 2, 3, 3]
    assert curves["anderson_smoothing"]["attempted"] == late
    assert curves["paper"]["attempted"] == curves["paper"]["accepted"] == late
    assert curves["aadl"]["attempted"] == [0, 1, 1, 2, 2, 3, 3, 4]
    # the losses before and after, and a second one before in the first two evaluations; no
    # candidate of a PINN is vetoed as noise
    assert curves["anderson_smoothing"]["loss_evaluations"] == [0, 0, 3, 3, 6, 6, 8, 8]
    assert curves["aadl"]["loss_evaluations"] == [0, 3, 3, 6, 6, 8, 8, 10]
    assert curves["paper"]["loss_evaluations"] == [0] * 8
    assert curves["plain"]["attempted"] == [0] * 8
    assert runs["plain"].smoothing_on is None
    assert len(runs["anderson_smoothing"].rsd) == 8  # windows of five steps
    assert len(runs["smoothing"].rsd) == 4  # of ten
    assert 15 < curves["lbfgs"]["gradients"][-1] <= 40
    ends = {curve["values"][-1] for curve in curves.values()}
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
    assert len({job.labels["fingerprint"] for job in made.jobs}) == len(made.jobs)
    assert len({job.labels["configuration"] for job in made.jobs}) == len(made.variants)
    assert {job.labels["comparison"] for job in made.jobs} == {made.comparison}
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
    printed = capsys.readouterr()
    folder = empty_folder / "comparisons" / f"{OWN}.Module" / "paper"
    assert "3 variants x 2 seeds = 6 runs, 0 of them are there already" in printed.err
    assert "to make: plain@3x, seeds 0, 1" in printed.err
    assert re.search(r"1 of 6 runs: plain, seed 0; \d:\d\d:\d\d left", printed.err)
    first, *_, last = printed.out.splitlines()
    assert first.startswith("Fewer than 5 seeds prove little, and a variant here has 2: add ")
    assert last == f"report: {folder.relative_to(empty_folder)}/table.md"
    report = json.loads((folder / "results.json").read_text())
    assert report["notes"] == [first]
    assert [row["variant"] for row in report["verdict"]] == ["anderson", "plain@3x"]
    assert all(cell in printed.out for row in report["verdict"] for cell in row.values())
    assert " ".join(report["variants"]) == "plain anderson plain@3x"
    plain = report["variants"]["plain"]
    assert plain["cost_to_end_of_plain"]["worst"] == 1
    assert plain["effects"]["best_over_plain"]["ratio"] == 1
    assert plain["diverged"] == 0
    assert report["config"]["module"] == {"_target_": f"{OWN}.Module", "width": 4}
    assert report["callbacks"]["plain@3x"]["learning_rate_multiple"]["multiple"] == 3
    assert (report["seeds"], len(report["runs"])) == ([0, 1], 6)
    assert report["hardware"]["cores"] == os.cpu_count()
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [row["variant"] for row in rows] == ["anderson"] * 2 + ["plain"] * 2 + ["plain@3x"] * 2
    assert {(row["gradients"], row["diverged"]) for row in rows} == {("25", "False")}
    cost = float(rows[0]["gradients"]) + LOSS_COST * float(rows[0]["loss_evaluations"])
    assert float(rows[0]["cost"]) == pytest.approx(cost)
    table = (folder / "table.md").read_text()
    assert table.count("\n| ") == 4 + 5 + 5  # verdict, medians, appendix
    for name in PICTURES:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert str(empty_folder) not in (folder / "results.json").read_text()
    (written,) = (row for row in paper_tables.table(report).splitlines() if "`anderson`" in row)
    assert f" {report['variants']['anderson']['accepted']} of " in written


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
        ("UsesLBFGS", "callbacks: optimizer=LBFGS is not supported by Ande", ["seed0"]),
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
    report = json.loads((tmp_path / "results.json").read_text())
    note = "anderson: acceleration was switched off in 1 of 1 seeds: two losses "
    assert report["notes"][1].startswith(note)
    assert [row["outcome"] for row in report["verdict"]] == ["disabled"]


@pytest.mark.usefixtures("plan")
def test_metric_not_finite_is_reported(tmp_path: Path) -> None:
    options = [*own("Diverges", tmp_path, seeds=1, epochs=1), "compare.variants=[plain@3x]"]
    outcome = compare(hydra.compose("compare", options), options, "own")
    assert [list(row.values()) for row in outcome.verdict] == [["plain@3x", "", "", "incomparable"]]
    report = json.loads((tmp_path / "results.json").read_text())
    assert [one["diverged"] for one in report["variants"].values()] == [1, 1]


@pytest.mark.usefixtures("plan", "no_pictures")
def test_report_fewer_variants_or_seeds_covers_earlier_runs(tmp_path: Path) -> None:
    def reported(*more: str) -> list[tuple[str, int]]:
        options = [*own("Module", tmp_path, seeds=2, epochs=1), *more]
        compare(hydra.compose("compare", options), options, "own")
        runs = json.loads((tmp_path / "results.json").read_text())["runs"]
        return [(run["variant"], run["seed"]) for run in runs]

    four = [("plain", 0), ("plain", 1), ("anderson", 0), ("anderson", 1)]
    assert reported() == four
    assert reported("compare.variants=[plain@3x]", "compare.seeds=1") == [
        *four[:2],
        ("plain@3x", 0),
        *four[2:],
    ]
    # of a callback with other settings, those of the command that made the report
    deeper = "callbacks.anderson.history_depth=4"
    assert reported("compare.seeds=1", deeper) == [*four[:3], ("plain@3x", 0)]
    # a report on other settings is another one, and the larger of the two stays
    assert reported("trainer.max_epochs=2", "compare.seeds=1") == [("plain", 0), ("anderson", 0)]
    (beside,) = tmp_path.glob("report-*/results.json")
    assert len(json.loads(beside.read_text())["runs"]) == 4
    assert len(list(beside.parent.iterdir())) == 7


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
        fingerprints.append(edited(plan, tmp_path, "edited_module").jobs[0].labels["fingerprint"])
    assert len(set(fingerprints)) == 3
    assert edited(plan, tmp_path, "edited_module").jobs[0].labels["fingerprint"] == fingerprints[-1]


def test_fingerprint_other_source_or_version_differs(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lightning_stableaa, "__path__", [str(tmp_path)])
    hashes = []
    for text in ("X = 1\n", "X = 2\n", "X = 1\n"):
        (tmp_path / "module.py").write_text(text)
        provenance.hash_of_package.cache_clear()
        hashes.append(provenance.hash_of_package())
    provenance.hash_of_package.cache_clear()
    monkeypatch.undo()
    assert hashes[0] == hashes[2] != hashes[1]

    (known,) = plan(*BURGERS).jobs
    monkeypatch.setattr(provenance, "hash_of_package", lambda: hashes[1])
    (other_source,) = plan(*BURGERS).jobs
    monkeypatch.undo()
    monkeypatch.setattr(provenance, "versions", lambda: versions() | {"numpy": "0"})
    (older,) = plan(*BURGERS).jobs
    jobs = (known, other_source, older)
    assert len({job.labels["fingerprint"] for job in jobs}) == 3


@pytest.mark.usefixtures("plan", "no_pictures")
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
    assert f"\n{sentence}\n" in (tmp_path / "table.md").read_text()

    (kept,) = tmp_path.glob(f"runs/plain/*/{RESULT}")
    result = json.loads(kept.read_text())
    assert result["processor"] == processor()
    kept.write_text(json.dumps(result | {"processor": "8086"}))
    compare(hydra.compose("compare", options), options, "burgers2d")
    note = json.loads((tmp_path / "results.json").read_text())["notes"][-1]
    assert note.startswith(f"Runs were made on 8086 and on {processor()}: times do not ")
    assert "2 runs, 1 of them are there already" in capsys.readouterr().err


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
    assert finished_run(job) is None

    (made,) = run_all([job], processes=1)
    assert (made.error, made.curve["gradients"][-1]) == (None, 400)
    assert made.peak_memory is not None
    assert 2**27 < made.peak_memory < 2**31  # bytes: 128 MiB would not hold PyTorch

    written = (job.folder / RESULT).stat().st_mtime_ns
    assert list(run_all([job], processes=1)) == [made]  # read, to the last digit
    assert (job.folder / RESULT).stat().st_mtime_ns == written


def test_report_json_is_finite_without_paths() -> None:
    text = to_json({"a": [1.23456789, float("inf")], "b": {"c": float("nan")}})
    assert json.loads(text) == {"a": [1.23457, None], "b": {"c": None}}
    paths = ["data.csv=/home/me/a.csv", {"b": "/data/c"}, "val/loss", 3]
    assert json.loads(to_json(paths)) == ["data.csv=a.csv", {"b": "c"}, "val/loss", 3]
    message = "FileNotFoundError: no '/home/me/a.csv' nor /data/b.csv, at 3 / 4 of them"
    shorter = "FileNotFoundError: no 'a.csv' nor b.csv, at 3 / 4 of them"
    assert json.loads(to_json(message)) == shorter


def test_style_variant_has_one_color_everywhere() -> None:
    names = [*COLORS, "anderson@3x", "anderson@cosine"]
    assert {style(name)["color"] for name in names if name.startswith("anderson@")} == {
        COLORS["anderson"]
    }
    assert len({style(name)["color"] for name in COLORS}) == len(COLORS)
    assert style("anderson@3x")["linestyle"] != style("anderson")["linestyle"]


MODULE = [f"compare.module={OWN}.Module", "compare.metric=val/loss"]
OTHER_TREE = ["compare.module=pytorch_lightning.demos.boring_classes.BoringModel"]
SWEEP = [*BURGERS, "compare.variants=[lr_sweep]"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], r"recipe is not given; choose one of .*, as in recipe=admissions_mlp"),
        ([*BURGERS, "compare.variants=[andersen]"], r".*no such choice; did you mean anderson\?"),
        (
            [*BURGERS, "compare.variants=[plain@3]"],
            r".*plain@3 has the modifier @3; write @3x for .*",
        ),
        (
            [*BURGERS, "compare.variants=[plain@3x@2x]"],
            r".*has the modifier @2x; .*each once",
        ),
        ([*BURGERS, "compare.variant=[plain]"], r"compare.variant: .* did you mean variants\?"),
        ([*BURGERS, "seed=3"], r"seed=3: a comparison has several, as in compare.seeds=.*"),
        ([*BURGERS, "callbacks=stable_aa"], r"callbacks=stable_aa: each variant brings its .*"),
        (
            [*BURGERS, "callbacks.anderson.history_depth=4", "compare.variants=[ema]"],
            r"callbacks.anderson.history_depth=4: no variant among plain, ema has that callback",
        ),
        ([*BURGERS, *ONE_RUN, "trainer.devices=2"], r".*every run of a comparison has one.*"),
        ([*BURGERS, "compare.jobs=-1"], r"compare.jobs=-1: expected a whole number >= 0"),
        ([*BURGERS, "compare.variants=ema"], r"compare.variants=ema: expected a list such as .*"),
        ([*SWEEP, "compare.lr_sweep=[3]"], r".*plain@3 has the modifier @3; .*"),
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
        (
            [*OTHER_TREE, MODULE[1], *ONE_RUN],
            r"compare.module._target_=.*: is a module of pytorch_lightning; .*",
        ),
        ([*ONE_RUN, MODULE[0]], r"compare.metric is not given: name what validation logs, .*"),
        ([*MODULE, *ONE_RUN, "+compare.module_args.depth=3"], r".*did you mean width\?"),
        ([f"compare.module={OWN}.NeedsWidth", MODULE[1]], r".*argument: 'width'; write .*"),
        ([*MODULE, "optimizer=adam"], r"optimizer=adam: has no effect beside compare.module; .*"),
        ([*MODULE, "+data.batch_size=4"], r".*write compare.datamodule_args.NAME=VALUE"),
    ],
    ids=lambda value: " ".join(value[-1:]) if isinstance(value, list) else "",
)
def test_command_user_error_is_one_sentence(
    arguments: list[str], sentence: str, refuses: Refuses
) -> None:
    refuses(main, arguments, sentence)
