import pytest

from tests.supply_chain import (
    check_bounds,
    check_code,
    check_versions,
    pins,
    problems,
    requirements,
)

PROJECT = """
dependencies = [
    "torch>=2.5",  # because
    "lightning>=2.5,!=2.6.2,!=2.6.3",  # because
]

[project.optional-dependencies]
all = ["lightning-stableaa[dev]"]

[project.scripts]
command = "a:b"
"""


def test_this_repository_and_its_environment() -> None:
    assert list(problems()) == []


def test_requirements_are_read_with_their_reasons() -> None:
    found = [(one.name, reason) for one, reason in requirements(PROJECT)]
    assert found == [("torch", "because"), ("lightning", "because")]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('"torch>=2.5",', "torch>=2.5: no reason for the bound in its line"),
        ('"torch",  # because', "torch: no lower bound"),
        ('"lightning>=2.5,!=2.6.3",  # b', "lightning!=2.6.3,>=2.5: lets in 2.6.2, which is mal"),
        ('"pytorch-lightning>=2.6",  # b', "pytorch-lightning>=2.6: lets in 2.6.2, which is mal"),
    ],
)
def test_a_bound_needs_a_reason_and_keeps_malicious_releases_out(line: str, sentence: str) -> None:
    found = list(check_bounds(PROJECT.replace('"torch>=2.5",  # because', line)))
    assert found[0].startswith(f"pyproject.toml: {sentence}")


@pytest.mark.parametrize(
    ("constraints", "sentence"),
    [
        ("torch==2.4.1\n", "here: torch==2.4.1 is not within >=2.5"),
        ("PyTorch_Lightning==2.6.3\n", "here: pytorch-lightning==2.6.3 is malicious"),
    ],
)
def test_a_pin_lies_within_the_bounds(constraints: str, sentence: str) -> None:
    assert list(check_versions(PROJECT, pins("# tested\n" + constraints), "here")) == [sentence]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("torch.load(path)", "here:1: torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "here:1: torch.load without weights_only=True"),
        ("np.load(path, allow_pickle=True)", "here:1: np.load with allow_pickle"),
        ("import pickle\npickle.loads(b)", "here:2: pickle.loads runs what it reads"),
        ("yaml.load(text)", "here:1: yaml.load runs what it reads"),
    ],
)
def test_code_that_runs_what_it_reads_is_found(source: str, sentence: str) -> None:
    assert list(check_code(source, "here")) == [sentence]
    assert list(check_code("torch.load(path, weights_only=True)\nnp.load(path)", "here")) == []
