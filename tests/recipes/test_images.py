import math
import sys
from pathlib import Path
from random import Random
from typing import Any

import lightning
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
    timm_model,
    torchvision_resnet50,
)
from lightning_stableaa.recipes.train import train

LEFT_OUT = "(cannot|could not) be decoded"
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


class TestFolder:
    def test_classes_files_and_labels_are_sorted(self, folder):
        save(folder / "train" / "n02" / "0.png")
        save(folder / "train" / "n02" / "1.jpg")
        (folder / "train" / "n02" / "notes.txt").write_text("no image")
        (folder / "train" / ".cache").mkdir()
        classes, training, validation = index_images(folder)
        assert classes == ["n01", "n02"]
        assert training.labels.tolist() == [0] * 6 + [1] * 8
        assert [training.path(i).name for i in (0, 5, 6, 7, 8)] == [
            "n01_0.JPEG", "n01_5.JPEG", "0.png", "1.jpg", "n02_0.JPEG",
        ]  # fmt: skip
        assert training.path(8) == folder / "train" / "n02" / "n02_0.JPEG"
        assert validation.labels.tolist() == [0, 0, 1, 1]

    def test_test_folder_stands_in_for_val(self, folder):
        (folder / "val").rename(folder / "test")
        assert index_images(folder)[2].folder == folder / "test"

    def test_val_comes_before_test(self, folder):
        save(folder / "test" / "n01" / "0.png")
        assert index_images(folder)[2].folder == folder / "val"

    def test_a_class_may_lack_validation_images(self, folder):
        for path in (folder / "val" / "n01").iterdir():
            path.unlink()
        (folder / "val" / "n01").rmdir()
        assert index_images(folder)[2].labels.tolist() == [1, 1]

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
    def test_other_layouts_stop_at_once_and_show_the_right_one(self, folder, change, message):
        change(folder)
        with pytest.raises(UserError, match=message) as error:
            index_images(folder)
        assert "train/n01440764/n01440764_10026.JPEG" in str(error.value)

    def test_validation_images_without_class_folders_are_explained(self, folder):
        for path in list((folder / "val").rglob("*.JPEG")):
            path.rename(folder / "val" / path.name)
        for path in (folder / "val").glob("n0?"):
            path.rmdir()
        with pytest.raises(UserError, match="val has no class folders"):
            index_images(folder)


class TestCrops:
    def test_random_crops_lie_inside_and_have_the_drawn_size(self):
        crop, random = RandomResizedCrop(scale=(0.2, 0.5), ratio=(0.5, 2.0)), Random(0)
        boxes = [crop(300, 200, random) for _ in range(300)]
        for left, upper, right, lower in boxes:
            assert 0 <= left < right <= 300
            assert 0 <= upper < lower <= 200
            # sides are rounded to pixels
            assert 0.19 < (right - left) * (lower - upper) / 60_000 < 0.51
            assert 0.49 < (right - left) / (lower - upper) < 2.05
        assert len(set(boxes)) > 290
        assert [crop(300, 200, Random(1)) for _ in range(2)] == [crop(300, 200, Random(1))] * 2

    def test_random_crop_of_extreme_images(self):
        crop = RandomResizedCrop()
        assert crop(1, 1, Random(0)) == (0, 0, 1, 1)
        # no box of an allowed ratio has the area: the largest central one that has
        assert RandomResizedCrop(scale=(1, 1))(300, 3, Random(0)) == (148, 0, 152, 3)
        assert RandomResizedCrop(scale=(1, 1))(3, 300, Random(0)) == (0, 148, 3, 152)

    def test_central_and_shifted_crops(self):
        assert CentralCrop(0.875)(256, 512, Random(0)) == (16, 144, 240, 368)
        assert CentralCrop(0.875)(1, 1, Random(0)) == (0, 0, 1, 1)
        random = Random(0)
        corners = {ShiftedCrop(2)(32, 32, random)[:2] for _ in range(500)}
        assert corners == {(x, y) for x in range(-2, 3) for y in range(-2, 3)}


