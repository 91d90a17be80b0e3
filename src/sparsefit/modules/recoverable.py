"""The base class of sparsefit's modules: settings, adapters, the dense teacher, and the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from torch import nn

from sparsefit.errors import ConfigError
from sparsefit.modules.loading import Dtype
from sparsefit.modules.optimizers import build_optimizer, check_settings, trained_parameters
from sparsefit.modules.recovery_mixin import RecoveryMixin
from sparsefit.modules.sharding import shard
from sparsefit.recovery.adapters import AdapterSettings, attach_adapter
from sparsefit.recovery.distill import DistillSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RecoverableModule(RecoveryMixin, LightningModule):
    """A model to train: all of it, its kept weights, or adapters on it; optionally with the dense model as teacher.

    A subclass passes its model to `take_model` in its `__init__`.

    Attributes:
        model: the model, PEFT-wrapped if `adapter` is one of PEFT's.
        dense_teacher: the dense model that teaches, if `distill` is given and a fit has begun.

    Args:
        model: "tiny-llama", a folder, a .gguf file or a hub name; in Python also a model.
        adapter: what is trained while the rest is frozen; None trains all of the model.
        distill: learn also from the model as it was when the fit began (dense, if the fit prunes it), not only from
            the labels.
        learning_rate: the learning rate of AdamW; constant unless a callback changes it.
        weight_decay: the weight decay of AdamW.
        optimizer: "adamw", or "adamw_8bit": bitsandbytes' AdamW, which keeps its two moments in 8 bits, except those
            of tensors below 4,096 weights.
        dtype: the weights' dtype; "auto" is the one they were saved in. A model built in Python keeps its own.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        attn_implementation: transformers' attention: "sdpa", "eager", "flash_attention_2"; None is its choice.
    """

    optimizer_names: ClassVar[tuple[str, ...]] = ("adamw", "adamw_8bit")

    def __init__(
        self,
        model: str,
        adapter: AdapterSettings | None = None,
        distill: DistillSettings | None = None,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        optimizer: Literal["adamw", "adamw_8bit"] = "adamw",
        dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
    ) -> None:
        super().__init__()
        # Mappings come from a checkpoint's hyperparameters.
        adapter = AdapterSettings(**adapter) if isinstance(adapter, Mapping) else adapter
        distill = DistillSettings(**distill) if isinstance(distill, Mapping) else distill
        check_settings(optimizer, self.optimizer_names, learning_rate, weight_decay)
        # Plain values only: a checkpoint must load with weights_only=True.
        self.save_hyperparameters(
            {
                "model": model if isinstance(model, str) else _name_of(model),
                "adapter": asdict(adapter) if adapter is not None else None,
                "distill": asdict(distill) if distill is not None else None,
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "optimizer": optimizer,
                "dtype": dtype,
                "gradient_checkpointing": gradient_checkpointing,
                "attn_implementation": attn_implementation,
            }
        )
        self.adapter = adapter
        self.distill = distill

    def take_model(self, base: nn.Module, new_modules: Iterable[str] = ()) -> None:
        """Set the model to train, with adapters and gradient checkpointing as configured.

        This runs in `__init__`, not in configure_model: the model can be inspected, pruned or saved without a Trainer,
        a wrong name raises before any data is read, and a resumed run restores into a model of the right shape.

        Args:
            base: The model.
            new_modules: Paths of randomly initialized modules in it, which are trained in addition to any adapter.

        Raises:
            ConfigError: if a model with a random head should be the teacher.
        """
        new = [*new_modules]
        if new and self.distill is not None:
            raise ConfigError(
                f"the new head ({', '.join(new)}) has nothing to teach: fine-tune the dense model first and distil "
                "from that, or leave out `distill`"
            )
        if self.hparams.gradient_checkpointing:
            _checkpoint_gradients(base)
        if self.adapter is not None:
            saved = dict.fromkeys((*self.adapter.modules_to_save, *new))
            base = attach_adapter(base, replace(self.adapter, modules_to_save=tuple(saved)))
        self.model = base
        self.model.train()  # from_pretrained returns a model in evaluation mode

    def configure_model(self) -> None:
        """Shard the model over devices if the trainer's strategy is ModelParallelStrategy."""
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the trained parameters, at a constant learning rate."""
        settings = (self.hparams.learning_rate, self.hparams.weight_decay)
        return build_optimizer(self.hparams.optimizer, trained_parameters(self), *settings)


def _name_of(model: nn.Module) -> str:
    if hasattr(model, "config"):
        return str(getattr(model.config, "name_or_path", ""))
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _checkpoint_gradients(model: PreTrainedModel) -> None:
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer releases of transformers 5
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Adapters in a checkpointed block get no gradient if the block's input requires none, as with a frozen embedding:
    # so the embedding's output is set to require one.
    model.enable_input_require_grads()
    model.config.use_cache = False
