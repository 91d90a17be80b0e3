"""LightningDataModules of text and of images."""

from sparsefit.data.causal_lm_data import TextDataModule
from sparsefit.data.corpora import C4DataModule, PythonDocsDataModule, TextFilesDataModule, WikiTextDataModule
from sparsefit.data.digits import DigitsDataModule
from sparsefit.data.image_data import ImageDataModule
from sparsefit.data.labelled_text import LabelledTextDataModule
from sparsefit.data.self_generated import SelfGeneratedDataModule

__all__ = [
    "C4DataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "LabelledTextDataModule",
    "PythonDocsDataModule",
    "SelfGeneratedDataModule",
    "TextDataModule",
    "TextFilesDataModule",
    "WikiTextDataModule",
]
