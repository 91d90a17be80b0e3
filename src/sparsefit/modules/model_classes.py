"""Loading models with the class that their config.json names, with all weights present; or with a new head on purpose.

transformers initializes missing weights at random and only warns; here that is an error.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sparsefit.errors import ConfigError
from sparsefit.modules.gguf import as_plain
from sparsefit.recovery.model_kinds import KINDS, classes_of, kind_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_MODULES = {
    "causal_lm": "CausalLMModule",
    "sequence_classification": "SequenceClassifierModule",
    "token_classification": "TokenClassifierModule",
    "seq2seq": "Seq2SeqModule",
    "image_classification": "ImageClassifierModule",
    "encoder": "EmbeddingModule",
}
_SHOWN = 4


def whole_model(
    path: str,
    kind: str | None = None,
    allow_unused: bool = False,
    local_files_only: bool = False,
    weights: dict[str, torch.Tensor] | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """The model in a folder, a GGUF file or on the hub, of the class that its config.json names.

    Args:
        path: Folder or hub name.
        kind: The required kind of the class, a key of `KINDS`; None accepts any.
        allow_unused: Drop weights of parts that the class does not have.
        local_files_only: Do not contact the hub.
        weights: Weights by name to use instead of those at `path`; the parameters of the model share their memory.
        settings: For `from_pretrained`; `gguf_file` names a file in `path` that replaces config.json.

    Raises:
        ConfigError: if the class is unknown or of another kind, or weights are missing or would be dropped.
    """
    model_class = named_class(path, kind, local_files_only, settings.get("gguf_file"))
    source: str | None = path
    if weights is not None:
        source, settings = None, settings | {"config": configuration(path, local_files_only), "state_dict": weights}
    model, info = model_class.from_pretrained(
        source, output_loading_info=True, local_files_only=local_files_only, **settings
    )
    kind = kind or kind_of(type(model).__name__)
    if missing := _short(info["missing_keys"]):
        raise ConfigError(
            f"{path} has no weights for {missing} of {type(model).__name__}: they would be random. Check that the "
            f"folder is complete and that its config.json names the class that it was saved from.{_way_to_new(kind)}"
        )
    if (unused := _short(_of_parts_it_has_not(model, info["unexpected_keys"]))) and not allow_unused:
        raise ConfigError(
            f"{path} holds weights of parts that {type(model).__name__}, the class in its config.json, does not have: "
            f"{unused}. They would be dropped. Correct `architectures` in config.json; or load the model in Python "
            "with load_model(..., allow_unused=True), which drops them"
        )
    return as_plain(model)


def model_with_new_head(
    path: str, kind: str, num_labels: int, local_files_only: bool = False, **settings: Any
) -> tuple[PreTrainedModel, list[str]]:
    """A pretrained body with a new, random head, and the paths of the new modules.

    Args:
        path: Folder or hub name of a body, alone or with another head, which is dropped.
        kind: A key of `KINDS`.
        num_labels: The number of classes of the head.
        local_files_only: Do not contact the hub.
        settings: For `from_pretrained`.

    Raises:
        ConfigError: if the weights already have such a head, or more than a head is missing.
    """
    import transformers

    config = configuration(path, local_files_only, settings.get("gguf_file"))
    named = (config.architectures or [None])[0]
    model_class = getattr(transformers, named if named in classes_of(kind) else KINDS[kind].auto)
    model, info = model_class.from_pretrained(
        path,
        num_labels=num_labels,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        local_files_only=local_files_only,
        **settings,
    )
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    body = f"{model.base_model_prefix}."
    if lost := _short(key for key in new if key.startswith(body) and ".pooler." not in key):
        raise ConfigError(
            f"{path} has no weights for {lost} of {type(model).__name__}, which are no part of its head: they would be "
            "random. Check that the folder is complete, and that it is a model of this architecture"
        )
    if not new:
        raise ConfigError(
            f"{path} has a trained head of {num_labels} classes already: leave new_head out to keep it. For another "
            "one of as many classes, save the body alone (model.base_model.save_pretrained(FOLDER)) and give FOLDER"
        )
    return as_plain(model), sorted(_outermost(key.rpartition(".")[0] for key in new))


def body_of_model(path: str, local_files_only: bool = False, **settings: Any) -> PreTrainedModel:
    """The body of a model, without its head if it has one.

    The pooler may be newly initialized, as embeddings by a mean over tokens do not use it; it is saved with the body.

    Raises:
        ConfigError: if other weights are missing.
    """
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(
        path, output_loading_info=True, local_files_only=local_files_only, **settings
    )
    if missing := _short(key for key in info["missing_keys"] if not key.startswith("pooler.")):
        raise ConfigError(f"{path} has no weights for {missing} of {type(model).__name__}: they would be random")
    return as_plain(model)


def skeleton(
    path: str,
    kind: str | None = None,
    blocks: int | None = None,
    local_files_only: bool = False,
    gguf_file: str | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    **_: Any,
) -> PreTrainedModel:
    """A model with random weights, from its configuration alone.

    Args:
        path: Folder or hub name.
        kind: As in `whole_model`.
        blocks: Keep only the first so many blocks; None keeps all.
        local_files_only: Do not contact the hub.
        gguf_file: A file in `path` that replaces config.json.
        dtype: The dtype of the weights.
        attn_implementation: The attention implementation of transformers.
    """
    import transformers

    kind = kind or kind_of(named_class(path, None, local_files_only, gguf_file).__name__)
    config = configuration(path, local_files_only, gguf_file)
    if blocks is not None:
        config = with_blocks(config, blocks)
    settings = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    auto = getattr(transformers, KINDS[kind if kind in KINDS else "causal_lm"].auto)
    return auto.from_config(config, dtype=config.dtype if dtype in (None, "auto") else dtype, **settings)


def blocks_in(config: PreTrainedConfig) -> int | None:
    """The number of repeated blocks of a model; None if its configuration has no single number for it."""
    text = config.get_text_config()
    return None if config.is_encoder_decoder else getattr(text, "num_hidden_layers", None)


def with_blocks(config: PreTrainedConfig, blocks: int) -> PreTrainedConfig:
    """A copy of a configuration with only the first `blocks` blocks, at most as many as it has."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    whole = text.num_hidden_layers
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == whole:  # one entry per block
            setattr(text, name, value[:blocks])
    text.num_hidden_layers = blocks
    return config


