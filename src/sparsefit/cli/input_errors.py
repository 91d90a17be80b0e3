"""Wrong input, told in one sentence: what the parsers say of it in a page, and settings that Lightning trips over."""

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
from lightning.fabric.utilities.exceptions import MisconfigurationException

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
    """Mixin for parsers: raises what argparse and jsonargparse print below a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a ConfigError of one sentence.

        Raises:
            ConfigError: always, but within a parser that another one asks whether it would take a value.
        """
        if getattr(self, "exit_on_error", True) is False:
            super().error(message, ex)
        told = getattr(ex, "subcommand_parser", None) or self
        raise ConfigError(sentence(message, re.findall(r"--([\w.-]+)", told.format_usage()))) from ex


class Parser(PlainErrors, argparse.ArgumentParser):
    """Of the commands that are no recipes."""


def sentence(message: str, options: Iterable[str] = ()) -> str:
    """What a parser has to say, in one sentence.

    >>> sentence('Parser key "trainer.max_steps":\\n  Expected a <class \\'int\\'>. Got value: many')
    "trainer.max_steps is 'many': it must be a whole number"
    >>> sentence("Subcommand 'fit' does not accept option 'pruning.sparsty'", ["pruning.sparsity"])
    "there is no setting pruning.sparsty: did you mean 'pruning.sparsity'?"

    Args:
        message: Of argparse or jsonargparse. Unions of types and classes in classes are reports within reports there.
        options: What there is, for names with a slip.
    """
    path = ".".join(re.findall(r'Parser key "([^"]+)":', message)).replace("init_args.", "")
    inner = message.rpartition("Parser key ")[2]
    if found := re.search(r"does not accept option '([^']+)'|^Option '([^']+)' is not accepted", message):
        return _unknown(found[1] or found[2], options)
    if found := re.search(r"unrecognized arguments: (.+)|[Nn]o action for (?:destination )?key \"(.+?)\"", message):
        return _unknown((found[1] or found[2]).split("=")[0].split(" ")[0].lstrip("-"), options)
    if found := re.search(r"Unable to load config ['\"](.*?)['\"]", message):
        return f"{path or '--config'} is {found[1]!r}: it is no mapping of settings, and no file of YAML to read"
    if found := re.search(r"Problem with given class_path '([^']+)':\s+(.+)", inner):
        return f"{path}: {_of_class(found[1], found[2])}"
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", inner):
        return f"{path}: {found[1]} is no {found[2]}"
    if found := re.search(r"the following arguments are required: (.+)", message):
        return f"{found[1].replace('fit.', '')} is missing: it must be given"
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
    """The recipes of a command line: see that they are there, and mappings of settings in YAML.

    Raises:
        ConfigError: naming the file.
    """
    recipes = []
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option not in ("-c", "--config") or not (equals or arguments[place + 1 :]):
            continue
        file = Path(value if equals else arguments[place + 1])
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:  # not UTF-8 is a ValueError
            raise ConfigError(f"the recipe {file} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"the recipe {file} has no settings: it must be a mapping, such as `model:` and `data:`")
        recipes.append(found)
    return recipes


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Refuse settings of a Trainer on which Lightning divides by zero, or which it takes and leaves alone.

    Raises:
        ConfigError: naming the setting.
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
    """Refuse what is no section of settings.

    Raises:
        ConfigError: naming it.
    """
    if value is not None and not hasattr(value, "items"):
        raise ConfigError(f"{name} is {value!r}: it must be a mapping of settings")


@contextmanager
def trainer_errors() -> Iterator[None]:
    """What Lightning raises as it makes a Trainer is about its settings, or this machine.

    Raises:
        ConfigError: with what it says.
    """
    try:
        yield
    except SparsefitError:
        raise
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"a Trainer with these settings cannot be had here: {told}") from error


def check_seed(seed: Any) -> None:
    """Refuse a seed that NumPy does not take.

    Raises:
        ConfigError: naming it.
    """
    if seed is not None and not isinstance(seed, bool):
        number("seed_everything", seed, least=0, most=2**32 - 1, whole=True)


def _value(report: str) -> str:
    """The value that was given, as the last line of a report has it."""
    found = re.search(r"(?:Got value|Given value): (.*)", report)
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


def _of_class(class_path: str, reason: str) -> str:
    """Why a class cannot be had, or not so: with the nearest name of what it does have."""
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
