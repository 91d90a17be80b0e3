"""Models in a single GGUF file, which transformers reads as floats; and files inside an installed Python package."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsefit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUFFIX = ".gguf"
_IN_PACKAGE = re.compile(r"([A-Za-z_]\w+(?:\.\w+)*):(.+)")  # at least two letters: not a Windows drive


def is_gguf(name: str | Path) -> bool:
    """Whether a name ends in .gguf.

    >>> is_gguf("SmolLM2-135M.Q4_1.gguf"), is_gguf("models/llama")
    (True, False)
    """
    return str(name).lower().endswith(SUFFIX)


def file_in_package(name: str) -> Path | None:
    """The file that `PACKAGE:FILE` names inside an installed package; None for a name of another form.

    The package is located but not imported, so that its dependencies need not be installed.

    Raises:
        ConfigError: if there is no such package, or no such file in it; names the files that it has.
    """
    found = _IN_PACKAGE.fullmatch(name)
    if found is None:
        return None
    package, inside = found.groups()
    try:
        spec = find_spec(package)
    except ImportError:  # from importing a parent package
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
    """Check that GGUF files can be read.

    Raises:
        ConfigError: if the package gguf is missing or too old.
    """
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise ConfigError(
            f"{file} is a GGUF file, and the Python package gguf, which reads them, is missing or too old: "
            "`pip install 'sparsefit[gguf]'`, or `pip install gguf`"
        )


def settings_for(file: Path, weights: bool) -> dict[str, Any]:
    """The further arguments of `from_pretrained`, which is called with the folder of a GGUF file.

    Args:
        file: The file.
        weights: Whether a model is read, not only its tokenizer or configuration.
    """
    if not weights:
        return {"gguf_file": file.name}
    from transformers import GgufConfig

    # Otherwise some architectures stay quantized if there is a kernel that computes with packed blocks.
    return {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}


def as_plain(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the quantization settings of a model that was read from a GGUF file as floats.

    With them, transformers would refuse to save it, and to load the saved model.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model
