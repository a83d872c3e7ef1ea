"""What determines the outcome of a run: settings, sources, data files, versions, hardware."""

import functools
import hashlib
import inspect
import json
import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hydra.utils import get_object

import lightning_stableaa
from lightning_stableaa import recipes

PACKAGES = (
    "lightning-stableaa lightning pytorch-lightning torch torchmetrics numpy pytorch-optimizer "
    "schedulefree"
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
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES.split():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
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
    hashes: dict[str, str] = {}
    for key in ("module", "data"):
        target = (settings.get(key) or {}).get("_target_", "")
        if target and not target.startswith("lightning_stableaa."):
            source = inspect.getsourcefile(get_object(target)) or "site-packages"
            # installed packages have a version instead
            for path in (
                sorted(Path(source).parent.glob("*.py")) if "site-packages" not in source else ()
            ):
                hashes[f"{key}/{path.name}"] = _hash(path)  # what lies beside it may be imported
        for text in _texts(settings.get(key)):
            if os.path.isfile(text):  # False of what cannot be a path, where Path.is_file raises
                hashes[text] = _hash(Path(text))
    return hashes


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _hash(path: Path) -> str:
    state = path.stat()
    return _hash_of_content(path, state.st_mtime_ns, state.st_size)


@functools.cache
def _hash_of_content(path: Path, *_: int) -> str:
    """Computed once for all runs, as long as time and size stay."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            content.update(block)
    return content.hexdigest()
