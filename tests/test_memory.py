"""Real limits on the memory of a process: what does not fit, and what fits as promised."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits and peaks are those of Linux"),
]


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-m", "tests.memory_jobs"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_without_room_for_the_history_training_goes_on_as_it_is(seen: dict[str, Any]) -> None:
    assert seen["no room"]["statuses"] == ["out_of_memory"] * 4
    assert seen["no room"]["equal"]
    assert seen["no room"]["counted"] == 4
    (warning,) = seen["no room"]["warnings"]
    assert warning.startswith("out of memory (")
    assert warning.endswith(
        "training goes on without acceleration; the history did not fit into memory: lower "
        "history_depth, set history_device='cpu', or history='sharded' where there are several "
        "processes"
    )


def test_a_judge_without_room_rejects(seen: dict[str, Any]) -> None:
    assert seen["judge"]["statuses"][-1] == "rejected_non_finite_loss"
    assert seen["judge"]["equal"]
    assert any("(judge_samples of AndersonCallback)" in w for w in seen["judge"]["warnings"])


def test_the_gram_is_formed_by_halves_where_its_work_space_does_not_fit(
    seen: dict[str, Any],
) -> None:
    assert seen["work space"]["failed"]
    assert seen["work space"]["error"] < 1e-12


@pytest.mark.parametrize("case", ["peak", "peak with smoothing"])
def test_memory_beyond_training_is_m_plus_two_vectors(case: str, seen: dict[str, Any]) -> None:
    """Measured as the peak of the process; work space is bounded, and small beside 40 MiB."""
    expected = seen[case]["expected"] + seen[case].get("extra vectors", 0)
    assert seen[case]["accepted"] >= 1
    assert expected - 0.2 < seen[case]["vectors"] < expected * 1.05 + 0.1
