"""What an import brings with it, and which part of the package may use which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_stableaa

ROOT = Path(lightning_stableaa.__file__).parent

UNWANTED = "lightning pytorch_lightning lightning_utilities torchmetrics hydra omegaconf matplotlib"

# The names of the package, a use of the engine, and the completion of a name: each brings its own.
IN_STEPS = f"""
import rlcompleter, sys
import lightning_stableaa
assert set(lightning_stableaa.__all__) <= set(dir(lightning_stableaa))
print([name for name in ("torch", "numpy", "lightning") if name in sys.modules])

import torch
from lightning_stableaa import AndersonAccelerator, Smoothing, Status, StepReport

w = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([w], lr=0.1)
accelerator = AndersonAccelerator(optimizer, store_every_n_steps=1, accelerate_every_n_steps=2)
for _ in range(4):
    optimizer.zero_grad()
    (w @ w).backward()
    optimizer.step()
    accelerator.step(lambda: w @ w)
assert accelerator.attempted == 2
print([name for name in {UNWANTED.split()} if name in sys.modules])

completed = rlcompleter.Completer(globals()).attr_matches("lightning_stableaa.Anderson")
print([name.split(".")[-1].strip("(") for name in sorted(completed)])
"""

ONLY_PYTORCH_LIGHTNING = """
import sys
import torch
import pytorch_lightning
from lightning_stableaa import AndersonCallback, SmoothingMonitor

class Module(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

callbacks = [
    SmoothingMonitor(rsd_threshold=1e9),
    AndersonCallback(store_every_n_steps=2, accelerate_every_n_steps=4),
]
trainer = pytorch_lightning.Trainer(
    accelerator="cpu", max_epochs=1, callbacks=callbacks, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(12, 2)))
counters = callbacks[1].state_dict()["counters"]
assert (counters["optimizer_steps"], counters["attempted"]) == (12, 3)
assert all(isinstance(one, pytorch_lightning.Callback) for one in callbacks)
print([name for name in ("lightning",) if name in sys.modules])
"""


def printed(program: str) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_import_brings_what_is_used_and_no_more() -> None:
    completed = "['AndersonAccelerator', 'AndersonCallback']"
    assert printed(IN_STEPS) == ["[]", "[]", completed]


def test_import_of_the_other_class_tree_brings_no_lightning() -> None:
    assert printed(ONLY_PYTORCH_LIGHTNING)[-1] == "[]"


# Parts of the package, and those that each may import beside itself and the public options.
COMMON = {"options", "report"}
MAY_IMPORT = {
    "core": COMMON,
    "distributed": COMMON,
    "model": COMMON | {"core", "distributed"},
    "options": set(),
    "report": {"options"},
    "checkpoint": COMMON | {"core", "distributed", "model"},
    "accelerator": COMMON | {"checkpoint", "core", "distributed", "model"},
}
ENGINE_NEEDS = {"torch", "numpy", "lightning_stableaa"} | set(sys.stdlib_module_names)


def imported_by(part: str) -> set[str]:
    """Modules imported anywhere in a folder or module of the package."""
    paths = list((ROOT / part).rglob("*.py")) or [ROOT / f"{part}.py"]
    names: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names |= {f"{node.module}.{one.name}" for one in node.names}
            elif isinstance(node, ast.Import):
                names |= {one.name for one in node.names}
    return names


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_layer_imports_only_layers_below(part: str) -> None:
    imported = imported_by(part)
    assert {name.split(".")[0] for name in imported} <= ENGINE_NEEDS
    own = {name.split(".")[1] for name in imported if name.startswith("lightning_stableaa.")}
    assert own <= MAY_IMPORT[part] | {part}


def test_public_names_are_importable_and_listed() -> None:
    for name in lightning_stableaa.__all__:
        assert getattr(lightning_stableaa, name).__name__ == name
    assert set(lightning_stableaa.__all__) <= set(dir(lightning_stableaa))
    with pytest.raises(AttributeError, match="has no attribute 'MiniBatchLoss'"):
        _ = lightning_stableaa.MiniBatchLoss
