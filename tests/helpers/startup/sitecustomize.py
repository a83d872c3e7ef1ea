"""Saves a process of the tests almost half of its start, which is the import of Lightning.

TorchMetrics, which Lightning imports, imports transformers, SciPy and matplotlib wherever they are
installed, for metrics of text and sound and for plots. Here it does not see them; others do.
"""

import sys
from importlib import import_module, metadata, util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

HIDDEN = ("transformers", "scipy", "matplotlib")


class _BeforeTorchMetrics(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "torchmetrics":
            sys.meta_path.remove(self)
            imports: Any = import_module("lightning_utilities.core.imports")
            # by these two it looks for packages
            imports._version, imports.find_spec = _version, _find_spec


def _version(name: str) -> str:
    if name in HIDDEN:
        raise metadata.PackageNotFoundError(name)
    return metadata.version(name)


def _find_spec(name: str) -> ModuleSpec | None:
    return None if name in HIDDEN else util.find_spec(name)


sys.meta_path.insert(0, _BeforeTorchMetrics())
