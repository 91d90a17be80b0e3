"""LightningDataModules of text."""

from sparsefit.data.causal_lm_data import TextDataModule
from sparsefit.data.corpora import C4DataModule, PythonDocsDataModule, TextFilesDataModule, WikiTextDataModule

__all__ = ["C4DataModule", "PythonDocsDataModule", "TextDataModule", "TextFilesDataModule", "WikiTextDataModule"]
