"""LightningDataModules of text."""

from sparsefit.data.causal_lm_data import (
    C4DataModule,
    PythonDocsDataModule,
    TextDataModule,
    TextFilesDataModule,
    WikiTextDataModule,
)

__all__ = ["C4DataModule", "PythonDocsDataModule", "TextDataModule", "TextFilesDataModule", "WikiTextDataModule"]
