"""What can be known offline about the packages that this project needs; part of ``make check``.

Every bound has a reason, the tested pins and what is installed lie within the bounds, releases
known to be malicious are out of reach, and nothing in the code reads pickles.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
CODE = ("lightning_stableaa", "recipes", "benchmarks", "conf")

# Releases that carried malicious code. A bound that lets one in is an error, and so is a pin.
MALICIOUS = {
    "lightning": ("2.6.2", "2.6.3"),
    "pytorch-lightning": ("2.6.2", "2.6.3"),
}

# Calls that may run what they read.
UNSAFE = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "cloudpickle.load",
    "cloudpickle.loads",
    "dill.load",
    "dill.loads",
    "joblib.load",
    "shelve.open",
    "marshal.load",
    "marshal.loads",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "eval",
    "exec",
}


def requirements(pyproject: str) -> Iterator[tuple[Requirement, str]]:
    """Every requirement of ``pyproject.toml`` beside the reason that stands in its line."""
    _, _, listed = pyproject.partition("\ndependencies = [")
    listed, _, _ = listed.partition("\n[project.scripts]")
    for line in listed.splitlines():
        if found := re.match(r'\s*"([^"]+)",?\s*(?:#\s*(.*))?$', line):
            requirement = Requirement(found[1])
            if requirement.name != "lightning-stableaa":
                yield requirement, found[2] or ""


def pins(constraints: str) -> dict[str, str]:
    """Package to version, of a constraints file."""
    lines = (line.split("#")[0].strip() for line in constraints.splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): version for name, version in pairs}


def check_bounds(pyproject: str) -> Iterator[str]:
    """Bounds without a reason, and bounds that let a malicious release in."""
    for requirement, reason in requirements(pyproject):
        if not reason:
            yield f"pyproject.toml: {requirement}: no reason for the bound in its line"
        if not any(one.operator == ">=" for one in requirement.specifier):
            yield f"pyproject.toml: {requirement}: no lower bound"
        for version in MALICIOUS.get(canonicalize_name(requirement.name), ()):
            if requirement.specifier.contains(version):
                yield f"pyproject.toml: {requirement}: lets in {version}, which is malicious"


def check_versions(pyproject: str, versions: dict[str, str], where: str) -> Iterator[str]:
    """Versions out of bounds, or known to be malicious."""
    for requirement, _ in requirements(pyproject):
        version = versions.get(canonicalize_name(requirement.name))
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            yield f"{where}: {requirement.name}=={version} is not within {requirement.specifier}"
    for name, version in versions.items():
        if version in MALICIOUS.get(name, ()):
            yield f"{where}: {name}=={version} is malicious"


def check_code(source: str, where: str) -> Iterator[str]:
    """Calls that may run what they read."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        given = {one.arg: ast.unparse(one.value) for one in node.keywords}
        if call == "torch.load" and given.get("weights_only") != "True":
            yield f"{where}:{node.lineno}: torch.load without weights_only=True"
        if call in {"np.load", "numpy.load"} and given.get("allow_pickle", "False") != "False":
            yield f"{where}:{node.lineno}: {call} with allow_pickle"
        if call in UNSAFE:
            yield f"{where}:{node.lineno}: {call} runs what it reads"


def installed() -> dict[str, str]:
    """Package to version, of this environment."""
    found = ((one.metadata["Name"], one.version) for one in metadata.distributions())
    return {canonicalize_name(name): version for name, version in found if name}


def problems() -> Iterator[str]:
    """Everything that is wrong, one sentence each."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    yield from check_bounds(pyproject)
    for name in ("constraints.txt", "constraints-oldest.txt"):
        yield from check_versions(pyproject, pins((ROOT / name).read_text()), name)
    yield from check_versions(pyproject, installed(), "installed")
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield from check_code(path.read_text(), str(path.relative_to(ROOT)))


def main() -> int:
    """Prints every problem; 1 if there is one."""
    found = list(problems())
    print("\n".join(found) or "supply chain: bounds, pins and installed versions agree")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
