"""Every file in ``conf/`` composes and instantiates, with every recipe."""

import inspect
import math
from importlib.resources import files
from typing import Any

import lightning
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import lightning_stableaa.recipes.train  # noqa: F401  # registers the resolvers
from lightning_stableaa import AndersonCallback, SmoothingMonitor
from tests.recipes.conftest import Compose


def choices(group: str) -> list[str]:
    folder = files("lightning_stableaa.conf") / group
    names = (path.name for path in folder.iterdir())
    return sorted(name[: -len(".yaml")] for name in names if name[0] != "_")


RECIPES = [one for one in choices("recipe") if one != "own"]
TEXTBOOK: dict[str, Any] = {"lag_compensation": 0.0, "max_horizon": 0.0, "regularization": 1e-8}
AADL: dict[str, Any] = {"history_depth": 9, "accelerate_every_n_steps": 10, "relaxation": 0.5}
AADL |= TEXTBOOK | {"regularization": 0.0, "max_extrapolation": math.inf, "stochastic": False}
# what each choice of callbacks is in Python
PRESETS = {
    "none": [],
    "smoothing": [SmoothingMonitor(apply_to="weights")],
    "stable_aa": [AndersonCallback()],
    "stable_aa_smoothing": [SmoothingMonitor(), AndersonCallback()],
    "textbook_aa": [AndersonCallback(**TEXTBOOK, safeguard="none")],
    "textbook_aa_safeguard": [AndersonCallback(**TEXTBOOK)],
    "paper": [AndersonCallback(**TEXTBOOK, safeguard="none"), SmoothingMonitor()],
    "paper_safeguard": [AndersonCallback(**TEXTBOOK), SmoothingMonitor()],
    "aadl": [
        SmoothingMonitor(rsd="max", of="iterates", apply_to="weights"),
        AndersonCallback(**AADL),
    ],
}


def build(config: DictConfig, group: str) -> Any:
    return instantiate(config[group], _convert_="all")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_every_group_instantiates(recipe: str, compose: Compose) -> None:
    config = compose(f"recipe={recipe}")
    for group in ("data", "module", "callbacks", "logger", "trainer"):
        build(config, group)


@pytest.mark.parametrize("callbacks", choices("callbacks"))
def test_callbacks_preset_equals_python(callbacks: str, compose: Compose) -> None:
    built = build(compose("recipe=admissions_mlp", f"callbacks={callbacks}"), "callbacks")
    ours = [one for one in built.values() if isinstance(one, AndersonCallback | SmoothingMonitor)]
    assert set(built) - {"smoothing", "anderson"} == {"best", "last", "progress", "learning_rate"}
    for one, preset in zip(ours, PRESETS[callbacks], strict=True):
        assert type(one) is type(preset)
        for name in ("options", "smoothing", "stochastic"):
            assert getattr(one, name, None) == getattr(preset, name, None)


@pytest.mark.parametrize("callback", [AndersonCallback, SmoothingMonitor])
def test_callbacks_yaml_equals_constructor_defaults(callback: type, compose: Compose) -> None:
    name = "anderson" if callback is AndersonCallback else "smoothing"
    config = compose("recipe=admissions_mlp", "callbacks=stable_aa_smoothing").callbacks[name]
    parameters = inspect.signature(callback).parameters.values()
    # a smoothing monitor is a callback of its own
    defaults = {one.name: one.default for one in parameters if one.name != "smoothing"}
    assert {key: config[key] for key in config if key != "_target_"} == defaults


@pytest.mark.parametrize("optimizer", choices("optimizer"))
@pytest.mark.parametrize("scheduler", choices("scheduler"))
def test_optimizer_every_scheduler_instantiates(
    optimizer: str, scheduler: str, compose: Compose
) -> None:
    config = compose("recipe=burgers2d", f"optimizer={optimizer}", f"scheduler={scheduler}")
    built = build(config, "optimizer")([torch.nn.Parameter(torch.zeros(1))])
    assert type(built).__name__.lower() == optimizer
    if scheduler != "none":
        build(config, "scheduler")(built, 1000)


def test_data_every_choice_instantiates(compose: Compose) -> None:
    for recipe in RECIPES:
        of_images = recipe.startswith("resnet50")
        for choice in ("image_folder", "small_image_folder") if of_images else (None,):
            config = compose(f"recipe={recipe}", *([f"data={choice}"] if choice else []))
            assert isinstance(build(config, "data"), lightning.LightningDataModule)


@pytest.mark.parametrize("group", ["logger", "strategy", "trainer", "cluster"])
def test_machine_groups_compose(group: str, compose: Compose) -> None:
    for recipe in ("burgers2d", "resnet50_imagenet"):
        for choice in choices(group):
            config = compose(f"recipe={recipe}", f"{group}={choice}")
            OmegaConf.resolve(config)
            if group == "logger":
                build(config, "logger")


@pytest.mark.parametrize("cluster", choices("cluster"))
@pytest.mark.parametrize("strategy", choices("strategy"))
def test_cluster_every_strategy_resolves(cluster: str, strategy: str, compose: Compose) -> None:
    config = compose("recipe=burgers2d", f"cluster={cluster}", f"strategy={strategy}")
    OmegaConf.resolve(config)
    assert config.cluster == cluster
    # where machines may be taken away there is a checkpoint, and the run resumes from it
    resumes = config.resume_from, "preemption" in config.callbacks
    assert resumes == ((None, False) if cluster == "local" else ("auto", True))
    if strategy == "model_parallel":
        processes = config.trainer.devices * config.trainer.num_nodes
        assert config.trainer.strategy.data_parallel_size == processes
        assert processes == {"lsf_summit": 1536}.get(cluster, 1)
    elif strategy == "ddp_static":
        assert config.trainer.strategy.static_graph
    else:
        assert config.trainer.strategy == strategy


def test_multinode_size_comes_from_torchrun(
    compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    trainer = compose("recipe=burgers2d", "trainer=multinode").trainer
    assert (trainer.num_nodes, trainer.devices) == (2, 4)
