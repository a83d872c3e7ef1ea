import gc
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.images import ImageClassifier, ImageFolderData
from lightning_stableaa.recipes.images.crops import CentralCrop, RandomResizedCrop, ShiftedCrop
from lightning_stableaa.recipes.images.data import (
    UNREADABLE,
    CroppedImages,
    EpochAndIndex,
    ImageBatch,
    normalise,
)
from lightning_stableaa.recipes.images.decoding import read_crop
from lightning_stableaa.recipes.images.folder import index_images
from lightning_stableaa.recipes.images.module import decay_groups, readable_cross_entropy
from lightning_stableaa.recipes.images.networks import (
    resnet50,
    resnet_small,
)
from lightning_stableaa.recipes.train import train
from tests.recipes.conftest import Compose, quiet_trainer

RANDOM = np.random.default_rng(0)


def save(path: Path, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Path:
    """A smooth picture with some noise."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    levels = np.stack([x, y, 1 - x], axis=2) * 200 + RANDOM.uniform(0, 10, (height, width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels.astype(np.uint8)).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with six training and two validation images each."""
    for split, count in (("train", 6), ("val", 2)):
        for name in ("n01", "n02"):
            for number in range(count):
                save(tmp_path / "images" / split / name / f"{name}_{number}.JPEG")
    return tmp_path / "images"


def make_broken(folder: Path) -> list[Path]:
    """Replaces three training images: one cut in half, one empty, one that is no image."""
    cut, empty, text = (folder / "train" / "n01" / f"n01_{k}.JPEG" for k in (0, 2, 4))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    empty.write_bytes(b"")
    text.write_text("<html>404 not found</html>")
    return [cut, empty, text]


def test_folder_classes_and_files_are_sorted(folder: Path) -> None:
    save(folder / "train" / "n02" / "0.png")
    (folder / "train" / "n02" / "notes.txt").write_text("no image")
    (folder / "train" / ".cache").mkdir()
    classes, training, validation = index_images(folder)
    assert classes == ["n01", "n02"]
    assert training.labels.tolist() == [0] * 6 + [1] * 7
    names = ["n01_0.JPEG", "n01_5.JPEG", "0.png", "n02_0.JPEG"]
    assert [training.path(i).name for i in (0, 5, 6, 7)] == names
    assert training.path(7) == folder / "train" / "n02" / "n02_0.JPEG"
    assert validation.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.rename(f.with_name("moved")), r"data.folder=\S+images is not a folder"),
        (lambda f: (f / "train").rename(f / "training"), "has no folder train"),
        (lambda f: (f / "val").rename(f / "validation"), "has no folder val"),
        (lambda f: (f / "val" / "n02").rename(f / "val" / "n03"), "val/n03 has no counterpart"),
        (lambda f: (f / "train" / "n03").mkdir(), "train/n03 holds no image"),
    ],
)
def test_folder_other_layout_raises(
    folder: Path, change: Callable[[Path], object], message: str
) -> None:
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        index_images(folder)
    assert "train/n01440764/n01440764_10026.JPEG" in str(error.value)


def test_random_crop_lies_inside_with_drawn_size() -> None:
    crop, random = RandomResizedCrop(scale=(0.2, 0.5), ratio=(0.5, 2.0)), Random(0)
    boxes = [crop(300, 200, random) for _ in range(300)]
    for left, upper, right, lower in boxes:
        assert 0 <= left < right <= 300
        assert 0 <= upper < lower <= 200
        # sides are rounded to pixels
        assert 0.19 < (right - left) * (lower - upper) / 60_000 < 0.51
        assert 0.49 < (right - left) / (lower - upper) < 2.05
    assert len(set(boxes)) > 290


def test_crops_exact_boxes() -> None:
    assert RandomResizedCrop()(1, 1, Random(0)) == (0, 0, 1, 1)
    # no box of an allowed ratio has the area: the largest central one that has
    assert RandomResizedCrop(scale=(1, 1))(300, 3, Random(0)) == (148, 0, 152, 3)
    assert CentralCrop(0.875)(256, 512, Random(0)) == (16, 144, 240, 368)
    assert CentralCrop(0.875)(1, 1, Random(0)) == (0, 0, 1, 1)
    random = Random(0)
    corners = {ShiftedCrop(2)(32, 32, random)[:2] for _ in range(500)}
    assert corners == {(x, y) for x in range(-2, 3) for y in range(-2, 3)}


