"""What an import brings with it, seen from new processes."""

import subprocess
import sys

UNWANTED = ("lightning", "pytorch_lightning", "hydra", "omegaconf", "matplotlib", "torchvision")

WITHOUT_LIGHTNING = f"""
import sys
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
print([name for name in {UNWANTED} if name in sys.modules])
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
counts = callbacks[1].state_dict()["counters"]
assert (counts["optimizer_steps"], counts["attempted"]) == (12, 3), counts
assert all(isinstance(one, pytorch_lightning.Callback) for one in callbacks)
print([name for name in ("lightning",) if name in sys.modules])
"""


def last_line(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_the_engine_imports_no_lightning_and_no_extras() -> None:
    assert last_line(WITHOUT_LIGHTNING) == "[]"


def test_pytorch_lightning_serves_alone() -> None:
    assert last_line(ONLY_PYTORCH_LIGHTNING) == "[]"
