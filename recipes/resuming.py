"""The checkpoint from which a run goes on, and the options that its run had."""

import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_stableaa.recipes.errors import UserError

# These determine the course of training; others, such as where results go, may differ.
COMPARED = ("seed", "module", "data", "optimizer", "scheduler", "callbacks.anderson")


def checkpoint_to_resume(choice: str | None, run_folder: Path) -> Path | None:
    """The checkpoint that ``resume_from`` stands for.

    Args:
        choice: a path, ``auto`` for the newest complete checkpoint in the run folder, which may
            be none, or None.
        run_folder: of this run, as an interrupted one has left it.

    Raises:
        UserError: there is no checkpoint at the path, or not a complete one.
    """
    if choice is None:
        return None
    if choice != "auto":
        return existing_checkpoint("resume_from", choice)
    found = [*run_folder.glob("checkpoints/*.ckpt"), *run_folder.glob("hpc_ckpt_*.ckpt")]
    return max(filter(_is_complete, found), key=lambda path: path.stat().st_mtime, default=None)


def existing_checkpoint(option: str, path: str) -> Path:
    """The checkpoint at ``path``.

    Raises:
        UserError: there is none, or not a complete one.
    """
    if not Path(path).exists():
        raise UserError(f"{option}={path}: there is no such checkpoint file")
    if not _is_complete(Path(path)):
        raise UserError(f"{option}={path}: is no checkpoint, or not a complete one")
    return Path(path)


def _is_complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end: one file, or a folder of one file a process."""
    return (path / "meta.pt").is_file() if path.is_dir() else zipfile.is_zipfile(path)


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