@pytest.mark.parametrize(("size", "factor"), [(100, 4), (50, 8), (30, 8)])
def test_decoding_draft_shows_same_picture(
    tmp_path: Path, size: int, factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, box = save(tmp_path / "a.jpg", (801, 603)), (201, 101, 601, 501)
    decoded = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda image, *options: (decoded.append(image.size), resize(image, *options))[1],
    )
    ours = read_crop(path, lambda width, height, random: box, size, Random(0))
    assert decoded == [(math.ceil(801 / factor), math.ceil(603 / factor))]
    plain = resize(Image.open(path).crop(box), (size, size), Image.Resampling.BILINEAR)
    # of 255 levels; the two ways to shrink differ in the noise alone
    assert np.abs(ours - np.asarray(plain).astype(float)).mean() < 1.5


def dataset(folder: Path, seed: int = 0) -> CroppedImages:
    return CroppedImages(index_images(folder)[1], RandomResizedCrop(), 8, 0.5, seed)


def test_dataset_crop_depends_on_seed_epoch_and_index(folder: Path) -> None:
    images = dataset(folder)
    first = images[0, 7]
    images[3, 1]
    assert all(torch.equal(a, b) for a, b in zip(images[0, 7], first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(images[7], first, strict=True))
    assert not torch.equal(images[1, 7].images, first.images)
    assert not torch.equal(dataset(folder, seed=1)[0, 7].images, first.images)
    assert (first.labels, first.indices) == (1, 7)
    flips = [bool(images[epoch, 0].flips) for epoch in range(200)]
    assert 80 < sum(flips) < 120  # three standard deviations of 200 fair coins are 21


def test_dataset_broken_image_is_black_and_marked(folder: Path) -> None:
    make_broken(folder)
    images = dataset(folder)
    labels = [int(images[0, index].labels) for index in range(6)]
    assert labels == [UNREADABLE, 0, UNREADABLE, 0, UNREADABLE, 0]
    assert images[0, 2].images.sum() == 0
    assert images[0, 2].images.shape == images[0, 1].images.shape


def test_sampler_ranks_share_images(folder: Path) -> None:
    samplers = [EpochAndIndex(dataset(folder), 2, rank, seed=3) for rank in range(2)]
    orders = []
    for epoch in (0, 5):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        keys: list[Any] = [list(sampler) for sampler in samplers]
        assert {key[0] for rank in keys for key in rank} == {epoch}
        orders.append([key[1] for rank in keys for key in rank])
        assert sorted(orders[-1]) == list(range(12))
    assert orders[0] != orders[1]


def test_resnet_parameter_counts() -> None:
    with torch.device("meta"):
        networks = [resnet50(), resnet_small()]
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts == [25_557_032, 175_258]


def tiny_network() -> nn.Module:
    torch.manual_seed(0)
    convolution = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(4, 2))


