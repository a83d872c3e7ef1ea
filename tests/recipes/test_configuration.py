"""Every file in ``conf/`` composes and instantiates, with every recipe."""

import inspect
import itertools
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


RECIPES = choices("recipe")


def build(config: DictConfig, group: str) -> object:
    return instantiate(config[group], _convert_="all")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_instantiates(recipe: str, compose: Compose) -> None:
    config = compose(f"recipe={recipe}")
    for group in ("data", "module", "callbacks", "logger", "trainer"):
        build(config, group)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("callbacks", choices("callbacks"))
def test_callbacks_go_with_every_recipe(recipe: str, callbacks: str, compose: Compose) -> None:
    built = build(compose(f"recipe={recipe}", f"callbacks={callbacks}"), "callbacks")
    assert isinstance(built, dict)
    run_utilities = {"best", "last", "progress", "learning_rate"}
    expected = {
        "none": run_utilities,
        "smoothing": run_utilities | {"smoothing"},
        "stable_aa": run_utilities | {"anderson"},
        "stable_aa_smoothing": run_utilities | {"smoothing", "anderson"},
    }
    assert set(built) == expected[callbacks]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("optimizer", choices("optimizer"))
@pytest.mark.parametrize("scheduler", choices("scheduler"))
def test_optimizer_and_scheduler_go_with_every_recipe(
    recipe: str, optimizer: str, scheduler: str, compose: Compose
) -> None:
    config = compose(f"recipe={recipe}", f"optimizer={optimizer}", f"scheduler={scheduler}")
    built = instantiate(config.optimizer, _convert_="all")([torch.nn.Parameter(torch.zeros(1))])
    assert type(built).__name__.lower() == optimizer
    if scheduler != "none":
        instantiate(config.scheduler, _convert_="all")(built, 1000)


# Data belong to a problem; images come in two sizes, with either recipe.
DATA = {
    "admissions_mlp": {"admissions"},
    "burgers100d": {"burgers100d"},
    "burgers100d_product": {"burgers100d"},
    "burgers2d": {"burgers2d"},
    "resnet50_cifar10": {"image_folder", "small_image_folder"},
    "resnet50_imagenet": {"image_folder", "small_image_folder"},
}


def test_data_go_with_their_recipes(compose: Compose) -> None:
    assert DATA.keys() == set(RECIPES)
    assert set().union(*DATA.values()) == set(choices("data"))
    for recipe, data in DATA.items():
        for choice in data:
            config = compose(f"recipe={recipe}", f"data={choice}")
            assert isinstance(build(config, "data"), lightning.LightningDataModule)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("group", "choice"),
    [
        (group, choice)
        for group in ("logger", "strategy", "trainer", "cluster")
        for choice in choices(group)
    ],
)
def test_machine_goes_with_every_recipe(
    recipe: str, group: str, choice: str, compose: Compose
) -> None:
    config = compose(f"recipe={recipe}", f"{group}={choice}")
    OmegaConf.resolve(config)
    if group == "logger":
        build(config, "logger")


@pytest.mark.parametrize(
    ("name", "callback"), [("anderson", AndersonCallback), ("smoothing", SmoothingMonitor)]
)
def test_callback_options_are_the_constructor_defaults(
    name: str, callback: type, compose: Compose
) -> None:
    config = compose("recipe=burgers2d", "callbacks=stable_aa_smoothing").callbacks[name]
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(callback).parameters.values()
    }
    # a smoothing monitor is a callback of its own, a process group no YAML value
    configurable = defaults.keys() - {"smoothing", "process_group"}
    assert {key: config[key] for key in config if key != "_target_"} == {
        key: defaults[key] for key in configurable
    }


@pytest.mark.parametrize("cluster", choices("cluster"))
@pytest.mark.parametrize("strategy", choices("strategy"))
def test_cluster_goes_with_every_strategy(cluster: str, strategy: str, compose: Compose) -> None:
    config = compose("recipe=burgers2d", f"cluster={cluster}", f"strategy={strategy}")
    OmegaConf.resolve(config)
    assert config.cluster == cluster
    # whoever may take the machines away gets a checkpoint, and finds it again
    assert (config.resume_from, "preemption" in config.callbacks) == (
        (None, False) if cluster == "local" else ("auto", True)
    )
    if strategy == "model_parallel":
        processes = config.trainer.devices * config.trainer.num_nodes
        assert config.trainer.strategy.data_parallel_size == processes
        assert processes == {"lsf_summit": 1536}.get(cluster, 1)
    elif strategy == "ddp_static":
        assert config.trainer.strategy.static_graph
    else:
        assert config.trainer.strategy == strategy


def test_multinode_takes_its_size_from_torchrun(
    compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    trainer = compose("recipe=burgers2d", "trainer=multinode").trainer
    assert (trainer.num_nodes, trainer.devices) == (2, 4)


@pytest.mark.slow
def test_every_combination_composes_and_instantiates(compose: Compose) -> None:
    """Recipe x model x optimizer x scheduler; the other groups take turns."""
    turns = itertools.cycle(
        itertools.product(choices("callbacks"), ("cpu", "auto"), choices("logger"))
    )
    seen: set[str] = set()

    def once(config: DictConfig, group: str) -> Any:
        """What a group describes; equal descriptions are built one time."""
        described = f"{group}: {OmegaConf.to_container(config[group], resolve=True)}"
        if described in seen:
            return None
        seen.add(described)
        return build(config, group)

    for recipe in RECIPES:
        of_images = recipe.startswith("resnet50")
        models = [name for name in choices("model") if name.startswith("resnet") == of_images]
        for model, optimizer, scheduler in itertools.product(
            models, choices("optimizer"), choices("scheduler")
        ):
            callbacks, trainer, logger = next(turns)
            config = compose(
                f"recipe={recipe}",
                *([f"model={model}"] if of_images else []),  # mlp: with the recipe's widths
                f"optimizer={optimizer}",
                f"scheduler={scheduler}",
                f"callbacks={callbacks}",
                f"trainer={trainer}",
                f"logger={logger}",
            )
            for group in ("callbacks", "logger", "trainer"):
                once(config, group)
            if model in ("resnet50_torchvision", "resnet50_timm"):  # need packages of their own
                continue
            with torch.device("meta"):  # as large as they are, they take no memory
                module = once(config, "module")
            if module is not None:
                made = instantiate(config.optimizer, _convert_="all")(module.parameters())
                if config.scheduler is not None:
                    instantiate(config.scheduler, _convert_="all")(made, 1000)
