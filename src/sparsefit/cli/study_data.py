"""Batches of a datamodule, repeatable for each seed, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.utilities.model_helpers import is_overridden

from sparsefit.errors import ConfigError


class StudyData:
    """Batches on the device, moved there by the transfer hooks of the datamodule or the module.

    Args:
        data: The datamodule, set up.
        module: The module that gets the batches.
        device: The module's device.
        seed: The first seed, for which the datamodule is used unchanged.
    """

    def __init__(self, data: LightningDataModule, module: LightningModule, device: torch.device, seed: int) -> None:
        self.data, self._module, self._device, self._seed = data, module, device, seed

    def check(self, trains: bool, calibrates: bool) -> None:
        """Check that the datamodule has the data that a study reads.

        Raises:
            ConfigError: if test data, or needed training or calibration data, are missing.
        """
        kind = type(self.data).__name__
        if trains and not is_overridden("train_dataloader", self.data):
            raise ConfigError(f"{kind} has no train_dataloader(), and the study trains: add one, or set epochs to 0")
        if not is_overridden("test_dataloader", self.data):
            raise ConfigError(f"{kind} has no test_dataloader(), which a study needs to measure its models: add one")
        if calibrates and not callable(getattr(self.data, "calibration_dataloader", None)):
            raise ConfigError(
                f"{kind} has no calibration_dataloader(): add one that gives about 128 to 4,096 training samples, "
                "prepared as for evaluation, or study scores that need no data, such as magnitude"
            )

    def calibration_dataloader(self, seed: int) -> Iterator[Any]:
        """The calibration batches of a seed, the same in each call."""
        return self._batches(self.data.calibration_dataloader, seed)

    def test_dataloader(self) -> Iterator[Any]:
        """The test batches, the same in each call."""
        return self._batches(self.data.test_dataloader, self._seed)

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Temporarily shift `hparams.seed`, if there is one, by the seed's distance from the first."""
        own = self.data.hparams.get("seed")
        if isinstance(own, int):
            self.data.hparams["seed"] = own + seed - self._seed
        try:
            yield
        finally:
            if isinstance(own, int):
                self.data.hparams["seed"] = own

    def _batches(self, make: Callable[[], Any], seed: int) -> Iterator[Any]:
        seed_everything(seed, verbose=False)
        with self.seeded(seed):
            loaders = make()
            for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
                yield from map(self._transferred, loader)

    def _transferred(self, batch: Any) -> Any:
        batch = self._hook("on_before_batch_transfer")(batch, 0)
        batch = self._hook("transfer_batch_to_device")(batch, self._device, 0)
        return self._hook("on_after_batch_transfer")(batch, 0)

    def _hook(self, name: str) -> Callable[..., Any]:
        owner = self.data if is_overridden(name, self.data) else self._module
        return getattr(owner, name)