class TestDecoding:
    def test_without_draft_it_is_the_plain_pillow_pipeline(self, tmp_path):
        path = save(tmp_path / "a.jpg", (40, 30))
        box = (3, 2, 33, 28)
        image = Image.open(path).convert("RGB")
        plain = image.resize((24, 24), Image.Resampling.BILINEAR, box)
        ours = read_crop(path, lambda width, height, random: box, 24, Random(0))
        assert np.array_equal(ours, np.asarray(plain))

    @pytest.mark.parametrize("size", [100, 50, 30])
    def test_draft_decoding_shows_the_same_picture(self, tmp_path, size, monkeypatch):
        path = save(tmp_path / "a.jpg", (801, 603))
        box = (201, 101, 601, 501)
        decoded = []
        resize = Image.Image.resize
        monkeypatch.setattr(
            Image.Image,
            "resize",
            lambda image, *options: (decoded.append(image.size), resize(image, *options))[1],
        )
        ours = read_crop(path, lambda width, height, random: box, size, Random(0))
        factor = {100: 4, 50: 8, 30: 8}[size]
        assert decoded == [(math.ceil(801 / factor), math.ceil(603 / factor))]
        plain = resize(Image.open(path).crop(box), (size, size), Image.Resampling.BILINEAR)
        # of 255 levels; the two ways to shrink differ in the noise alone
        assert np.abs(ours - np.asarray(plain).astype(float)).mean() < 1.5

    @pytest.mark.parametrize(
        ("mode", "ending"),
        [
            ("L", "jpg"),
            ("CMYK", "jpg"),
            ("RGBA", "png"),
            ("P", "png"),
            ("I;16", "png"),
            ("1", "png"),
        ],
    )
    def test_every_mode_becomes_rgb(self, tmp_path, mode, ending):
        path = tmp_path / f"a.{ending}"
        if mode == "I;16":
            Image.fromarray(RANDOM.integers(0, 60_000, (20, 24), dtype=np.uint16)).save(path)
        else:
            save(path, mode=mode)
        pixels = read_crop(path, CentralCrop(), 16, Random(0))
        assert pixels.shape == (16, 16, 3)
        assert pixels.dtype == np.uint8
        if mode == "L":
            assert np.array_equal(pixels[..., 0], pixels[..., 2])

    def test_cmyk_keeps_its_colours(self, tmp_path):
        path = tmp_path / "a.jpg"
        Image.new("RGB", (16, 16), (200, 100, 50)).convert("CMYK").save(path)
        assert np.abs(read_crop(path, CentralCrop(), 8, Random(0)) - [200.0, 100, 50]).max() < 6

    def test_one_pixel_fills_the_crop(self, tmp_path):
        path = tmp_path / "a.png"
        Image.new("RGB", (1, 1), (1, 2, 3)).save(path)
        for crop in (CentralCrop(), RandomResizedCrop()):
            assert (read_crop(path, crop, 8, Random(0)) == [1, 2, 3]).all()

    def test_a_shifted_crop_is_black_outside(self, tmp_path):
        path = tmp_path / "a.png"
        Image.new("RGB", (4, 4), (9, 9, 9)).save(path)
        pixels = read_crop(path, lambda width, height, random: (-1, 2, 3, 6), 4, Random(0))
        expected = [[0, 9, 9, 9], [0, 9, 9, 9], [0, 0, 0, 0], [0, 0, 0, 0]]
        assert pixels[..., 0].tolist() == expected


def dataset(folder: Path, seed: int = 0) -> CroppedImages:
    return CroppedImages(index_images(folder)[1], RandomResizedCrop(), 8, 0.5, seed)


