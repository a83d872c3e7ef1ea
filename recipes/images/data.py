"""Batches of images: decoded and cropped by the workers, flipped and normalised on the device."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, cast

import lightning
import torch
import torch.distributed
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.images.crops import CentralCrop, Crop, RandomResizedCrop
from lightning_stableaa.recipes.images.decoding import read_crop
from lightning_stableaa.recipes.images.folder import LAYOUT, ImageIndex, index_images
from lightning_stableaa.recipes.loading import EpochSampler

UNREADABLE = -100  # label of an image that could not be decoded: torch's default ignore_index
LISTED = 10  # names in a warning


class ImageBatch(NamedTuple):
    """What the workers deliver; one image has the same fields without the first dimension."""

    images: Tensor  # (n, size, size, 3), uint8; black where unreadable
    labels: Tensor  # (n,), int64, or UNREADABLE
    flips: Tensor  # (n,), bool, whether to mirror the image
    indices: Tensor  # (n,), int64, positions in the split


class CroppedImages(Dataset[ImageBatch]):
    """The images of one split; crop and flip depend on (seed, epoch, index) alone."""

    def __init__(
        self, images: ImageIndex, crop: Crop, size: int, flip_probability: float, seed: int
    ) -> None:
        self.images = images
        self.crop = crop
        self.size = size
        self.flip_probability = flip_probability
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images.names)

    def __getitem__(self, key: tuple[int, int] | int) -> ImageBatch:
        # a bare index comes from samplers that Lightning puts in, such as for overfit_batches
        epoch, index = key if isinstance(key, tuple) else (0, key)
        # a text seed is hashed, so neighbouring images have independent streams
        random = Random(f"{self.seed} {epoch} {index}")
        flip = random.random() < self.flip_probability
        try:
            pixels = torch.from_numpy(
                read_crop(self.images.path(index), self.crop, self.size, random)
            )
            label = int(self.images.labels[index])
        except Exception:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
            pixels = torch.zeros(self.size, self.size, 3, dtype=torch.uint8)
            label = UNREADABLE
        return ImageBatch(pixels, torch.tensor(label), torch.tensor(flip), torch.tensor(index))


class EpochAndIndex(EpochSampler):
    """Pairs (epoch, index): the dataset needs the epoch, and workers may outlive it."""

    def order(self) -> Iterator[Any]:
        """This rank's pairs of the current epoch."""
        epoch = self.epoch
        return ((epoch, index) for index in super().order())


