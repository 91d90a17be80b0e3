"""Building untrained image classifiers of transformers, and checking the number of classes of a model's head."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsefit.errors import ConfigError
from sparsefit.modules.loading import Dtype, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def new_image_classifier(
    model_type: str, settings: dict[str, Any], dtype: Dtype = "float32", attn_implementation: str | None = None
) -> PreTrainedModel:
    """An untrained image classifier of transformers, in training mode on the CPU.

    Args:
        model_type: "convnext", "convnextv2", "deit", "vit", "swin" or another type with a classifier in transformers.
        settings: for the type's configuration, such as {"hidden_sizes": [64, 128], "num_labels": 10}.
        dtype: the weights' dtype; "auto" is float32.
        attn_implementation: "sdpa", "eager", "flash_attention_2"; None for transformers' choice.

    Raises:
        ConfigError: for an unknown type or setting, or settings with which no model can be built.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification

    # The mapping is lazy: its `get` finds nothing.
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        close = difflib.get_close_matches(model_type, CONFIG_MAPPING, n=1)
        hint = f" Did you mean {close[0]!r}?" if close and close[0] != model_type else ""
        raise ConfigError(
            f"transformers has no image classifier of the type {model_type!r}.{hint} With `config`, `model` is a type "
            "such as convnext, convnextv2, deit, vit or swin; without it, a folder or a hub name"
        )
    kind = CONFIG_MAPPING[model_type]
    _check_names(kind, model_type, settings)
    options: dict[str, Any] = {"dtype": torch_dtype("float32" if dtype == "auto" else dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        config = kind(**settings)
        config.architectures = config.architectures or []  # from_config iterates over them
        model = AutoModelForImageClassification.from_config(config, **options)
    except ConfigError:
        raise
    except Exception as error:  # each configuration checks itself in its own way, and each model fails in its own
        raise ConfigError(
            f"no {model_type} can be built with these settings: {_in_a_line(error)}. Correct `config`"
        ) from error
    return model.train()


def head_size(model: nn.Module) -> int | None:
    """The number of classes in a model's configuration; None for a model without one."""
    size = getattr(getattr(model, "config", None), "num_labels", None)
    return size if isinstance(size, int) else None


def check_head(classes: int, wanted: int, name: str) -> None:
    """Check that a head has the wanted number of classes.

    Raises:
        ConfigError: if it has not.
    """
    if classes != wanted:
        raise ConfigError(
            f"the head of {name} has {classes} classes, and num_classes is {wanted}: leave num_classes out to keep "
            "this head, or set new_head=True to train a new one"
        )


def _check_names(kind: type[PreTrainedConfig], model_type: str, settings: dict[str, Any]) -> None:
    known = [name for name in dir(kind()) if not name.startswith("_")]
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"the configuration of {model_type} has no setting {name!r}{hint}")


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(" .:") or type(error).__name__