def sgd(parameters: Iterable[Any]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def data_module(folder: Path, **options: Any) -> ImageFolderData:
    defaults: dict[str, Any] = {"num_classes": 2, "size": 8, "batch_size": 4, "workers": 0}
    return ImageFolderData(str(folder), **{**defaults, **options})


def classifier(**options: Any) -> ImageClassifier:
    return ImageClassifier(tiny_network(), sgd, num_classes=2, **options)


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def test_decay_groups_exclude_norms_and_biases() -> None:
    network = tiny_network()
    next(network.parameters()).requires_grad_(False)
    decayed, plain = decay_groups(network)
    assert [p.shape for p in decayed["params"]] == [(2, 4)]
    assert [p.shape for p in plain["params"]] == [(4,), (4,), (4,), (2,)]
    assert [one["weight_decay"] for one in sgd([decayed, plain]).param_groups] == [0.1, 0.0]


def test_loss_unreadable_images_do_not_count() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels, readable = torch.tensor([0, UNREADABLE, 2, 1, UNREADABLE]), [0, 2, 3]
    for smoothing in (0.0, 0.1):
        expected = cross_entropy(logits[readable], labels[readable], label_smoothing=smoothing)
        assert torch.allclose(readable_cross_entropy(logits, labels, smoothing), expected)
    loss = readable_cross_entropy(logits, torch.full((5,), UNREADABLE))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0


def test_training_two_steps_equal_plain_loop(folder: Path, tmp_path: Path) -> None:
    data = data_module(folder, batch_size=6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    module = classifier(label_smoothing=0.2)
    run = quiet_trainer(max_steps=2)
    run.fit(module, data)

    network = tiny_network()
    optimizer = sgd(decay_groups(network))
    for keys in torch.tensor(list(EpochAndIndex(data.training, 1, 0, seed=0))).split(6):
        samples = [data.training[int(epoch), int(index)] for epoch, index in keys]
        images = torch.stack([s.images.flip(1) if s.flips else s.images for s in samples])
        images = images.float() / 255 - torch.tensor([0.5, 0.4, 0.3])
        images = (images / torch.tensor([0.2, 0.3, 0.4])).permute(0, 3, 1, 2)
        labels = torch.stack([s.labels for s in samples])
        optimizer.zero_grad()
        cross_entropy(network(images), labels, label_smoothing=0.2).backward()
        optimizer.step()
    for ours, theirs in zip(weights(module.network), weights(network), strict=True):
        # the order of additions differs with the memory format
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert set(run.callback_metrics) == {"train/loss", "val/loss", "val/top1", "val/top5"}


def test_batch_is_channels_last_flipped_normalised() -> None:
    pixels = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    batch = ImageBatch(pixels, torch.zeros(2), torch.tensor([False, True]), torch.arange(2))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    images = normalise(batch, mean, std, torch.float64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    expected = (pixels.double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    expected[1] = expected[1].flip(1)
    # mean and std are single precision in the comparison
    assert torch.allclose(images, expected.permute(0, 3, 1, 2), atol=1e-6)


def test_data_broken_images_are_counted_and_named_once(folder: Path) -> None:
    broken = make_broken(folder)
    module = classifier()
    with pytest.warns(UserWarning, match="could not be decoded") as warnings:
        quiet_trainer(max_epochs=2).fit(module, data_module(folder))
    (message,) = [str(one.message) for one in warnings if "decoded" in str(one.message)]
    names = ", ".join(map(str, broken))
    assert message == f"3 images could not be decoded, left out of loss and metrics: {names}"
    assert all(value.isfinite().all() for value in weights(module))


def test_data_many_broken_images_are_named_in_part(folder: Path) -> None:
    for number in range(12):
        (folder / "train" / "n01" / f"broken_{number:02}.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="12 images could not .*broken_09.png and 2 more$"):
        quiet_trainer(max_epochs=1).fit(classifier(), data_module(folder))


def test_data_all_images_broken_raises(folder: Path) -> None:
    for path in (folder / "train").rglob("*.JPEG"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"^data.folder={folder}: none of the 12 images in train"):
        quiet_trainer(max_epochs=1).fit(classifier(), data_module(folder))


def test_data_class_missing_in_validation_warns(folder: Path) -> None:
    shutil.rmtree(folder / "val" / "n02")
    with pytest.warns(UserWarning, match="1 of 2 classes have no images in val, .*: n02$"):
        data_module(folder).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "^workers must be >= 0, got -1$"),
        ({"batch_size": 0}, "^batch_size must be >= 1, got 0$"),
        ({"std": (1, 1, 0)}, r"those of std above zero; got .* and \[1, 1, 0\]$"),
        ({"mean": (0.5,)}, r"got \[0.5\] and "),
    ],
)
def test_data_invalid_option_raises(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data_module(folder, **options)


def test_data_batch_larger_than_the_training_part_raises(folder: Path) -> None:
    message = "^data.batch_size=13 exceeds the 12 training images .*; choose a smaller one$"
    with pytest.raises(UserError, match=message):
        quiet_trainer(max_epochs=1).fit(classifier(), data_module(folder, batch_size=13))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_mid_epoch_is_bitwise_equal(
    folder: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, **options: Any) -> list[torch.Tensor]:
        module = classifier()
        save_sixth = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=6)
        data = data_module(folder, batch_size=3, workers=workers)
        keeping: dict[str, Any] = {"callbacks": [save_sixth], "enable_checkpointing": True}
        quiet_trainer(max_steps=7, **keeping).fit(module, data, **options)
        return weights(module)

    whole = run("whole")  # the second of four batches of the second epoch is the sixth step
    resumed = run("resumed", ckpt_path=tmp_path / "whole" / "step=6.ckpt")
    assert all(map(torch.equal, resumed, whole))
    # Lightning leaves workers to the garbage collector, which waits five seconds for each in vain
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    gc.collect()


@pytest.mark.parametrize("recipe", ["resnet50_cifar10", "resnet50_imagenet"])
def test_recipe_one_epoch_logs_accuracy(recipe: str, folder: Path, compose: Compose) -> None:
    data = ["data.size=32", "data.batch_size=6", "data.workers=0", f"data.folder={folder}"]
    model = ["model=resnet_small", "model.num_classes=2", "model.width=8"]
    run = ["trainer=cpu", "trainer.max_epochs=1", "callbacks.progress=null", "logger=none"]
    results = train(compose(f"recipe={recipe}", *data, *model, *run))
    assert results["val/top5"] == 1  # of two classes
    assert results["best/val/top1"] == results["val/top1"]
