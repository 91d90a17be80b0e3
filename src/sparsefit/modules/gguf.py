"""Models in one GGUF file, read by transformers into plain floats; and files that come inside an installed package."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsefit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUFFIX = ".gguf"
_IN_PACKAGE = re.compile(r"([A-Za-z_]\w+(?:\.\w+)*):(.+)")  # no drive of Windows, which is one letter


def is_gguf(name: str | Path) -> bool:
    """Whether a name is that of a GGUF file.

    >>> is_gguf("SmolLM2-135M.Q4_1.gguf"), is_gguf("models/llama")
    (True, False)
    """
    return str(name).lower().endswith(SUFFIX)


def file_in_package(name: str) -> Path | None:
    """The file that `PACKAGE:FILE` names inside an installed package; None for a name of another form.

    The package is found, and not imported: what it would need to run need not be installed.

    Raises:
        ConfigError: where there is no such package, or no such file in it; names those that there are.
    """
    found = _IN_PACKAGE.fullmatch(name)
    if found is None:
        return None
    package, inside = found.groups()
    try:
        spec = find_spec(package)
    except ImportError:  # of the package around it
        spec = None
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    if not folders:
        raise ConfigError(
            f"{name} names a file in the Python package {package}, which is not installed here: `pip install --no-deps "
            f"{package.partition('.')[0].replace('_', '-')}` if that is its name, or give the path of the file"
        )
    if file := next((folder / inside for folder in folders if (folder / inside).exists()), None):
        return file
    there = sorted(path.name for folder in folders for path in folder.glob(f"*{SUFFIX}"))
    raise ConfigError(
        f"the Python package {package} holds no {inside}: " + (f"it holds {', '.join(there)}" if there else "no model")
    )


def check_reader(file: Path) -> None:
    """See that GGUF files can be read.

    Raises:
        ConfigError: where the package gguf is missing or too old.
    """
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise ConfigError(
            f"{file} is a GGUF file, and the Python package gguf, which reads them, is missing or too old: "
            "`pip install 'sparsefit[gguf]'`, or `pip install gguf`"
        )


def settings_for(file: Path, weights: bool) -> dict[str, Any]:
    """What `from_pretrained` of the folder around a GGUF file has to be told, beside that folder.

    Args:
        file: The file.
        weights: Whether a model is read, and not its tokenizer or configuration alone.
    """
    if not weights:
        return {"gguf_file": file.name}
    from transformers import GgufConfig

    # Some architectures would else keep their packed blocks where a kernel can compute with them.
    return {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}


def as_plain(model: PreTrainedModel) -> PreTrainedModel:
    """A model that was read from a GGUF file without the marks of a quantized one: its weights are floats.

    transformers would refuse to save it, and to load what was saved.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model