class TestDataset:
    def test_crops_depend_on_seed_epoch_and_index_alone(self, folder):
        images = dataset(folder)
        first = images[0, 7]
        images[3, 1]
        assert all(torch.equal(a, b) for a, b in zip(images[0, 7], first, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(images[7], first, strict=True))
        assert not torch.equal(images[1, 7].images, first.images)
        assert not torch.equal(dataset(folder, seed=1)[0, 7].images, first.images)
        assert first.labels == 1
        assert first.indices == 7

    def test_half_of_the_images_are_flipped(self, folder):
        flips = [bool(dataset(folder)[epoch, 0].flips) for epoch in range(200)]
        assert 80 < sum(flips) < 120  # three standard deviations of 200 fair coins are 21

    def test_broken_images_are_black_and_marked(self, folder):
        make_broken(folder)
        images = dataset(folder)
        labels = [int(images[0, index].labels) for index in range(6)]
        assert labels == [UNREADABLE, 0, UNREADABLE, 0, UNREADABLE, 0]
        assert images[0, 2].images.sum() == 0
        assert images[0, 2].images.shape == images[0, 1].images.shape


class TestSampler:
    def test_ranks_share_the_images_and_know_the_epoch(self, folder):
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


class TestNetworks:
    def test_resnet50_has_its_parameters(self):
        with torch.device("meta"):
            network = resnet50()
        assert sum(p.numel() for p in network.parameters()) == 25_557_032

    @pytest.mark.parametrize(
        ("build", "size"), [(lambda: resnet50(10, small_images=True), 4), (resnet_small, 8)]
    )
    def test_small_images_keep_their_resolution(self, build, size):
        network = build()
        features = network.model.resnet(torch.zeros(1, 3, 32, 32)).last_hidden_state
        assert features.shape[2:] == (size, size)
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)

    def test_small_resnet_has_its_parameters(self):
        assert sum(p.numel() for p in resnet_small().parameters()) == 175_258

    def test_narrow_networks_are_refused(self):
        with pytest.raises(ValueError, match="width must be >= 8, got 7"):
            resnet_small(width=7)

    @pytest.mark.parametrize(
        ("build", "package"), [(torchvision_resnet50, "torchvision"), (timm_model, "timm")]
    )
    def test_missing_packages_are_named(self, build, package, monkeypatch):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.models", None)
        with pytest.raises(UserError, match=f"{package} cannot be imported .*=resnet50"):
            build()


def tiny_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def data_module(folder: Path, **options) -> ImageFolderData:
    defaults = {"num_classes": 2, "size": 8, "batch_size": 4, "workers": 0}
    return ImageFolderData(str(folder), **{**defaults, **options})


def classifier(**options) -> ImageClassifier:
    return ImageClassifier(tiny_network(), sgd, num_classes=2, **options)


def trainer(path: Path, **options) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=path,
        **{"enable_checkpointing": False, **options},
    )


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


