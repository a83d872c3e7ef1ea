"""Images per second of each stage of the image recipe, and of a plain pipeline beside it.

    python benchmarks/loader.py [--images 1000] [--folder DATA] [--size 224] [--source 500x375]

Everything runs in one process with one thread and is measured in seconds of processor time, which
other load on the machine changes little; n workers decode n times as much. Without ``--folder``,
photographs of the size ``--source`` are made up (the default is the usual one in ImageNet). The
plain pipeline is what torchvision's transforms do with Pillow: decode the whole file, crop, resize,
flip, convert to float, normalise, all in the worker.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_stableaa.recipes.images.crops import (
    CentralCrop,
    Crop,
    RandomResizedCrop,
    ShiftedCrop,
)
from lightning_stableaa.recipes.images.data import CroppedImages, ImageBatch, normalise
from lightning_stableaa.recipes.images.folder import ImageIndex, index_images
from lightning_stableaa.recipes.images.module import readable_cross_entropy
from lightning_stableaa.recipes.images.networks import resnet50, resnet_small

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 64


def make_photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Smooth shapes and some grain, as JPEG of quality 90: 50 kB each at 500 x 375."""
    random = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 1)):
        (folder / split / "n00").mkdir(parents=True)
        for k in range(number):
            coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize(size), dtype=np.float32)
            grain = random.normal(0, 6, smooth.shape)
            pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / split / "n00" / f"{k}.JPEG", quality=90)


def plain_sample(path: Path, crop: Crop, size: int, random: Random) -> Tensor:
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    pixels = pixels.crop(crop(*pixels.size, random)).resize((size, size), Image.Resampling.BILINEAR)
    if random.random() < 0.5:
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tensor = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous().float().div_(255)
    return tensor.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def rate(count: int, work: Callable[[], object], repeats: int = 5) -> str:
    """Images per second of processor time: the median, and the extremes."""
    rates = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        rates.append(count / (time.process_time() - start))
    return f"{statistics.median(rates):.0f} | {min(rates):.0f} .. {max(rates):.0f}"


def decode(images: ImageIndex, count: int) -> None:
    for index in range(count):
        Image.open(images.path(index)).load()


def step(network: nn.Module, images: Tensor) -> None:
    labels = torch.zeros(len(images), dtype=torch.int64)
    network.zero_grad()
    readable_cross_entropy(network(images), labels).backward()


def measure(folder: Path, size: int, count: int, crop: Crop) -> None:
    _, images, _ = index_images(folder)
    count = min(count, len(images.names))
    dataset = CroppedImages(images, crop, size, 0.5, seed=0)
    batch: ImageBatch = default_collate([dataset[index] for index in range(BATCH)])
    stages: dict[str, tuple[int, Callable[[], object]]] = {
        "decode whole files": (count, lambda: decode(images, count)),
        "ours, worker: decode and crop": (count, lambda: [dataset[0, i] for i in range(count)]),
        "ours, device: flip and normalise": (
            BATCH,
            lambda: normalise(batch, MEAN, STD, torch.float32),
        ),
        "ours, both on this core": (count, lambda: ours(dataset, count)),
        "plain, worker: everything": (count, lambda: plain(images, crop, size, count)),
    }
    for stage, (number, work) in stages.items():
        print(f"| {type(crop).__name__} | {stage} | {rate(number, work)} |", flush=True)


def ours(dataset: CroppedImages, count: int) -> None:
    for start in range(0, count, BATCH):
        samples = [dataset[0, index] for index in range(start, min(start + BATCH, count))]
        normalise(default_collate(samples), MEAN, STD, torch.float32)


def plain(images: ImageIndex, crop: Crop, size: int, count: int) -> None:
    random = Random(0)
    for start in range(0, count, BATCH):
        stop = min(start + BATCH, count)
        default_collate(
            [plain_sample(images.path(index), crop, size, random) for index in range(start, stop)]
        )


def measure_step(size: int, layout: torch.memory_format) -> None:
    small = size <= 64
    network = resnet_small() if small else resnet50()
    network.to(memory_format=layout)  # pyright: ignore[reportCallIssue]  # 'No overloads for "to"'
    images = torch.randn(BATCH if small else 8, 3, size, size).to(memory_format=layout)
    name = f"{'small ResNet' if small else 'ResNet-50'}, {str(layout).removeprefix('torch.')}"
    figures = rate(len(images), lambda: step(network, images))
    print(f"| forward and backward | {name} | {figures} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second of each stage.")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--source", default="500x375")
    options = parser.parse_args()
    torch.set_num_threads(1)
    turbo = features.check("libjpeg_turbo")
    print(f"torch {torch.__version__}, Pillow {PIL.__version__}, libjpeg-turbo {turbo}\n")
    print("| | stage | images/s | range |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made_up:
        if options.folder is None:
            width, height = map(int, options.source.split("x"))
            make_photographs(Path(made_up), options.images, (width, height))
        train_crop = ShiftedCrop() if options.size <= 64 else RandomResizedCrop()
        for crop in (train_crop, CentralCrop()):
            measure(options.folder or Path(made_up), options.size, options.images, crop)
    for layout in (torch.contiguous_format, torch.channels_last):
        measure_step(options.size, layout)


if __name__ == "__main__":
    main()
