"""The documentation: its code runs, its tables equal the code, and its links lead somewhere."""

import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
import wandb
import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import lightning_stableaa
from benchmarks import figures
from lightning_stableaa import (
    AndersonAccelerator,
    AndersonCallback,
    Smoothing,
    SmoothingMonitor,
    Status,
)
from lightning_stableaa.recipes.comparison.variants import OWN_MODULE

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md")]
FENCE = re.compile(
    r"(?:<!-- (fragment|needs): ([^>]*?) -->\n)?```python[^\n]*\n(.*?)```", re.DOTALL
)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def table(page: Path, name: str) -> list[list[str]]:
    """Cells of the table after the comment that names it, without its two head lines."""
    text = read(page).split(f"<!-- table: {name} -->\n")[1].split("\n\n")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines()]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def defaults(function: Callable[..., object]) -> dict[str, str]:
    parameters = inspect.signature(function).parameters.values()
    return {one.name: repr(one.default) for one in parameters if one.kind is one.KEYWORD_ONLY}


def names_in(cells: list[str]) -> list[str]:
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


# Code


class Regression(lightning.LightningModule):
    """The ``model`` of all pages."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Data(lightning.LightningDataModule):
    """The ``data`` of all pages: two batches an epoch."""

    def train_dataloader(self) -> DataLoader[Any]:
        inputs = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=32)


def names_of_pages(folder: Path) -> dict[str, Any]:
    """What a reader has before the first line of a page."""
    torch.manual_seed(0)
    model, data = Regression(), Data()
    batches = list(data.train_dataloader())
    optimizer = model.configure_optimizers()

    def loss(batch: list[Tensor]) -> Tensor:
        return mse_loss(model(batch[0]), batch[1])

    return {
        "model": model,
        "data": data,
        "trainer": lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False),
        "optimizer": optimizer,
        "accelerator": AndersonAccelerator(optimizer),
        "batches": batches,
        "loader": 30 * batches,  # 60 steps: more than one extrapolation
        "loss": loss,
        "loss_fn": lambda: loss(batches[0]),
        "criterion": mse_loss,
        "folder": folder,
    }


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One process, for the examples with several."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_docs_python_blocks_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [one for one in FENCE.finditer(read(page)) if "--8<--" not in one[3]]
    if not blocks:
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # the settings that another test has read
    namespace = names_of_pages(tmp_path)
    for block in blocks:
        kind, condition, source = block.groups()
        line = read(page)[: block.start(3)].count("\n")
        code = compile("\n" * line + source, str(page), "exec")  # a traceback names page and line
        if kind == "needs":
            package, required = condition.split()
            numbers = [int(one) for one in version(package).split(".")[:2]]
            if numbers < [int(one) for one in required.split(".")]:
                continue
        if kind != "fragment":
            exec(code, namespace)


# Tables


@pytest.mark.parametrize("owner", [AndersonCallback, SmoothingMonitor])
def test_docs_options_equal_the_signatures(owner: type) -> None:
    rows = table(DOCS / "options.md", owner.__name__)

    documented = [(row[0].strip("`"), row[1].strip("`")) for row in rows]
    assert documented == list(defaults(owner).items())
    assert all(len(row) == 4 and all(row) for row in rows)


def test_docs_options_of_all_owners_are_the_same() -> None:
    callback = defaults(AndersonCallback)
    assert callback.pop("stochastic") == "'auto'"
    assert defaults(AndersonAccelerator) == callback | {"process_group": "None"}
    assert defaults(Smoothing) == defaults(SmoothingMonitor)


def test_readme_options_equal_the_signature() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", read(ROOT / "README.md"), re.MULTILINE)
    documented = {name: default.replace('"', "'") for name, default in rows}
    assert len(documented) == 3
    assert documented.items() <= defaults(AndersonCallback).items()


def test_docs_statuses_are_those_of_the_code() -> None:
    documented = names_in([row[0] for row in table(DOCS / "diagnostics.md", "statuses")])
    assert sorted(documented) == sorted(status.value for status in Status)


class Recorder(DummyLogger):
    """Names of everything that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.names |= set(metrics)


def test_docs_metrics_are_those_that_a_run_logs() -> None:
    recorder = Recorder()
    trainer = lightning.Trainer(
        max_epochs=60,
        callbacks=[SmoothingMonitor(), AndersonCallback(stochastic=False)],
        logger=recorder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    trainer.fit(Regression(), Data())

    counts = {f"anderson/{status.value}" for status in Status if status.rejected}
    documented = names_in([row[0] for row in table(DOCS / "diagnostics.md", "metrics")])
    logged = {name for name in recorder.names if name.startswith(("anderson/", "smoothing/"))}
    assert logged - counts == set(documented)


def test_contributing_names_every_module_once() -> None:
    documented = names_in([row[0] for row in table(ROOT / "CONTRIBUTING.md", "packages")])
    package = ROOT / "lightning_stableaa"
    modules = [one.stem for one in package.glob("[!_]*.py")]
    folders = [one.parent.name for one in package.glob("*/__init__.py")]
    assert sorted(documented) == sorted(modules + folders)


# Commands


def commands() -> Iterator[tuple[str, list[str]]]:
    """Name and overrides of every command of ours that a page or a configuration shows."""
    shown = re.compile(r"^(?:\$|#)\s+(?:[A-Z_]+=\S+ )*stableaa-(train|compare) (.+)$", re.MULTILINE)
    for path in [*PAGES, *(ROOT / "conf").rglob("*.yaml")]:
        text = re.sub(r"\\\n#?\s*", "", read(path))
        for name, words in shown.findall(text):
            overrides = [one for one in shlex.split(words) if one[0] != "-" and one != "..."]
            if name == "compare" and not any(one.startswith("recipe=") for one in overrides):
                overrides.insert(0, OWN_MODULE)
            if overrides:
                yield name, overrides


@pytest.mark.parametrize(("name", "words"), list(commands()), ids=str)
def test_docs_command_has_options_that_exist(name: str, words: list[str]) -> None:
    overrides = OverridesParser.create().parse_overrides(words)
    first = [
        f"{one.get_key_element()}={next(one.sweep_string_iterator())}"
        if one.is_sweep_override()
        else one.input_line or ""
        for one in overrides
    ]
    with initialize_config_module("lightning_stableaa.conf", version_base="1.3"):
        compose(name, first)  # raises where an option or a choice does not exist


# Links, pages, versions


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one).strip().lower().replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_docs_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    for link in re.findall(r"\[[^\]]+\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_docs_pictures_are_drawn_by_a_script(tmp_path: Path) -> None:
    figures.main(["--folder", str(tmp_path)])
    drawn = {one.name for one in tmp_path.iterdir()}
    text = "".join(read(page) for page in PAGES)
    shown = re.findall(r"!\[[^\]]+\]\((?:docs/)?pictures/([^)]+)\)", text)
    assert drawn == {one.name for one in (DOCS / "pictures").iterdir()} == set(shown)


def test_docs_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load(read(ROOT / "CITATION.cff"))
    newest = re.findall(r"^## ([\d.]+)", read(ROOT / "CHANGELOG.md"), re.MULTILINE)[0]
    assert lightning_stableaa.__version__ == citation["version"] == newest
