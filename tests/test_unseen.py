"""The problems of other kinds: a short comparison of one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import unseen


@pytest.mark.slow
def test_a_table_of_comparisons_is_written(tmp_path: Path) -> None:
    unseen.main([str(tmp_path), "--only", "Waves", "--seeds", "1", "--jobs", "0", "--epochs", "4"])
    kept = json.loads((tmp_path / "results.json").read_text())
    row = kept["problems"]["Waves"]
    assert row["steps"] == 48
    assert row["accepted"].endswith(" of 2")
    ratio, worst = row["at equal cost"]
    assert 0.2 < ratio == worst < 5
    assert kept["versions"]["torch"]
    table = (tmp_path / "table.md").read_text()
    assert "| Waves | 48 |" in table
    assert f"- Waves: {row['verdict']}" in table


def test_every_problem_trains_and_validates() -> None:
    names = [problem.module.__name__ for problem in unseen.PROBLEMS]
    assert len(set(names)) == len(names) == 18
    for problem in unseen.PROBLEMS:
        assert problem.epochs % problem.validated_every == 0  # the last epoch is validated
