"""COVERAGE.md names tests that exist."""

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parent


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", (FOLDER / "COVERAGE.md").read_text())
    assert len(named) > 40
    for file, name in named:
        tree = ast.parse((FOLDER / file).read_text())
        defined = {one.name for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)}
        assert name in defined, f"{file}::{name}"
