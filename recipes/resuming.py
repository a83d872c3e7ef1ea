"""Options of a resumed run that differ from those of the run that wrote its checkpoint."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

# These determine the course of training; others, such as where results go, may differ.
COMPARED = ("seed", "module", "data", "optimizer", "scheduler", "callbacks.anderson")


def warn_config_diff(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Prints one sentence on the options that differ, if any do.

    Args:
        checkpoint: beside the ``config.yaml`` of its run, or in a folder beside it.
        settings: of the run that resumes.
    """
    configs = [folder / "config.yaml" for folder in list(checkpoint.absolute().parents)[:2]]
    found = next((one for one in configs if one.is_file()), None)
    if found is None:
        return
    before, now = dict(_flat(yaml.safe_load(found.read_text()))), dict(_flat(settings))
    changed = [
        f"{name}={now.get(name)} (was {before.get(name)})"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
        and any(name == one or name.startswith(f"{one}.") for one in COMPARED)
    ]
    if changed:
        print(
            f"stableaa-train: resume_from={checkpoint}: that run had other options than this one: "
            f"{', '.join(changed)}; optimizer and scheduler go on with those of the checkpoint, "
            "and another seed or other data may put samples of training into validation",
            file=sys.stderr,
        )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
