"""What the modules of sparsefit share: settings, adapters, the dense teacher, and the optimizer."""

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
    """A model to train: all of it, its kept weights, or adapters on it, with its dense self as the teacher or without.

    A subclass gives its model to `take_model` in its `__init__`.

    Attributes:
        model: the model, PEFT-wrapped where `adapter` asks for one of PEFT's.
        teacher: the dense model that the loss looks at, where `distill` is given and a fit has begun.

    Args:
        model: "tiny-llama", a folder, a .gguf file or a hub name; in Python also a model.
        adapter: what is trained while the rest is frozen; None trains all of the model.
        distill: learn from the model as it was when the fit began (dense, if the fit prunes it), and not from the
            labels alone.
        learning_rate: of AdamW; it stays as it is unless a callback changes it.
        weight_decay: of AdamW.
        optimizer: "adamw", or "adamw_8bit": bitsandbytes' AdamW, which holds its two moments in 8 bits, but those of
            tensors below 4,096 weights.
        dtype: the weights' dtype; "auto" is the one they were saved in. A model built in Python keeps its own.
        gradient_checkpointing: compute activations twice to hold fewer of them.
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
        # As a checkpoint keeps them.
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
        """Make a model the one to train, as the settings say.

        Loaded in `__init__` and not in configure_model: the model is there to look at, prune or save without a Trainer,
        a wrong name is told before any data is read, and a resumed run restores into a model of the right shape.

        Args:
            base: The model.
            new_modules: Paths of what is random in it, which is trained beside any adapter.

        Raises:
            ConfigError: where a random head should teach.
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
        """Split the model over the devices, where the trainer's strategy is ModelParallelStrategy."""
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what is trained, at a constant rate."""
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
    # A checkpointed block whose inputs need no gradient gives its adapters none either: the embedding of a frozen
    # base does not, so its output is told to.
    model.enable_input_require_grads()
    model.config.use_cache = False
