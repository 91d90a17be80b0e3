"""A LightningDataModule of text that the dense model generates itself, for calibration and training without data."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparsefit.data.causal_lm_data import TextDataModule
from sparsefit.data.count_settings import check_writing
from sparsefit.data.data_position import Settings, text_digest, vocabulary_digest
from sparsefit.data.prompts import from_prompts, start_of
from sparsefit.data.windows import Calibration, generator_of, loader
from sparsefit.data.written_text import Progress, WrittenText, WrittenWindows, as_window
from sparsefit.errors import ConfigError
from sparsefit.modules.text_generation import (
    check_length,
    likely_tokens,
    sample_windows,
    weights_digest,
    writer_in,
    writing,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER = "written_text"
"""The default folder of the generated text, in the run folder."""

_KINDS = ("calibration", "training")


class SelfGeneratedDataModule(TextDataModule):
    """Windows of text that the dense model samples from its own distribution, before anything is pruned.

    They calibrate the pruning, and the pruned model trains on them: best with the dense model as its teacher
    (`distill`), as there is no limit to text from the teacher's own distribution. Validation and testing use real text,
    if given; without it nothing is evaluated. `train_source` or `calibration_source` may name real text instead of one
    of the two.

    The text is written when `WandaPruning` requests calibration data, on the model's device; in a fit without it, when
    training requests data. It is stored in a file whose name is a digest of the model's weights and all settings: a run
    that finds its file reads it. An interrupted run keeps the batches that it has already written.

    Args:
        tokenizer: "tiny-llama", a folder or a hub name; in Python also a tokenizer.
        train_tokens: tokens to write for training, rounded up to whole windows.
        calibration_samples: windows to write for calibration.
        sequence_length: tokens in a training window, and in a calibration window unless `calibration_length` says so.
        writing_batch_size: windows that are generated at once.
        temperature: logits are divided by it in sampling; 1 is the model's own distribution.
        top_p: sample only from the most likely tokens whose probabilities add up to this; 1 samples from all.
        first_tokens: begin the windows with this many most likely first tokens, in rotation; 0 also samples the first.
        prompts: real text; the windows begin with the first tokens of its documents. None begins them with the start
            token.
        prompt_tokens: how many first tokens of a document.
        folder: a folder for the files, which runs can share; None is `written_text` in the run folder (the Trainer's
            `default_root_dir`).
        train_source: real text to train on instead of the model's own.
        calibration_source: real text to calibrate on instead of the model's own.
        test_source: real text to test on; None tests on nothing.
        settings: see `TextDataModule`.

    Raises:
        ConfigError: if a setting cannot work.
    """

    def __init__(
        self,
        tokenizer: str,
        train_tokens: int = 1_000_000,
        calibration_samples: int = 128,
        sequence_length: int = 1024,
        writing_batch_size: int = 32,
        temperature: float = 1.0,
        top_p: float = 1.0,
        first_tokens: int = 0,
        prompts: str | list[str] | None = None,
        prompt_tokens: int = 8,
        folder: str | None = None,
        train_source: str | list[str] | None = None,
        calibration_source: str | list[str] | None = None,
        test_source: str | list[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(
            tokenizer,
            train_source,
            calibration_source,
            test_source=test_source,
            sequence_length=sequence_length,
            calibration_samples=calibration_samples,
            **settings,
        )
        own = {"train_tokens": train_tokens, "writing_batch_size": writing_batch_size, "temperature": temperature}
        own |= {"top_p": top_p, "first_tokens": first_tokens, "prompts": prompts, "prompt_tokens": prompt_tokens}
        self.save_hyperparameters(own | {"folder": folder})
        check_writing(self.hparams)
        self._texts: dict[str, WrittenText] = {}
        self._writer: weakref.ref[PreTrainedModel] | None = None
        self._kept: Path | None = None  # the folder of the training text of the run that is resumed
        self._trained_on: Path | None = None  # the file of the training text

    def setup(self, stage: str | None = None) -> None:
        """Computes the digest of the model while it is dense, also in a resumed run, and finds sources of real text.

        Raises:
            ConfigError: if the model cannot generate text.
        """
        super().setup(stage)
        if stage not in ("fit", None):
            return
        for name in ("val_source", "test_source", "prompts"):
            if self.hparams[name] is not None:
                self._shards(name)
        if self.trainer is not None:
            self._look_at(self.trainer.lightning_module)

    def write_with(self, module: nn.Module, progress: Progress | None = None) -> None:
        """Generates the text that is not in its file yet, with a dense model; all ranks must call this.

        `WandaPruning` calls it. Without a Trainer, call it before requesting the loaders.

        Args:
            module: The dense model, or a module that holds it.
            progress: Called with the number of batches of this rank that are done, and the number of all; all ranks
                call it at the end.

        Raises:
            ConfigError: if the model cannot generate text, or is not the one that the fit was set up with.
            DataError: if the folder cannot be written to.
        """
        self._look_at(module)
        rank, world_size = self.rank_and_world_size()
        missing = [self._texts[kind] for kind in self._wanted() if self._found(kind) is None]
        if not missing:
            return
        if self.trainer is not None and self.trainer.ckpt_path is not None:
            self._check_unchanged(module)
        total, done = sum(len(range(rank, text.batches, world_size)) for text in missing), 0

        def advance() -> None:
            nonlocal done
            done += 1
            # The last call is below, by all ranks together: a rank with less to do must not wait in it alone.
            if progress is not None and done < total:
                progress(done, total)

        precision = self.trainer.precision_plugin.predict_step_context() if self.trainer is not None else nullcontext()
        barrier = self.trainer.strategy.barrier if self.trainer is not None else lambda: None
        with writing(module) as model, precision:
            for text in missing:
                write_batch = partial(self._write_batch, model, text, self._begun(model, text))
                text.write(write_batch, advance, rank, world_size, barrier)
        if progress is not None:
            progress(total, total)

    def train_dataloader(self) -> DataLoader:
        """One epoch of the model's own text, shuffled; each epoch has another order.

        Raises:
            ConfigError: if the text is missing, and the model may already be pruned.
        """
        if self.hparams.train_source is not None:
            return super().train_dataloader()
        trainer = self.trainer
        if trainer is not None and self._found("training") is None and _trains(trainer) and _as_it_began(trainer):
            rank_zero_info("The model writes its training text.")
            self.write_with(trainer.lightning_module)
        # Lightning requests the data even for a fit that takes no step.
        idle = trainer is not None and not _trains(trainer)
        if idle:
            tokens = numpy.empty((0, 1), dtype=numpy.int32)
        else:
            text = self._of("training")
            tokens, self._trained_on = text.read(), text.path.absolute()
        windows = WrittenWindows(tokens, self.hparams.seed, *self.rank_and_world_size())
        return loader(windows, self.hparams.batch_size, self.hparams.num_workers, self.position)

    def test_dataloader(self) -> DataLoader | None:  # type: ignore[override]
        """The test text in non-overlapping windows; None without a test text."""
        return super().test_dataloader() if self.hparams.test_source is not None else None

    @property
    def deciding(self) -> Settings:  # type: ignore[override]
        """The settings that decide which windows a position in the training data refers to."""
        if self.hparams.train_source is not None:
            return super().deciding
        given, text = self.hparams, self._texts.get("training")
        if text is None:
            return {}
        settings = {
            name: (given[name], given[name]) for name in ("batch_size", "sequence_length", "train_tokens", "seed")
        }
        settings["num_workers"] = (given.num_workers, max(1, given.num_workers))  # one worker reads as none does
        decided = {name: (given.get(name, value), value) for name, value in text.decided_by.items()}
        return settings | decided | {"writing_batch_size": (given.writing_batch_size, given.writing_batch_size)}

    def state_dict(self) -> dict[str, Any]:
        """As in `ResumableDataModule`, with the path of the text that the run trains on."""
        return super().state_dict() | {"written": str(self._trained_on) if self._trained_on is not None else None}

    def check_resumable(self, state_dict: Mapping[str, Any]) -> None:
        """As in `ResumableDataModule`; also checks that the text exists, as a pruned model cannot generate it again.

        Raises:
            ConfigError: as in `ResumableDataModule`, or if the text is missing.
        """
        super().check_resumable(state_dict)
        if state_dict.get("written") and self.hparams.train_source is None:
            self._kept = Path(state_dict["written"]).parent
            self._of("training")

    @cached_property
    def _calibration(self) -> Calibration:
        if self.hparams.calibration_source is not None:
            return super()._calibration
        return Calibration([as_window(row) for row in self._of("calibration").read()], frozenset())

    def _calibration_documents(self) -> frozenset[tuple[str, int]]:
        return super()._calibration_documents() if self.hparams.calibration_source is not None else frozenset()

    def _wanted(self) -> Iterator[str]:
        """The kinds of text that the model must generate."""
        if self.hparams.calibration_source is None:
            yield "calibration"
        if self.hparams.train_source is None and (self.trainer is None or _trains(self.trainer)):
            yield "training"

    def _look_at(self, module: nn.Module) -> None:
        """Set the files of a model's text by its digest; once set they stay, however the model is changed."""
        writer, settings = writer_in(module), self.hparams
        if self._writer is not None and self._writer() is writer:
            return
        lengths = {"calibration": settings.calibration_length or settings.sequence_length}
        lengths["training"] = settings.sequence_length
        check_length(writer, max(lengths.values()))
        counts = {"calibration": settings.calibration_samples}
        counts["training"] = -(-settings.train_tokens // settings.sequence_length)
        decided_by = {name: settings[name] for name in ("seed", "temperature", "top_p", "first_tokens")}
        decided_by |= {"model": weights_digest(module), "tokenizer": vocabulary_digest(self.tokenizer)}
        if settings.prompts is not None:
            decided_by |= {"prompts": text_digest(self._shards("prompts")), "prompt_tokens": settings.prompt_tokens}
        batch_size, folder = settings.writing_batch_size, self._folder()
        self._texts = {
            kind: WrittenText(folder, kind, counts[kind], lengths[kind], batch_size, decided_by) for kind in _KINDS
        }
        self._writer = weakref.ref(writer)
        self.__dict__.pop("_calibration", None)  # cached from another model

    def _check_unchanged(self, module: nn.Module) -> None:
        """Check that a checkpoint from before any pruning has the weights after which the files are named."""
        if weights_digest(module) != self._texts["training"].decided_by["model"]:
            raise ConfigError(
                "the checkpoint was saved before the model was pruned, and has other weights (or another precision) "
                "than the named model: its text would be taken for that model's. Start a new run with the model as it "
                "was trained (model=FOLDER), or name real text"
            )

    def _folder(self) -> Path:
        if self.hparams.folder is not None:
            return Path(self.hparams.folder).expanduser()
        return Path(self.trainer.default_root_dir if self.trainer is not None else ".") / FOLDER

    def _found(self, kind: str) -> WrittenText | None:
        """The text if its file exists, in this run's folder or in that of the resumed run; else None."""
        text = self._texts.get(kind)
        if text is None:
            return None
        folders = [text.folder, *([self._kept] if self._kept is not None else [])]
        if self.trainer is not None and self.trainer.ckpt_path is not None:  # of a run that was moved
            folders.append(Path(self.trainer.ckpt_path).absolute().parent.parent / FOLDER)
        places = [text.lying_in(folder) for folder in folders]
        return next((place for place in places if place.path.is_file()), None)

    def _of(self, kind: str) -> WrittenText:
        found = self._found(kind)
        if found is not None:
            return found
        if kind not in self._texts:
            raise ConfigError(
                f"the {kind} text is not written yet: fit with it, or call write_with(model) while the model is dense"
            )
        raise ConfigError(
            f"the {kind} text that the dense model wrote is not in {self._texts[kind].path}, and the model can be "
            "pruned by now: restore the file, or name its folder (folder=...). A new run, in another run folder, "
            "generates it again"
        )

    def _begun(self, model: PreTrainedModel, text: WrittenText) -> Tensor:
        """The first tokens of each window, int64 (windows, first tokens)."""
        settings = self.hparams
        if settings.prompts is not None:
            generator = generator_of(settings.seed, _KINDS.index(text.kind))
            shards = self._shards("prompts")
            begun = from_prompts(shards, self.tokenizer, settings.prompt_tokens, text.windows, text.length, generator)
        else:
            start = start_of(self.tokenizer)
            likely = likely_tokens(model, start, settings.first_tokens) if settings.first_tokens else []
            begun = [[start, token] for token in likely] or [[start]]
        return torch.tensor(list(islice(cycle(begun), text.windows)))

    def _write_batch(self, model: PreTrainedModel, text: WrittenText, starts: Tensor, start: int, stop: int) -> Tensor:
        settings = self.hparams
        seed = generator_of(settings.seed, _KINDS.index(text.kind), start).initial_seed()
        return sample_windows(model, starts[start:stop], text.length, seed, settings.temperature, settings.top_p)


def _trains(trainer: Trainer) -> bool:
    return trainer.max_steps != 0 and trainer.max_epochs != 0


def _as_it_began(trainer: Trainer) -> bool:
    """Whether the model has not been changed by a checkpoint or masks."""
    pruned = any(getattr(callback, "masks", None) is not None for callback in trainer.callbacks)
    return trainer.ckpt_path is None and not pruned
