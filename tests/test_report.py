"""Statuses with their hints, and the fields of a report."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

import lightning_stableaa
from lightning_stableaa import StepReport, report
from lightning_stableaa.options import Options, Smoothing

Status = report.Status

WITHOUT_HINT = {  # nothing is wrong, or the reason is in ``AndersonAccelerator.disabled``
    Status.NO_OPTIMIZER_STEP,
    Status.ACCUMULATING,
    Status.STORED,
    Status.WARMUP,
    Status.HISTORY_TOO_SHORT,
    Status.DISABLED,
    Status.ACCEPTED,
}


def test_status_rejected_means_attempted_in_vain() -> None:
    rejected = {one for one in Status if one.rejected}
    assert rejected == set(Status) - WITHOUT_HINT - {
        Status.PARAMETERS_CHANGED,
        Status.EXTERNAL_UPDATE,
    }


@pytest.mark.parametrize("status", Status)
def test_status_hint_is_one_sentence_where_something_is_wrong(status: report.Status) -> None:
    assert (status.hint == "") is (status in WITHOUT_HINT)
    assert not status.hint.endswith(".")
    assert "\n" not in status.hint
    names = {one.name for kind in (Options, Smoothing) for one in dataclasses.fields(kind)}
    mentioned = {word.strip(",:;()") for word in status.hint.split() if "_" in word}
    assert {one for one in mentioned if "." not in one and "=" not in one} <= names


def test_every_status_is_used_by_the_package() -> None:
    root = Path(lightning_stableaa.__file__).parent
    used = {
        node.attr
        for path in root.rglob("*.py")
        if path.name != "report.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert [one.name for one in Status if one.name not in used] == []


def test_every_field_of_report_is_documented() -> None:
    text = inspect.getdoc(StepReport) or ""
    fields = [one.name for one in dataclasses.fields(StepReport)]
    assert [name for name in fields if f"\n    {name}: " not in text] == []


def test_every_status_is_documented() -> None:
    (tree,) = (
        node
        for node in ast.parse(inspect.getsource(report)).body
        if isinstance(node, ast.ClassDef) and node.name == "Status"
    )
    members = [index for index, node in enumerate(tree.body) if isinstance(node, ast.Assign)]
    assert len(members) == len(Status)
    for index in members:
        text = tree.body[index + 1]
        assert isinstance(text, ast.Expr)
        assert isinstance(text.value, ast.Constant)


def test_report_repr_leaves_out_what_was_not_measured() -> None:
    shown = repr(StepReport(status=Status.STORED, stored=True, rsd=0.25))
    assert shown == f"StepReport(status={Status.STORED!r}, stored=True, rsd=0.25)"
