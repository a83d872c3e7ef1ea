"""Residual networks that map images (n, 3, height, width) to logits (n, num_classes)."""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from lightning_stableaa.recipes.errors import UserError


class Logits(nn.Module):
    """The tensor in the output object of a transformers model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def resnet50(num_classes: int = 1000, small_images: bool = False) -> nn.Module:
    """ResNet-50 with the stride in the 3x3 convolutions: 25,557,032 parameters for 1000 classes.

    Args:
        num_classes: number of logits.
        small_images: see ``_resnet``.
    """
    config = ResNetConfig(num_labels=num_classes)  # pyright: ignore[reportCallIssue]  # 'No parameter named "num_labels"'
    return _resnet(config, small_images)


def resnet_small(num_classes: int = 10, width: int = 16, small_images: bool = True) -> nn.Module:
    """ResNet-14 of basic blocks with ``width``, 2 ``width`` and 4 ``width`` channels.

    With 16 channels it has 175,258 parameters and trains on a CPU.

    Raises:
        ValueError: ``width`` is below 8.
    """
    # torch 2.13 corrupts memory on a CPU in the gradient of a 1x1 convolution with stride 2 that
    # has fewer than 8 input channels and is stored channels last
    if width < 8:
        raise ValueError(f"width must be >= 8, got {width}")
    config = ResNetConfig(
        num_labels=num_classes,  # pyright: ignore[reportCallIssue]  # 'No parameter named "num_labels"'
        layer_type="basic",
        depths=[2, 2, 2],
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width],
    )
    return _resnet(config, small_images)


def _resnet(config: ResNetConfig, small_images: bool) -> nn.Module:
    """``small_images`` replaces the 7x7 stride-2 stem and its pooling by a 3x3 convolution.

    Source: He et al. 2016, Deep Residual Learning for Image Recognition, section 4.2 (CIFAR-10).
    """
    model = ResNetForImageClassification(config)
    if small_images:
        stem = model.resnet.embedder
        old = cast(nn.Conv2d, stem.embedder.convolution)
        stem.embedder.convolution = nn.Conv2d(
            old.in_channels, old.out_channels, kernel_size=3, padding=1, bias=False
        )
        nn.init.kaiming_normal_(
            stem.embedder.convolution.weight, mode="fan_out", nonlinearity="relu"
        )
        stem.pooler = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]  # declared as MaxPool2d
    return Logits(model)


def torchvision_resnet50(num_classes: int = 1000) -> nn.Module:
    """torchvision's ResNet-50, without weights.

    Raises:
        UserError: torchvision is missing or does not fit the installed torch.
    """
    try:
        from torchvision.models import resnet50  # pyright: ignore[reportMissingImports]  # optional
    except Exception as error:  # beside another torch it raises RuntimeError
        raise _missing("torchvision", error) from error
    return resnet50(num_classes=num_classes)


def timm_model(name: str = "resnet50", num_classes: int = 1000) -> nn.Module:
    """Any model of timm by its name, without weights.

    Raises:
        UserError: timm is missing or does not fit the installed torch.
    """
    try:
        from timm import create_model  # pyright: ignore[reportMissingImports]  # optional
    except Exception as error:  # it needs torchvision, see above
        raise _missing("timm", error) from error
    return create_model(name, num_classes=num_classes)


def _missing(package: str, error: Exception) -> UserError:
    return UserError(
        f"{package} cannot be imported beside torch {torch.__version__} ({error}); install "
        f"the {package} that fits it, or choose model=resnet50, which needs neither"
    )
