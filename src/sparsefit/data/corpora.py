"""Data modules of single corpora: `TextDataModule` with other defaults."""

from __future__ import annotations

from typing import Any

from sparsefit.data.causal_lm_data import TextDataModule


class C4DataModule(TextDataModule):
    """Calibrates and trains on C4 as the papers do; local files have a C4 record on each line.

    By default all three texts are streamed from the hub. With a `train_source` of your own, calibration draws from it.
    To publish a perplexity, test on `wikitext:test` or `wikitext:FILE`.
    """

    def __init__(
        self,
        tokenizer: str,
        train_source: str | list[str] = "c4:train",
        calibration_source: str | list[str] | None = None,
        test_source: str | list[str] | None = "c4:validation",
        test_windows: int | None = None,
        **settings: Any,
    ) -> None:
        """Takes what `TextDataModule` takes.

        Args:
            tokenizer: "tiny-llama", a folder, a .gguf file or a hub name; in Python also a tokenizer.
            train_source: text to train on.
            calibration_source: text to calibrate on; None takes `c4:calibration` if `train_source` is `c4:train`,
                else the training text.
            test_source: text to test on.
            test_windows: the maximum number of test windows; None uses all, except for `c4:validation`, which has tens
                of thousands, of which it uses 256.
            settings: see `TextDataModule`.
        """
        if calibration_source is None and train_source == "c4:train":
            calibration_source = "c4:calibration"
        if test_windows is None and test_source == "c4:validation":
            test_windows = 256
        super().__init__(
            tokenizer,
            train_source,
            calibration_source,
            test_source=test_source,
            test_windows=test_windows,
            **settings,
        )


class WikiTextDataModule(TextDataModule):
    """WikiText-2 raw, from the hub or from raw text files (`wiki.test.raw`), a document for each article.

    It is the text on which perplexities are published: rows joined by two newlines, tokenised once.
    """

    text_kind = "wikitext"

    def __init__(
        self,
        tokenizer: str,
        train_source: str | list[str] | None = "wikitext:train",
        val_source: str | list[str] | None = "wikitext:validation",
        test_source: str | list[str] | None = "wikitext:test",
        **settings: Any,
    ) -> None:
        """Takes what `TextDataModule` takes.

        Args:
            tokenizer: "tiny-llama", a folder, a .gguf file or a hub name; in Python also a tokenizer.
            train_source: text to train on.
            val_source: text to validate on; None validates on nothing.
            test_source: text to test on.
            settings: see `TextDataModule`.
        """
        super().__init__(tokenizer, train_source, val_source=val_source, test_source=test_source, **settings)


class TextFilesDataModule(TextDataModule):
    """Text files of your own: each file, or each line of a `.jsonl` file, is a document."""

    def __init__(self, tokenizer: str, train_source: str | list[str], **settings: Any) -> None:
        """Takes what `TextDataModule` takes.

        Args:
            tokenizer: "tiny-llama", a folder, a .gguf file or a hub name; in Python also a tokenizer.
            train_source: files, folders or patterns to train on.
            settings: see `TextDataModule`.
        """
        super().__init__(tokenizer, train_source, **settings)


class PythonDocsDataModule(TextDataModule):
    """Python's own documentation: real text that every machine with Python has, in three disjoint parts."""

    def __init__(
        self,
        tokenizer: str = "tiny-llama",
        train_source: str | list[str] = "python-docs:train",
        calibration_source: str | list[str] | None = "python-docs:calibration",
        test_source: str | list[str] | None = "python-docs:test",
        sequence_length: int = 256,
        **settings: Any,
    ) -> None:
        """Takes what `TextDataModule` takes.

        Args:
            tokenizer: "tiny-llama", a folder, a .gguf file or a hub name; in Python also a tokenizer.
            train_source: text to train on.
            calibration_source: text to calibrate on; None takes the training text.
            test_source: text to test on.
            sequence_length: tokens in a training window.
            settings: see `TextDataModule`.
        """
        super().__init__(
            tokenizer,
            train_source,
            calibration_source,
            test_source=test_source,
            sequence_length=sequence_length,
            **settings,
        )
