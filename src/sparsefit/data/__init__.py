"""LightningDataModules of text and of images."""

from sparsefit.data.causal_lm_data import TextDataModule
from sparsefit.data.corpora import C4DataModule, PythonDocsDataModule, TextFilesDataModule, WikiTextDataModule
from sparsefit.data.digits import DigitsDataModule
from sparsefit.data.image_data import ImageDataModule

__all__ = [
    "C4DataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "PythonDocsDataModule",
    "TextDataModule",
    "TextFilesDataModule",
    "WikiTextDataModule",
]
