"""Constructors read from source, against the constructors themselves."""

import dataclasses
import inspect
import re
import typing
from importlib.resources import files
from pathlib import Path

import pytest
from hydra.utils import get_object

from lightning_stableaa.recipes.signatures import Unresolved, class_attribute, find, parameters

CONF = Path(str(files("lightning_stableaa.conf")))
TARGETS = sorted(
    {
        target
        for path in CONF.rglob("*.yaml")
        if "compare" not in path.parts
        for target in re.findall(r"^ *_target_: ([\w.]+)$", path.read_text(), re.MULTILINE)
        if target != "null"
    }
)


def taken(target: str) -> dict[str, typing.Any] | None:
    """Names and annotations by import; None where it takes any keyword."""
    factory = get_object(target)
    function = factory.__init__ if inspect.isclass(factory) else factory
    of = inspect.signature(function).parameters
    if any(one.kind is one.VAR_KEYWORD for one in of.values()):
        return None
    return {one.name: one.annotation for one in of.values() if one.name != "self"}


@pytest.mark.parametrize("target", TARGETS)
def test_parameters_equal_those_of_the_imported_constructor(target: str) -> None:
    expected = taken(target)
    found = parameters(target)
    assert (found and list(found)) == (expected and list(expected))
    for name, annotation in (expected or {}).items():
        if found and annotation in (int, float, bool, str):
            assert found[name] is annotation


def test_parameters_of_configured_classes_are_mostly_known() -> None:
    unknown = [target for target in TARGETS if parameters(target) is None]
    # they pass keywords on
    assert unknown == [target for target in TARGETS if taken(target) is None]
    assert len(unknown) < len(TARGETS) / 4


@pytest.mark.parametrize("recipe", ["admissions_mlp.AdmissionsModule", "images.ImageClassifier"])
@pytest.mark.parametrize("name", ["monitor", "monitor_mode", "shardable"])
def test_class_attribute_equals_the_imported_one(recipe: str, name: str) -> None:
    path = f"lightning_stableaa.recipes.{recipe}"
    assert class_attribute(path, name) == getattr(get_object(path), name)


class Expressed:
    monitor = "/".join(("val", "loss"))


def test_class_attribute_that_is_an_expression_is_imported() -> None:
    assert class_attribute(f"{__name__}.Expressed", "monitor") == "val/loss"


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("no.such.Module", ImportError, "there is no module no"),
        ("Module", ImportError, "'Module' is no import path"),
        ("torch.optim.Adamm", AttributeError, "module torch.optim has no Adamm"),
        ("lightning_stableaa.Anderson", Unresolved, "Anderson"),  # it has a __getattr__
        ("math.sqrt", Unresolved, "math"),  # written in C
    ],
)
def test_find_wrong_path_raises(path: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find(path)


class Base:
    def __init__(self, batch_size: int) -> None:
        raise NotImplementedError


@dataclasses.dataclass(init=True)
class Folder(Base):
    path: str


class Root:
    def __init__(self) -> None:
        raise NotImplementedError


class Left(Root):
    pass


class Right(Root):
    def __init__(self, rate: float, decay: int) -> None:
        raise NotImplementedError


class Diamond(Left, Right):
    pass


@pytest.mark.parametrize(
    ("kind", "names"), [(Folder, ["path"]), (Diamond, ["rate", "decay"])], ids=["dataclass", "mro"]
)
def test_parameters_follow_dataclasses_and_method_resolution_order(
    kind: type, names: list[str]
) -> None:
    found = parameters(f"{kind.__module__}.{kind.__name__}") or {}
    assert list(found) == names == list(inspect.signature(kind).parameters)
