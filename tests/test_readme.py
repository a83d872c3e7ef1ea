"""What the documents state as tables is what the code is."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_stableaa import AndersonAccelerator, Smoothing

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table(name: str) -> dict[str, str]:
    """Option -> default, as written in the table that follows the marker."""
    text = README.split(f"<!-- {name}:")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, flags=re.MULTILINE)
    return dict(rows)


def signature(function: Any) -> dict[str, str]:
    parameters = inspect.signature(function).parameters.values()
    return {one.name: repr(one.default) for one in parameters if one.kind is one.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("name", "function"), [("options", AndersonAccelerator), ("smoothing", Smoothing)]
)
def test_tables_equal_the_signatures(name: str, function: Any) -> None:
    assert table(name) == signature(function)


def test_contributors_find_every_module_once() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    text = contributing.split("<!-- modules:")[1].split("\n\n")[0]
    columns = [line.split("|")[2] for line in text.splitlines() if line.startswith("|")]
    modules = [one.stem for one in (ROOT / "lightning_stableaa").glob("[!_]*.py")]
    assert sorted(re.findall(r"`(\w+)`", "".join(columns))) == sorted(modules)
