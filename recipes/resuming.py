"""What a resumed run is told otherwise than the run that wrote its checkpoint."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

# Of what decides the course of training; others, such as where results go, may differ.
DECISIVE = ("seed", "module", "data", "optimizer", "scheduler", "callbacks.anderson")


def tell_differences(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Prints one sentence on the options that differ, where any does.

    Args:
        checkpoint: beside the ``config.yaml`` of its run, or in a folder beside it.
        settings: of the run that is to go on.
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
        and any(name == one or name.startswith(f"{one}.") for one in DECISIVE)
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
