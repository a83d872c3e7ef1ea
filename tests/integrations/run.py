"""Acceleration beside other packages: each in an environment of its own, with its own example.

    python -m tests.integrations.run [NAME ...]

Every example trains three times from the same seed: plain; with a callback that never fires, which
has to be bitwise the plain run; and with the default callback. The environments are kept in
build/integrations, and docs/tried_with.md gets one row for each package that was run.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / "build" / "integrations"
PAGE = ROOT / "docs" / "tried_with.md"
PINNED = ("torch", "lightning", "pytorch-lightning", "numpy")

# module of the example: packages to install, the first is the one that is tried
EXAMPLES = {
    "pina": "pina-mathlab",
    "transformers": "transformers",
    "tensordict": "tensordict",
    "torch_geometric": "torch_geometric",
    "gpytorch": "gpytorch",
    "neuralforecast": "neuralforecast",
    "neuromancer": "neuromancer wandb",  # which it imports and does not require
    "chemprop": "chemprop",
    "scvi": "scvi-tools",
    "pytorch_forecasting": "pytorch-forecasting",
}

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

LAST = 20  # steps whose mean loss is reported

HEAD = """# Tried with

Small examples of other packages, each trained by its own Trainer and loss with the callback added
to its list and nothing else changed. `make integrations` installs each package in an environment of
its own, runs the examples in `tests/integrations` and writes this table. In every row, the run with
a callback that never fires is bitwise the plain one. Losses are those of training, the mean of the
last {last} steps, of one seed: they show that nothing breaks, not what is gained.

| package | version | model | loss, plain | loss, accelerated | accepted of attempted | remarks |
|---|---|---|---|---|---|---|
"""


# In the environment of a package


def train(name: str) -> dict[str, Any]:
    """The three runs of an example."""
    example = importlib.import_module(f"tests.integrations.{name}")
    # behind the example: the callbacks are of the class tree that it has imported
    import torch

    from lightning_stableaa import AndersonCallback
    from lightning_stableaa.callbacks.base import LightningCallback

    class Watch(LightningCallback):
        """Losses and the engine's counts; on the class, since some packages copy callbacks."""

        losses: list[float]
        state: dict[str, Any]

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            """Keep the loss."""
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            Watch.losses.append(float(loss.detach().as_subclass(torch.Tensor)))

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            """Keep the counts."""
            for one in trainer.callbacks:
                if isinstance(one, AndersonCallback):
                    Watch.state = one.state_dict()

    def run(*callbacks: Any) -> tuple[Any, float]:
        Watch.losses, Watch.state = [], {}
        lightning_of(Watch).seed_everything(0, verbose=False)
        module = example.train([Watch(), *callbacks], dict(QUIET))
        state = {key: one for key, one in module.state_dict().items() if hasattr(one, "dtype")}
        return state, statistics.fmean(Watch.losses[-LAST:])

    plain, loss = run()
    beside, _ = run(AndersonCallback(warmup_steps=10**9))
    different = [
        key
        for key, one in plain.items()
        if not torch.equal(one.nan_to_num(), beside[key].nan_to_num())
    ]
    _, accelerated = run(AndersonCallback())
    return {
        "package": example.PACKAGE,
        "version": importlib.metadata.version(example.PACKAGE),
        "model": example.MODEL,
        "plain": loss,
        "accelerated": accelerated,
        "different": different,
        "counters": Watch.state["counters"],
        "outcomes": dict(Watch.state["outcomes"]),
        "disabled": Watch.state["disabled"],
    }


def lightning_of(kind: type) -> Any:
    """The package, ``lightning.pytorch`` or ``pytorch_lightning``, that a callback is of."""
    base = next(one for one in kind.__mro__ if one.__name__ == "Callback")
    return importlib.import_module(base.__module__.split(".callbacks")[0])


# Around the environments


def install(name: str) -> Path:
    """The Python of the environment of a package, made where there is none.

    Raises:
        subprocess.CalledProcessError: the package cannot be installed.
    """
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    constraints = ENVIRONMENTS / "constraints.txt"
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line.split("==")[0] in PINNED]
    constraints.write_text("\n".join(pinned) + "\n")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "-c", constraints]
    subprocess.run(
        [*pip, "lightning", *EXAMPLES[name].split()], check=True, capture_output=True, text=True
    )
    (folder / "complete").touch()
    return python


def result_of(name: str, timeout: float) -> dict[str, Any]:
    """Install the package and run its example; ``error`` in the result where that fails."""
    try:
        python = install(name)
        command = [python, "-m", "tests.integrations.run", "--train", name]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command,
            cwd=ENVIRONMENTS,  # of what the packages write
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=timeout,
        )
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        return {"error": lines[-1] if lines else str(error)}
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {timeout:g} s"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(result: dict[str, Any]) -> str:
    """One line of the table."""
    counters = result["counters"]
    remark = ""
    if result["disabled"]:
        remark = f"switched off: {result['disabled']}"
    elif 4 * counters["accepted"] < counters["attempted"]:
        rejected = {k: n for k, n in result["outcomes"].items() if k != "accepted"}
        remark = f"most often {max(rejected, key=rejected.__getitem__)}"
    cells = [
        result["package"],
        result["version"],
        result["model"],
        f"{result['plain']:.4g}",
        f"{result['accelerated']:.4g}",
        f"{counters['accepted']} of {counters['attempted']}",
        remark.replace("_", " "),
    ]
    return f"| {' | '.join(cells)} |"


def main(words: Sequence[str] | None = None) -> int:
    """Run the examples and write the page; 1 where one fails."""
    parser = argparse.ArgumentParser(description="examples of other packages")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXAMPLES))
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for an example")
    parser.add_argument("--train", choices=EXAMPLES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.train:
        warnings.simplefilter("ignore")
        print(json.dumps(train(arguments.train)))
        return 0
    rows, failed = {}, False
    if PAGE.exists():  # of packages that are not run this time
        lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
        rows = {line.split(" | ")[0].strip("| "): line for line in lines[1:]}
    for name in arguments.names or EXAMPLES:
        result = result_of(name, arguments.timeout)
        problem = result.get("error") or ", ".join(result["different"])
        if not problem and not math.isfinite(result["accelerated"]):
            problem = "the loss is not finite"
        if problem:
            failed = True
            print(f"{name}: {problem}")
            continue
        rows[result["package"]] = row(result)
        print(rows[result["package"]], flush=True)
        body = "\n".join(rows[one] for one in sorted(rows, key=str.lower))
        PAGE.write_text(HEAD.format(last=LAST) + body + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
