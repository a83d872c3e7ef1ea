"""Entry points of the commands, which need nothing but Python to say what is missing."""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version

# package that may be missing: the extra that brings it
EXTRAS = {
    "hydra": "recipes",
    "matplotlib": "recipes",
    "omegaconf": "recipes",
    "rich": "recipes",
    "torchdata": "recipes",
    "yaml": "recipes",
    "PIL": "recipes,images",
    "transformers": "recipes,images",
}


def train() -> None:
    """Runs ``stableaa-train``."""
    _run("train")


def compare() -> None:
    """Runs ``stableaa-compare``."""
    _run("compare")


def _run(name: str) -> None:
    command = f"stableaa-{name}"
    if sys.argv[1:] == ["--version"]:
        print(versions())
        return
    try:
        importlib.import_module(f"lightning_stableaa.recipes.{name}").main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(
            f"{command}: the package {package} is not installed; "
            f"pip install 'lightning-stableaa[{EXTRAS[package]}]' brings it",
            file=sys.stderr,
        )
        sys.exit(2)


def versions() -> str:
    """Versions of this package and of those that decide a result, from what is installed."""
    texts = []
    for package in ("lightning-stableaa", "lightning", "torch"):
        try:
            texts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            texts.append(f"{package} not installed")
    return ", ".join(texts)
