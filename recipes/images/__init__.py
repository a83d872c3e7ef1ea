"""ResNet-50 on ImageNet or any other folder with one subfolder of images per class."""

from lightning_stableaa.recipes.images.data import ImageFolderData
from lightning_stableaa.recipes.images.module import ImageClassifier

__all__ = ["ImageClassifier", "ImageFolderData"]
