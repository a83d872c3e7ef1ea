"""The figures that README and pages quote are those of committed results."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import paper_tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAPER = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")


def report(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name / "results.json").read_text())


def cells(name: str, row: str, *, block: int = 0) -> dict[str, str]:
    """Column names and cells of the row of a table, by its first cell, in the given block."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    lines = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[block].splitlines()
    head, *rows = ([one.strip() for one in line.strip("| ").split("|")] for line in lines)
    [found] = [one for one in rows if one[0] == row]
    return dict(zip(head, found, strict=True))


def result(start: str) -> str:
    """The row of the README's table of results that starts so."""
    [line] = [one for one in README.splitlines() if one.startswith(f"| {start}")]
    return line


def test_readme_admissions_is_the_committed_comparison() -> None:
    variants = report("paper/admissions_mlp")["variants"]
    sweep = report("admissions_mlp")["variants"]
    time = variants["anderson"]["effects"]["time_to_target"]
    row = result("Graduate Admissions")
    assert f"| {variants['plain']['equal_cost']['median']:.5f} " in row
    assert f"| {variants['anderson']['equal_cost']['median']:.5f} " in row
    assert f"| {sweep['plain@30x']['equal_cost']['median']:.5f} (30 times" in row
    assert f"{time['better']} of {time['seeds']} seeds" in row
    assert f"at {time['ratio']:.2f} of the cost" in row
    diverged = variants["textbook_aa"]["diverged"], variants["paper"]["diverged"]
    assert diverged == (8, 0)
    assert "diverges on the first of these problems in 8 of 10 seeds, and in none" in " ".join(
        README.split()
    )


@pytest.mark.parametrize(
    ("problem", "start"),
    [("burgers2d", "Burgers 2d, Adam"), ("burgers2d@cosine", "the same with a cosine")],
)
def test_readme_burgers_is_the_committed_ablation(problem: str, start: str) -> None:
    name = "ablation/burgers2d.md"
    best, last = (cells(name, problem, block=block)["default"] for block in (1, 2))
    row = result(start).replace("95 % ", "")
    assert f"| {last}; best so far {best} |" in row


def test_readme_small_problems_and_pdes_are_the_committed_ablations() -> None:
    small, pdes = (cells(f"ablation/{name}.md", "default") for name in ("small", "pdes"))
    better = [one["problems better / worse by 1 %"].split() for one in (small, pdes)]
    assert [one[2] for one in better] == ["0", "0"]
    best = "best validation at equal cost"
    assert f"| {float(small[best]):.2f} (geometric mean)" in result("18 small problems")
    assert f"{better[0][0]} of {better[0][4]} problems, none behind" in result("18 small problems")
    assert f"| {float(pdes[best]):.2f} (geometric mean)" in result("seven PDEs")
    assert f"{better[1][0]} of {better[1][4]} problems, none behind" in result("seven PDEs")


def test_readme_runs_without_an_accepted_candidate_are_those_committed() -> None:
    assert report("paper/burgers100d")["variants"]["anderson"]["accepted"] == 0
    summary = json.loads((RESULTS / "batch_sizes" / "summary.json").read_text())
    rows = [one for one in summary if (one["problem"], one["variant"]) == ("images", "anderson")]
    assert [one["accepted"] for one in rows] == [0] * len(rows)
    ratios = [one["best validation"] for one in rows]
    sizes = f"{rows[0]['size']} to {rows[-1]['size']:,} images per step"
    row = result("small CNN on CIFAR-10")
    assert sizes in row
    assert f"{min(ratios):.2f} to {max(ratios):.2f} (no candidate accepted)" in row


def test_readme_images_on_the_full_batch_are_the_committed_runs() -> None:
    text = (RESULTS / "full_batch_images" / "table.md").read_text(encoding="utf-8")
    rows = [[one.strip() for one in line.split("|")[1:-1]] for line in text.splitlines()[5:]]
    costs, losses = ([row[column] for row in rows if row[1] == "median"] for column in (3, 4))
    row = result("the same CNN")
    assert f"| {costs[0]} with SGD, {costs[1]} with Adam;" in row
    assert f"at equal cost {losses[0]} and {losses[1]} of plain's |" in row
    runs = [row for row in rows[2:] if row[1] != "median"]
    better = sum(float(row[3]) < 1 for row in runs)
    assert row.endswith(f"| {better} of {len(runs)} |")


def test_paper_tables_are_the_committed_comparisons() -> None:
    """A folder ``NAME_safeguard`` has newer runs of some variants of ``NAME``."""
    rows: dict[tuple[str, str], str] = {}
    for folder in sorted((RESULTS / "paper").iterdir()):
        for row in paper_tables.table(report(f"paper/{folder.name}")).splitlines()[2:]:
            rows[folder.name.removesuffix("_safeguard"), row.split("`")[1]] = row
    assert len(rows) == 5 * 7
    for row in rows.values():
        assert row in PAPER.splitlines()
