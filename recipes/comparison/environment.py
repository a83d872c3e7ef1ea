"""What runs were made with: hardware, versions, and this package itself."""

import functools
import hashlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lightning_stableaa
from lightning_stableaa import recipes

PACKAGES = (
    "lightning-stableaa",
    "lightning",
    "pytorch-lightning",
    "torch",
    "torchmetrics",
    "numpy",
    "pytorch-optimizer",
    "schedulefree",
)


def hardware() -> dict[str, Any]:
    """What the numbers were measured on, without the name of the machine."""
    cuda = torch.cuda.is_available()
    return {
        "processor": _host_processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def versions() -> dict[str, str | None]:
    """Of Python and the packages that can change a result; None where one is not installed."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES}


def processor() -> str:
    """What has computed in this process, on which rounding depends."""
    used = torch.cuda.is_initialized()  # there may be one that was not asked for
    return torch.cuda.get_device_name() if used else _host_processor()


def _host_processor() -> str:
    information = Path("/proc/cpuinfo")
    model = None
    if information.exists():
        model = re.search(r"model name\s*: (.+)", information.read_text())
    return model[1] if model else platform.processor() or platform.machine()


@functools.cache
def hash_of_package() -> str:
    """Of its sources: in a checkout they change while the version stays."""
    found = hashlib.sha256()
    for folder in map(Path, [*lightning_stableaa.__path__, *recipes.__path__]):
        for path in sorted(folder.rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()
