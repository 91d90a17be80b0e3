"""Turns parser errors into one sentence, and rejects settings on which Lightning fails later."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sparsefit.errors import ConfigError, SparsefitError
from sparsefit.extras import EXTRAS, has, missing
from sparsefit.settings import number

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping",
    "list": "a list",
    "tuple": "a list",
    "Sequence": "a list",
    "Set": "a list",
    "Iterable": "a list",
    "NoneType": "null",
}


class PlainErrors:
    """Mixin for parsers: raises the errors that argparse and jsonargparse print after a long usage text."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a ConfigError, except in a parser that only tests whether a value is accepted.

        Raises:
            ConfigError: in one sentence.
        """
        if getattr(self, "exit_on_error", True) is False:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        raise ConfigError(sentence(message, re.findall(r"--([\w.-]+)", parser.format_usage()))) from ex


class Parser(PlainErrors, argparse.ArgumentParser):
    """The parser of commands without a recipe, and of the options that are not settings of one."""


def sentence(message: str, options: Iterable[str] = ()) -> str:
    """A parser's error as one sentence.

    >>> sentence('Parser key "trainer.max_steps":\\n  Expected a <class \\'int\\'>. Got value: many')
    "trainer.max_steps is 'many': it must be a whole number"
    >>> sentence("Subcommand 'fit' does not accept option 'pruning.sparsty'", ["pruning.sparsity"])
    "there is no setting pruning.sparsty: did you mean 'pruning.sparsity'?"

    Args:
        message: The error of argparse or jsonargparse. For unions of types and for nested classes, it contains the
            errors of each part.
        options: The existing options, to suggest one for a misspelled name.
    """
    path = ".".join(re.findall(r'Parser key "([^"]+)":', message)).replace("init_args.", "")
    inner = message.rpartition("Parser key ")[2]
    if found := re.search(r"does not accept option '([^']+)'|^Option '([^']+)' is not accepted", message):
        return _unknown(found[1] or found[2], options)
    if found := re.search(r"unrecognized arguments: (.+)|[Nn]o action for (?:destination )?key \"(.+?)\"", message):
        return _unknown((found[1] or found[2]).split("=")[0].split(" ")[0].lstrip("-"), options)
    if found := re.search(r"Unable to load config ['\"](.*?)['\"]", message):
        return f"{path or '--config'} is {found[1]!r}: it is neither a mapping nor a YAML file"
    if found := re.search(r"Problem with given class_path '([^']+)':\s+(.+)", inner):
        return f"{path}: {_class_error(found[1], found[2])}"
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", inner):
        return f"{path}: {found[1]} is not a {found[2]}"
    if found := re.search(r"the following arguments are required: (.+)", message):
        return f"{found[1].replace('fit.', '')} is required"
    if found := re.search(r"Expected a dot import path string: (.+)", inner):
        return f"{path} is {found[1]!r}: it must be the path of a class, such as package.module.Class"
    if found := re.search(r"Not a valid subclass of (\w+)", inner):
        return f"{path} is {_value(inner)}: it must be settings of {found[1]}, or a class_path and init_args"
    kinds = dict.fromkeys(map(_kind, re.findall(r"Expected a (<class '[\w.]+'>|[\w.]+\[.*?\])(?=\.|\s|$)", inner)))
    if kinds:
        wanted = " or ".join(kind for kind in kinds if kind != "null") or "null"
        return f"{path} is {_value(inner)}: it must be {wanted}"
    return " ".join(message.split())[:500]


def check_recipes(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Read a command line's recipes and check that they are YAML mappings.

    Raises:
        ConfigError: if one is not; names the file.
    """
    recipes = []
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option not in ("-c", "--config") or not (equals or arguments[index + 1 :]):
            continue
        file = Path(value if equals else arguments[index + 1])
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:  # a ValueError if it is not UTF-8
            raise ConfigError(f"the recipe {file} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"the recipe {file} has no settings: it must be a mapping, such as `model:` and `data:`")
        recipes.append(found)
    return recipes


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Refuse Trainer settings on which Lightning would divide by zero, or which it accepts and ignores.

    Raises:
        ConfigError: if there is one; names it.
    """
    limits = {
        "accumulate_grad_batches": {"least": 1, "whole": True},
        "log_every_n_steps": {"least": 1, "whole": True},
        "check_val_every_n_epoch": {"least": 1, "whole": True},
        "val_check_interval": {"above": 0},
        "gradient_clip_val": {"least": 0},
    }
    for name, limit in limits.items():
        value = settings.get(name)
        if value is not None and not isinstance(value, str | dict):  # an interval may be a duration
            number(f"trainer.{name}", value, **limit)


def check_section(name: str, value: Any) -> None:
    """Check that a value is a mapping of settings.

    Raises:
        ConfigError: if it is not; names it.
    """
    if value is not None and not hasattr(value, "items"):
        raise ConfigError(f"{name} is {value!r}: it must be a mapping of settings")


@contextmanager
def trainer_errors() -> Iterator[None]:
    """Convert errors of creating a Trainer to ConfigErrors.

    Raises:
        ConfigError: with Lightning's message.
    """
    # Imported here, because it is slow and parsers do not need it.
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except SparsefitError:
        raise
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"a Trainer with these settings cannot be created on this machine: {reason}") from error


def check_seed(seed: Any) -> None:
    """Check that NumPy accepts a seed.

    Raises:
        ConfigError: if it does not.
    """
    if seed is not None and not isinstance(seed, bool):
        number("seed_everything", seed, least=0, most=2**32 - 1, whole=True)


def _value(message: str) -> str:
    """The given value, from the last line of a nested error."""
    found = re.search(r"(?:Got value|Given value): (.*)", message)
    text = found[1].strip() if found else "something else"
    text = text if re.match(r"[\[{(\d-]", text) or text in ("None", "True", "False") else repr(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(text: str) -> str:
    if text.startswith("typing.Literal["):
        return f"one of {text.partition('[')[2].rstrip(']')}"
    name = re.sub(r"<class '|'>|\[.*", "", text).rpartition(".")[2]
    return _KINDS.get(name, f"of the class {name}")


def _unknown(name: str, options: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [*options], n=1, cutoff=0.6)
    return f"there is no setting {name}: " + (f"did you mean {near[0]!r}?" if near else "--help lists them")


def _class_error(class_path: str, reason: str) -> str:
    """Why a class cannot be created with these arguments, with the nearest valid name."""
    module, _, name = class_path.rpartition(".")
    if (found := re.search(r"Option '([^']+)' is not accepted", reason)) is not None:
        kinds = getattr(import_module(module), name).__mro__ if module else ()
        names = {name for kind in kinds if "__init__" in vars(kind) for name in inspect.signature(kind).parameters}
        return f"{name}: {_unknown(found[1], names)}"
    if (found := re.search(r"the following arguments are required: (.+)", reason)) is not None:
        return f"{name} needs {found[1]}: give it in init_args"
    if f"has no attribute '{name}'" in reason:
        near = difflib.get_close_matches(name, dir(import_module(module)), n=1)
        return f"{module} has no class {name}" + (f": did you mean {near[0]!r}?" if near else "")
    library = class_path.partition(".")[0]
    if library in EXTRAS and not has(library):
        return f"{class_path} needs {missing(library)}"
    return f"{class_path} cannot be used: {reason.strip()}"
