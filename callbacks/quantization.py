"""`QuantizedBase`: holds the frozen sparse base in 4 or 8 bits while adapters train on it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from sparsefit.callbacks.hooks import SPLITTING
from sparsefit.callbacks.trainer_lookup import ledger_of, masks_of
from sparsefit.errors import ConfigError, MaskError
from sparsefit.recovery.base_deduplication import checksum
from sparsefit.recovery.quantize import (
    check_adapters,
    check_settings,
    dequantize_base,
    float_weights,
    quantize_base,
    quantized_weights,
    restore_scales,
    to_float_state,
)
from sparsefit.settings import named_settings

KEY = "sparsefit_quantized"
"""Key in a checkpoint of the format of the base and the scales of the quantized weights in the checkpoint."""


@named_settings
class QuantizedBase(Callback):
    """Quantizes the masked linear layers when training starts, after pruning and after the base was written in floats.

    Zeros stay exact zeros. Checkpoints hold floats, as without this callback. A resumed run builds the model in floats
    and quantizes it again, with bitwise the same result. The adapters are trained for the quantized base, so merging
    uses its values (`sparsefit.recovery.quantize.dequantize_base`), not those in base/.

    `ModelCheckpoint(save_weights_only=True)` does not call callbacks: its checkpoints hold quantized weights.

    Args:
        kind: "nf4" (4 bits) or "int8" (8 bits), by bitsandbytes; None leaves the base in floats.
        compute_dtype: Dtype of products with nf4 weights: "float32", "bfloat16" or "float16"; None is the trainer's.
        double_quant: Quantize the scales of nf4, too, which saves about half a bit per weight.

    Raises:
        ConfigError: if a setting cannot work; in `setup`, before anything is pruned, if the module cannot be trained on
            a quantized base.
    """

    def __init__(
        self,
        kind: Literal["nf4", "int8"] | None = None,
        compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        double_quant: bool = False,
    ) -> None:
        self.kind = kind
        self.compute_dtype = None if compute_dtype is None else _dtype(compute_dtype)
        self.double_quant = double_quant
        self.account: dict[str, Any] = {}
        self.origins: dict[str, int] = {}
        """State dict key of each weight quantized here -> checksum of its float values before."""
        self._scales: Mapping[str, Tensor] | None = None
        self._done = False
        if kind is not None:
            check_settings(kind, self.compute_dtype, double_quant)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module can be trained on a quantized base."""
        self._done, self._scales = False, None
        if self.kind is not None and stage == "fit":
            self._check(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize the base."""
        # If the strategy restores late, WandaPruning prunes in this hook, and may be further down the list.
        if not trainer.strategy.restore_checkpoint_after_setup or _is_pruned(trainer, pl_module):
            self._quantize(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize the base if `on_train_start` could not."""
        self._quantize(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Outside a fit, quantize the base, so that adapters are evaluated on the base they were trained on."""
        self._quantize_to_evaluate(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize the base, so that adapters are tested on the base they were trained on."""
        self._quantize_to_evaluate(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize the base, so that adapters predict on the base they were trained on."""
        self._quantize_to_evaluate(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """In a process spawned by Lightning, dequantize, as the weights are copied back to a module in floats."""
        if self.kind is not None and multiprocessing.parent_process() is not None:
            dequantize_base(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replace the quantized weights in the checkpoint by floats, and save their scales."""
        if self._done:
            scales = to_float_state(pl_module, checkpoint["state_dict"])
            checkpoint[KEY] = {"kind": self.kind, "double_quant": self.double_quant, "scales": scales}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the scales."""
        saved = checkpoint.get(KEY)
        if saved is not None:
            held, asked = (saved["kind"], saved["double_quant"]), (self.kind, self.double_quant)
            if held != asked:
                raise ConfigError(
                    f"the checkpoint's adapters were trained on a base held as {_words(*held)}, and this run asks for "
                    f"{_words(*asked)}: resume with kind: {held[0]} and double_quant: {str(held[1]).lower()}"
                )
            self._scales = saved["scales"]
        elif self.kind is not None and trainer.state.fn == TrainerFn.FITTING and checkpoint.get("global_step"):
            rank_zero_warn(
                f"The checkpoint's adapters were trained on a base in floats; from here on it is held in {self.kind}"
            )

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        if isinstance(trainer.strategy, SPLITTING):
            raise ConfigError(
                f"{type(trainer.strategy).__name__} splits weights over devices, and a quantized base must be whole on "
                "each device: take strategy ddp, or leave the base in floats"
            )
        if not any(hasattr(callback, "masks") for callback in trainer.callbacks):
            raise ConfigError("QuantizedBase holds the base of a pruned model: add WandaPruning to the callbacks")
        if getattr(module, "distill", None) is not None:
            raise ConfigError(
                "distillation needs the base in floats, as it swaps the dense weights in for the teacher's passes: "
                "leave out `distill`, or the quantization of the base"
            )
        adapter = getattr(module, "hparams", {}).get("adapter")
        if isinstance(adapter, Mapping) and adapter.get("form") == "full":
            raise ConfigError(
                "form full trains the base itself, and quantized weights cannot be trained: take form lora or "
                "masked_lora, or leave the base in floats"
            )
        check_adapters(module)

    def _quantize_to_evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING and _is_pruned(trainer, module):
            self._quantize(trainer, module)

    def _quantize(self, trainer: Trainer, module: LightningModule) -> None:
        if self.kind is None or self._done:
            return
        masks = masks_of(trainer)
        if masks is None:
            raise ConfigError("there are no masks, so there is no sparse base to quantize: add WandaPruning")
        with ledger_of(trainer).stage("quantization"):
            sums = {key: checksum(weight) for key, weight in float_weights(module, masks)}
            report = quantize_base(module, self.kind, masks, self.compute_dtype, self.double_quant)
            made = {key for key, _ in quantized_weights(module)} & sums.keys()
            if self._scales:
                restore_scales(module, self._scales)
        self._scales, self._done = None, True
        if made or not self.account:  # not in a second fit of the same module
            self.origins = {key: sums[key] for key in made}
            self.account = report.account() | {"double_quant": self.double_quant}
            self._tell(report.layers, report.left, report.bytes_before, report.bytes_after)

    def _tell(self, layers: list[str], left: Mapping[str, str], before: int, after: int) -> None:
        rank_zero_info(
            f"The base is held in {self.kind}: {len(layers)} matrices, {before / 2**20:.1f} MiB before, "
            f"{after / 2**20:.1f} MiB now."
        )
        if left:
            first, why = next(iter(left.items()))
            rank_zero_warn(f"{len(left)} pruned matrices stay in floats: {first} ({why}), ...")


def _is_pruned(trainer: Trainer, module: LightningModule) -> bool:
    masks = masks_of(trainer)
    try:
        return masks is not None and masks.verify(module) is None
    except MaskError:
        return False


def _dtype(name: str) -> torch.dtype:
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"compute_dtype is {name!r}: it must be float32, bfloat16 or float16")
    return getattr(torch, name)


def _words(kind: str | None, double_quant: bool) -> str:
    return "floats" if kind is None else f"{kind}{' with double_quant' * double_quant}"
