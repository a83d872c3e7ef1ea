"""What determines the outcome of a run; a finished run is reused where all of it is the same."""

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.utils import get_object

from lightning_stableaa.recipes.comparison.environment import hash_of_package, versions


def fingerprint_of(settings: dict[str, Any]) -> str:
    """Of the settings, all sources, the data files that settings name, and versions."""
    determining = {
        "settings": settings,
        "versions": versions(),
        "lightning_stableaa": hash_of_package(),
    } | contents_of(settings)
    text = json.dumps(determining, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def contents_of(settings: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Hashes of the user's own sources, and of the data files that settings name."""
    both = {"sources": _sources(settings), "files": _data_files(settings)}
    hashes = {kind: {label: _hash(path) for label, path in paths} for kind, paths in both.items()}
    return {kind: found for kind, found in hashes.items() if found}


def _sources(settings: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """The files of the user's own that make the module and the data.

    Those of the two classes and what lies beside them, which they may import; installed packages
    have a version instead.
    """
    for key in ("module", "data"):
        target = (settings.get(key) or {}).get("_target_", "")
        package = target.split(".")[0]
        source = inspect.getsourcefile(get_object(target)) if target else None
        if source is None or package == "lightning_stableaa" or "site-packages" in source:
            continue
        for path in sorted(Path(source).parent.glob("*.py")):
            yield f"{key}/{path.name}", path


def _data_files(settings: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """The files that the module and the data are given; folders are not looked into."""
    for key in ("module", "data"):
        for text in _texts(settings.get(key)):
            if os.path.isfile(text):  # False of what cannot be a path, where Path.is_file raises
                yield text, Path(text)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _hash(path: Path) -> str:
    found = path.stat()
    return _hash_of_content(path, found.st_mtime_ns, found.st_size)


@functools.cache
def _hash_of_content(path: Path, *_: int) -> str:
    """Once for all runs, as long as time and size stay."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
