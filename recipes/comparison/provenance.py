"""What determines the outcome of a run: settings, sources, data files, versions, hardware."""

import functools
import hashlib
import inspect
import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hydra.utils import get_object

import lightning_stableaa
from lightning_stableaa import recipes

PACKAGES = (
    *("lightning-stableaa", "lightning", "pytorch-lightning", "torch", "torchmetrics", "numpy"),
    *("pytorch-optimizer", "schedulefree"),
)


def hardware() -> dict[str, Any]:
    """What the numbers were measured on, without the name of the machine."""
    import torch

    return {
        "processor": _host_processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str | None]:
    """Of Python and the packages that can change a result; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), **dict.fromkeys(PACKAGES)}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def processor() -> str:
    """What has computed in this process, on which rounding depends."""
    import torch

    used = torch.cuda.is_initialized()  # there may be one that this run did not use
    return torch.cuda.get_device_name() if used else _host_processor()


def _host_processor() -> str:
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    model = re.search(r"model name\s*: (.+)", text)
    return model[1] if model else platform.processor() or platform.machine()


def fingerprint_of(settings: dict[str, Any]) -> str:
    """Hash of the settings, all sources, the data files that settings name, and versions."""
    determining = {"settings": settings, "versions": versions(), "package": hash_of_package()}
    text = json.dumps(determining | contents_of(settings), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def hash_of_package() -> str:
    """Hash of its sources: in a checkout they change while the version stays."""
    sources = hashlib.sha256()
    for folder in map(Path, [*lightning_stableaa.__path__, *recipes.__path__]):
        for path in sorted(folder.rglob("*.py")):
            sources.update(path.read_bytes())
    return sources.hexdigest()


def contents_of(settings: dict[str, Any]) -> dict[str, str]:
    """Hashes of the user's own sources, and of the data files that settings name."""
    files: dict[str, Path] = {}
    for key in ("module", "data"):
        built = settings.get(key) or {}
        target = built.get("_target_", "")
        if target and not target.startswith("lightning_stableaa."):
            source = inspect.getsourcefile(get_object(target)) or "site-packages"
            if "site-packages" not in source:  # installed packages have a version instead
                beside = Path(source).parent.glob("*.py")  # what lies there may be imported
                files |= {f"{key}/{path.name}": path for path in sorted(beside)}
        for text in _texts(built):
            if os.path.isfile(text):  # False of what cannot be a path, where Path.is_file raises
                files[text] = Path(text)
    return {name: _hash(path, path.stat().st_mtime_ns) for name, path in files.items()}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


@functools.cache
def _hash(path: Path, _changed: int) -> str:
    """Computed once for all runs, as long as the time of the last change stays."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            content.update(block)
    return content.hexdigest()