def named_class(
    path: str, kind: str | None, local_files_only: bool = False, gguf_file: str | None = None
) -> type[PreTrainedModel]:
    """The transformers class that a model's config.json names; for a GGUF file, which names none, that of its kind.

    Without a given kind, a GGUF file is assumed to be a causal language model.

    Raises:
        ConfigError: if it names no class, one that transformers does not have, or one of another kind.
    """
    import transformers

    if gguf_file is not None:
        return getattr(transformers, KINDS[kind or "causal_lm"].auto)  # that weights are missing still shows
    config = configuration(path, local_files_only)
    name = (config.architectures or [None])[0]
    if name is None and kind is not None:
        return getattr(transformers, KINDS[kind].auto)  # that weights are missing still shows
    found = getattr(transformers, name, None) if name is not None else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        release = transformers.__version__
        what = f"names {name}, which transformers {release} does not have" if name else "names no class"
        raise ConfigError(
            f"the config.json of {path} {what} (`architectures`): correct it, install the release of transformers that "
            "it was made with, or load the model in Python and give it to the module in place of its name"
        )
    if kind is not None and name not in classes_of(kind):
        raise ConfigError(_other_kind(path, name, kind))
    return found


def _other_kind(path: str, name: str, kind: str) -> str:
    own, wanted = kind_of(name), KINDS[kind].words
    if own == "encoder":
        lost = "a model without a head, which would be random"
    else:
        lost = f"no {wanted}: loaded as one, its head would be lost and a random one in its place"
    way_out = f"Take {_MODULES[own]}, or give" if own in _MODULES and own != "encoder" else "Give"
    return f"{path} holds a {name}, and that is {lost}. {way_out} a model that is a {wanted}.{_way_to_new(kind)}"


def _way_to_new(kind: str | None) -> str:
    if kind in ("sequence_classification", "token_classification"):
        return " To train a new head on purpose, set new_head=True and num_labels"
    if kind == "image_classification":
        return " To train a new head on purpose, set new_head=True and num_classes"
    return ""


def configuration(
    path: str, local_files_only: bool = False, gguf_file: str | None = None, **_: Any
) -> PreTrainedConfig:
    """The configuration of a model, from its config.json or its GGUF file."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, local_files_only=local_files_only, gguf_file=gguf_file)


def _of_parts_it_has_not(model: PreTrainedModel, keys: Iterable[str]) -> list[str]:
    """The unexpected weights that belong to a part, such as a head, that the model does not have.

    The remaining ones are leftovers inside its parts: buffers of older releases, a second head for pretraining.
    """
    parts = {name for name, _ in model.named_children()} | {model.base_model_prefix}
    inner = {name for name, _ in model.base_model.named_children()}
    body = f"{model.base_model_prefix}."
    return [key for key in keys if key.removeprefix(body).split(".")[0] not in parts | inner]


def _outermost(paths: Iterable[str]) -> set[str]:
    """The paths that are not inside another one."""
    found = set(paths)
    return {path for path in found if not any(path.startswith(f"{other}.") for other in found)}


def _short(keys: Iterable[str]) -> str:
    listed = sorted(keys)
    return ", ".join(listed[:_SHOWN]) + (" …" if len(listed) > _SHOWN else "")
