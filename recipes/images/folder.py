"""Finding the images of a folder with one subfolder per class."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_stableaa.recipes.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png")  # in any case
LAYOUT = (
    "expected train/CLASS/IMAGE and val/CLASS/IMAGE (or test/ in place of val/), "
    "for example train/n01440764/n01440764_10026.JPEG"
)


class ImageIndex(NamedTuple):
    """The images of one split, in the order of class and file names."""

    folder: Path
    # one array of bytes: a list of a million strings is copied into every worker sooner or later,
    # since looking at a string changes its reference count
    names: np.ndarray  # (n,), relative to folder, encoded by os.fsencode
    labels: np.ndarray  # (n,), int64, positions in the sorted class names of the training split

    def path(self, index: int) -> Path:
        """Where image ``index`` lies."""
        return self.folder / os.fsdecode(self.names[index])


def index_images(folder: Path) -> tuple[list[str], ImageIndex, ImageIndex]:
    """Sorted class names, and the images for training and for validation.

    Raises:
        UserError: the folder does not have the expected layout.
    """
    if not folder.is_dir():
        raise UserError(f"data.folder={folder} is not a folder; {LAYOUT}")
    training = folder / "train"
    validation = next((p for p in (folder / "val", folder / "test") if p.is_dir()), folder / "val")
    for split in (training, validation):
        if not split.is_dir():
            raise UserError(f"data.folder={folder} has no folder {split.name}; {LAYOUT}")
    classes = _class_names(training)
    if unknown := sorted(set(_class_names(validation)) - set(classes)):
        raise UserError(
            f"data.folder={folder}: {validation.name}/{unknown[0]} has no counterpart in train; "
            f"{LAYOUT}"
        )
    return classes, _index_split(training, classes), _index_split(validation, classes)


def _class_names(split: Path) -> list[str]:
    with os.scandir(split) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    if not names:
        raise UserError(f"data.folder={split.parent}: {split.name} has no class folders; {LAYOUT}")
    return sorted(names)


def _index_split(split: Path, classes: list[str]) -> ImageIndex:
    names, labels = [], []
    for label, class_name in enumerate(classes):
        if not (split / class_name).is_dir():
            continue  # in validation; ImageFolderData warns
        images = sorted(
            name
            for name in os.listdir(split / class_name)
            if name.lower().endswith(ENDINGS) and name[0] != "."
        )
        if not images:
            raise UserError(
                f"data.folder={split.parent}: {split.name}/{class_name} holds no image "
                f"({', '.join(ENDINGS)}); {LAYOUT}"
            )
        names += [os.fsencode(f"{class_name}/{name}") for name in images]
        labels += [label] * len(images)
    return ImageIndex(split, np.array(names), np.array(labels, dtype=np.int64))