class TestModule:
    def test_norms_and_biases_do_not_decay(self):
        network = tiny_network()
        next(network.parameters()).requires_grad_(False)
        decayed, plain = decay_groups(network)
        assert [p.shape for p in decayed["params"]] == [(2, 4)]
        assert [p.shape for p in plain["params"]] == [(4,), (4,), (4,), (2,)]
        groups = sgd([decayed, plain]).param_groups
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    def test_unreadable_images_do_not_count(self, label_smoothing):
        logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([0, UNREADABLE, 2, 1, UNREADABLE])
        readable = [0, 2, 3]
        expected = cross_entropy(
            logits[readable], labels[readable], label_smoothing=label_smoothing
        )
        assert torch.allclose(readable_cross_entropy(logits, labels, label_smoothing), expected)

    def test_a_batch_without_readable_images_moves_nothing(self):
        logits = torch.randn(2, 3, requires_grad=True)
        loss = readable_cross_entropy(logits, torch.full((2,), UNREADABLE))
        loss.backward()
        assert loss.item() == 0
        assert logits.grad is not None
        assert logits.grad.abs().sum() == 0

    def test_accuracies_over_readable_images(self, tmp_path, folder):
        """Six classes, logits that rank the label 1st, 1st, 3rd, 6th; one image unreadable."""
        logits = torch.arange(6.0).repeat(5, 1)
        labels = torch.tensor([5, 5, 3, 0, UNREADABLE])
        module = ImageClassifier(tiny_network(), sgd, num_classes=6)
        module.top1.update(logits, labels)
        module.top5.update(logits, labels)
        assert module.top1.compute() == 0.5
        assert module.top5.compute() == 0.75

    @pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # in inductor
    def test_compiling_keeps_the_names_of_the_weights(self):
        assert classifier(compile=True).state_dict().keys() == classifier().state_dict().keys()

    @pytest.mark.slow
    def test_networks_are_compiled_whole(self):
        """ResNet-50 is made by the same code; a break of the graph would cost its speed."""
        images = torch.zeros(2, 3, 8, 8).to(memory_format=torch.channels_last)
        found = torch._dynamo.explain(resnet_small(width=8))(images)
        assert (found.graph_count, found.graph_break_count) == (1, 0)

    def test_two_training_steps_are_those_of_a_plain_loop(self, folder, tmp_path):
        data = data_module(folder, batch_size=6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
        module = classifier(label_smoothing=0.2)
        run = trainer(tmp_path, max_steps=2)
        run.fit(module, data)

        network = tiny_network()
        optimizer = sgd(decay_groups(network))
        sampler = EpochAndIndex(data.training, 1, 0, seed=0)
        for keys in torch.tensor(list(sampler)).split(6):
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
        assert run.callback_metrics["val/top5"] == 1


class TestData:
    def test_batches_are_channels_last_flipped_and_normalised(self):
        pixels = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
        batch = ImageBatch(pixels, torch.zeros(2), torch.tensor([False, True]), torch.arange(2))
        images = normalise(batch, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), torch.float64)
        assert images.is_contiguous(memory_format=torch.channels_last)
        expected = (pixels.double() / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor(
            [0.5, 0.6, 0.7]
        )
        expected[1] = expected[1].flip(1)
        # mean and std are single precision in the comparison
        assert torch.allclose(images, expected.permute(0, 3, 1, 2), atol=1e-6)

    def test_broken_images_are_reported_and_the_rest_is_trained_on(self, folder, tmp_path):
        broken = make_broken(folder)
        module = classifier()
        with pytest.warns(UserWarning, match=LEFT_OUT) as warnings:
            trainer(tmp_path, max_epochs=2).fit(module, data_module(folder))
        messages = [str(w.message) for w in warnings if "be decoded" in str(w.message)]
        assert sorted(messages[:-1]) == [f"{p} cannot be decoded and is left out" for p in broken]
        assert messages[-1] == "3 image(s) could not be decoded and were left out:\n" + "\n".join(
            map(str, broken)
        )
        assert all(value.isfinite().all() for value in weights(module))

    def test_broken_images_are_reported_after_a_crash_too(self, folder, tmp_path):
        make_broken(folder)

        class Crash(lightning.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                raise RuntimeError("hour nine")

        run = trainer(tmp_path, max_epochs=1, callbacks=[Crash()])
        with (
            pytest.warns(UserWarning, match=LEFT_OUT) as warnings,
            pytest.raises(RuntimeError, match="hour nine"),
        ):
            run.fit(classifier(), data_module(folder))
        assert "3 image(s) could not be decoded" in str(warnings[-1].message)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_classes": 1000}, "has 2 class folders; set model.num_classes=2"),
            ({"batch_size": 13}, "data.batch_size=13 exceeds the 12 training images"),
        ],
    )
    def test_folder_and_options_that_do_not_fit_are_explained(
        self, folder, tmp_path, options, message
    ):
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, max_epochs=1).fit(classifier(), data_module(folder, **options))

    def test_a_folder_must_be_given(self):
        with pytest.raises(UserError, match=r"data.folder is not set; expected train/CLASS/IMAGE"):
            ImageFolderData(None, num_classes=2).setup("fit")

    @pytest.mark.parametrize("workers", [0, 2])
    def test_resume_in_the_middle_of_an_epoch_is_exact(self, folder, tmp_path, workers):
        def run(name: str, **options) -> ImageClassifier:
            module = classifier()
            save_sixth = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=6)
            trainer(tmp_path, max_steps=7, callbacks=[save_sixth], enable_checkpointing=True).fit(
                module, data_module(folder, batch_size=3, workers=workers), **options
            )
            return module

        whole = run("whole")  # the second of four batches of the second epoch is the sixth step
        resumed = run("resumed", ckpt_path=tmp_path / "whole" / "step=6.ckpt")
        for ours, theirs in zip(weights(resumed), weights(whole), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("trainer", "precision"),
    [("cpu", "32-true"), ("gpu", "bf16-mixed"), ("multinode", "bf16-mixed")],
)
def test_half_precision_is_for_devices_that_are_fast_at_it(trainer, precision, compose):
    assert compose("recipe=resnet50_cifar10", f"trainer={trainer}").trainer.precision == precision


@pytest.mark.parametrize("recipe", ["resnet50_cifar10", "resnet50_imagenet"])
def test_two_steps_of_the_recipe(recipe, folder, compose):
    results = train(
        compose(
            f"recipe={recipe}",
            "data.size=32",
            "model=resnet_small",
            "model.num_classes=2",
            "model.width=8",
            "data.batch_size=6",
            "data.workers=0",
            f"data.folder={folder}",
            "trainer=cpu",
            "trainer.max_epochs=1",
            "callbacks=none",
            "callbacks.progress=null",
            "logger=none",
        )
    )
    assert results["val/top5"] == 1  # of two classes
    assert results["best/val/top1"] == results["val/top1"]