class ImageFolderData(lightning.LightningDataModule):
    """Batches (images, labels) of ``folder``: normalised (n, 3, size, size), channels last.

    Images that cannot be decoded are left out of loss and metrics; one warning at the end counts
    and names them.

    Args:
        folder: holds train/CLASS/IMAGE and val/CLASS/IMAGE (or test/ for val/).
        num_classes: of the model; compared with the number of class folders.
        size: side of the crops in pixels.
        batch_size: images per process.
        workers: processes that decode; null is one per core of this process's share.
        train_crop: crop of the training images.
        val_crop: crop of the validation images.
        flip_probability: share of the training images that are mirrored.
        mean: of the red, green and blue channels, on a scale from 0 to 1.
        std: of the channels.
        seed: decides order, crops and flips.
    """

    def __init__(
        self,
        folder: str | None,
        *,
        num_classes: int,
        size: int = 224,
        batch_size: int = 128,
        workers: int | None = None,
        train_crop: Crop | None = None,
        val_crop: Crop | None = None,
        flip_probability: float = 0.5,
        mean: Sequence[float] = (0.485, 0.456, 0.406),  # ImageNet
        std: Sequence[float] = (0.229, 0.224, 0.225),
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in [
            ("size", size, 1),
            ("batch_size", batch_size, 1),
            ("workers", workers or 0, 0),
        ]:
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                "mean and std need one number for red, green and blue each, those of std above "
                f"zero; got {list(mean)} and {list(std)}"
            )
        if not 0 <= flip_probability <= 1:
            raise ValueError(f"flip_probability must lie in [0, 1], got {flip_probability}")
        self.folder = folder
        self.num_classes = num_classes
        self.size = size
        self.batch_size = batch_size
        self.workers = workers
        self.train_crop = train_crop or RandomResizedCrop()
        self.val_crop = val_crop or CentralCrop()
        self.flip_probability = flip_probability
        self.mean = mean
        self.std = std
        self.seed = seed
        self.unreadable: set[str] = set()

    def setup(self, stage: str) -> None:
        """Lists the images.

        Raises:
            UserError: the folder is not laid out as expected, or the model has another number of
                classes.
        """
        if self.folder is None:
            raise UserError(f"data.folder is not set; {LAYOUT}")
        classes, training, validation = index_images(Path(self.folder))
        if len(classes) != self.num_classes:
            raise UserError(
                f"model.num_classes={self.num_classes}, but data.folder={self.folder} has "
                f"{len(classes)} class folders; set model.num_classes={len(classes)}"
            )
        if absent := sorted({*range(len(classes))} - {*validation.labels.tolist()}):
            rank_zero_warn(
                f"data.folder={self.folder}: {len(absent)} of {len(classes)} classes have no "
                f"images in {validation.folder.name}, and their accuracy is not measured: "
                + _listed([classes[label] for label in absent])
            )
        self.training = CroppedImages(
            training, self.train_crop, self.size, self.flip_probability, self.seed
        )
        self.validation = CroppedImages(validation, self.val_crop, self.size, 0.0, self.seed)

    def train_dataloader(self) -> StatefulDataLoader:
        """Shuffled batches without an incomplete last one, which batch normalisation dislikes."""
        loader = self._loader(self.training, shuffle=True)
        if len(loader) == 0:
            raise UserError(
                f"data.batch_size={self.batch_size} exceeds the {len(self.training)} training "
                f"images of data.folder={self.folder}; choose a smaller one"
            )
        return loader

    def val_dataloader(self) -> StatefulDataLoader:
        """All validation images in order."""
        return self._loader(self.validation, shuffle=False)

    def _loader(self, dataset: CroppedImages, shuffle: bool) -> StatefulDataLoader:
        trainer = self._trainer
        sampler = EpochAndIndex(
            dataset, trainer.world_size, trainer.global_rank, shuffle=shuffle, seed=self.seed
        )
        workers = self._worker_share() if self.workers is None else self.workers
        return StatefulDataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            drop_last=shuffle,
        )

    def _worker_share(self) -> int:
        processes = self._trainer.world_size // self._trainer.num_nodes
        linux = hasattr(os, "sched_getaffinity")  # aware of containers and batch systems
        cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
        return max(1, cores // processes)

    @property
    def _trainer(self) -> lightning.Trainer:
        assert self.trainer is not None
        return self.trainer

    def on_before_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Records the images that could not be decoded, while reading them costs no device sync.

        Raises:
            UserError: no image of the split could be decoded.
        """
        broken = batch.indices[batch.labels == UNREADABLE].tolist()
        if broken:
            images = (self.training if self._trainer.training else self.validation).images
            self.unreadable.update(str(images.path(index)) for index in broken)
            prefix = f"{images.folder}{os.sep}"
            if sum(path.startswith(prefix) for path in self.unreadable) == len(images.names):
                raise UserError(
                    f"data.folder={self.folder}: none of the {len(images.names)} images in "
                    f"{images.folder.name} can be decoded; check files such as {images.path(0)}"
                )
        return batch

    def on_after_batch_transfer(
        self, batch: ImageBatch, dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Flips and normalises."""
        dtype = cast(lightning.LightningModule, self._trainer.lightning_module).dtype
        return normalise(batch, self.mean, self.std, cast(torch.dtype, dtype)), batch.labels

    def teardown(self, stage: str) -> None:
        """Reports the images left out, by all processes together."""
        paths = self.unreadable
        if torch.distributed.is_initialized():
            gathered: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, paths)
            paths = set().union(*gathered)
        _report(paths)

    def on_exception(self, exception: BaseException) -> None:
        """Reports the images left out by the first process: the others may be gone."""
        if not isinstance(exception, UserError):
            _report(self.unreadable)


def normalise(
    batch: ImageBatch, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Images (n, 3, size, size) in ``dtype``, mirrored where ``flips``, channels last."""
    pixels = torch.where(batch.flips[:, None, None, None], batch.images.flip(2), batch.images)
    n, height, width, _ = pixels.shape
    # whole rows at a time: an inner loop over three channels is several times slower on a CPU
    scale = 1 / (255 * torch.tensor(std, dtype=dtype, device=pixels.device))
    shift = -255 * torch.tensor(mean, dtype=dtype, device=pixels.device) * scale
    rows = pixels.view(n, height, 3 * width).to(dtype)
    rows.mul_(scale.repeat(width)).add_(shift.repeat(width))
    return rows.view(n, height, width, 3).permute(0, 3, 1, 2)  # which is channels last as it is


def _report(paths: set[str]) -> None:
    if paths:
        images = "1 image" if len(paths) == 1 else f"{len(paths)} images"
        rank_zero_warn(
            f"{images} could not be decoded, left out of loss and metrics: {_listed(sorted(paths))}"
        )


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
