"""Checks that a model and its data fit together, before anything is measured or trained."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from sparsefit.errors import ConfigError

_SWITCHES = {  # the steps of an image processor, and the settings of each
    "do_normalize": ("image_mean", "image_std"),
    "do_rescale": ("rescale_factor",),
    "do_resize": ("size", "crop_pct"),
    "do_center_crop": ("crop_size",),
}
_NUMBERED = re.compile(r"LABEL_\d+")  # transformers' names of unnamed classes


def check_data(model: LightningModule, data: LightningDataModule) -> None:
    """Check that data fit a model: the tokens, the preparation of images, and the classes.

    The attributes `tokenizer`, `image_processor`, `classes` and `model.config.id2label` of the module are compared with
    `tokenizer`, `image_processor`, `class_names` and `num_classes` of the data. Attributes that one of them lacks are
    not compared.

    Args:
        model: The module.
        data: Its data, after `setup`.

    Raises:
        ConfigError: if they do not fit; names both values.
    """
    _check_tokenizers(getattr(model, "tokenizer", None), getattr(data, "tokenizer", None))
    check_vocabulary(getattr(model, "model", None), getattr(data, "tokenizer", None))
    _check_processors(getattr(model, "image_processor", None), getattr(data, "image_processor", None))
    names = getattr(data, "class_names", None)
    if names is not None:
        _check_order(_named_classes(model), list(names))
    _check_head(getattr(model, "classes", None), getattr(data, "num_classes", None))


def _check_tokenizers(of_model: Any, of_data: Any) -> None:
    if of_model is not None and of_data is not None and of_model.get_vocab() != of_data.get_vocab():
        raise ConfigError(
            f"the data's tokenizer ({of_data.name_or_path}) is not the model's ({of_model.name_or_path}): their "
            "vocabularies differ. Give data.init_args.tokenizer the same name as model.init_args.model"
        )


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Check that the model has an embedding for each token, except special ones, which texts do not contain.

    Args:
        model: A transformers model; others are not checked.
        tokenizer: A tokenizer, or None.

    Raises:
        ConfigError: if embeddings are missing.
    """
    embeddings = getattr(model, "get_input_embeddings", None)
    if tokenizer is None or not callable(embeddings) or not hasattr(embedding := embeddings(), "weight"):
        return
    rows, special = embedding.weight.shape[0], {*tokenizer.all_special_ids}
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= rows and number not in special]
    if beyond:
        raise ConfigError(
            f"the tokenizer has {len(beyond)} tokens (such as {beyond[0]!r}) that the model has no embedding for: it "
            f"has {rows}. Use the tokenizer of the model, or resize the model's embeddings to {len(tokenizer)}"
        )


def _check_processors(of_model: Any, of_data: Any) -> None:
    """Compare the settings that both processors have."""
    own, other = _settings(of_model), _settings(of_data)
    differ = []
    for switch, settings in _SWITCHES.items():
        on = own.get(switch, True), other.get(switch, True)
        names = [switch] if on[0] != on[1] else list(settings) if all(on) else []
        for name in names:
            if name in own and name in other and not _same(own[name], other[name]):
                differ.append(f"{name} is {own[name]} for the model and {other[name]} for the data")
    if differ:
        raise ConfigError(
            f"the data prepare images differently from the model's image processor: {'; '.join(differ)}. Set "
            "data.init_args.processor to the model's folder or name, and leave out image_size, mean and std; or, if "
            "the model is to be trained on images prepared in the new way, correct the preprocessor_config.json in its "
            "folder"
        )


def _check_order(of_model: dict[str, int], of_data: list[str]) -> None:
    if not set(of_data) <= of_model.keys():
        return  # different names cannot be compared
    wrong = [(number, name) for number, name in enumerate(of_data) if of_model[name] != number]
    if wrong:
        number, name = wrong[0]
        raise ConfigError(
            f"model and data number the same classes differently: {name!r} is class {of_model[name]} of the model and "
            f"{number} of the data, and {len(wrong) - 1} more differ. Bring the classes of the data into the model's "
            "order (folders are classes in the order of their names), or correct id2label in the model's config.json "
            "if it is wrong"
        )


def _check_head(of_model: Any, of_data: Any) -> None:
    if not (isinstance(of_model, int) and isinstance(of_data, int)):
        return
    if of_model < of_data:
        raise ConfigError(
            f"the model's head has {of_model} classes and the data have {of_data}: give a model with a head of "
            f"{of_data} classes (num_labels in its config), or other data"
        )
    if of_model > of_data:
        rank_zero_warn(
            f"The model's head has {of_model} classes and the data have {of_data}: a label of the data must be the "
            "number of the same class in the head. A model for only these classes would have a head of the same size"
        )


def _named_classes(module: LightningModule) -> dict[str, int]:
    """Classes with real names in the model's configuration, and their numbers."""
    names = getattr(getattr(getattr(module, "model", None), "config", None), "id2label", None)
    if not isinstance(names, Mapping):
        return {}
    return {str(name): int(number) for number, name in names.items() if not _NUMBERED.fullmatch(str(name))}


def _settings(processor: Any) -> dict[str, Any]:
    """The settings that an image processor of transformers would save, without unset ones."""
    to_dict = getattr(processor, "to_dict", None)
    if not callable(to_dict):
        return {}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in to_dict().items()}
    return {name: value for name, value in settings.items() if value is not None}


def _same(one: Any, other: Any) -> bool:
    one, other = _plain(one), _plain(other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _plain(value: Any) -> Any:
    """A setting in canonical form: [0.5, 0.5, 0.5] becomes 0.5, and a size loses its unset parts."""
    if isinstance(value, Mapping):
        return {key: part for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return value[0] if len(set(value)) == 1 else value
    return value
