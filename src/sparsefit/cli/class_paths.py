"""Checks the classes that a file names before any of them is called, because the file may come from anyone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from types import FunctionType
from typing import Any, TypeVar, get_type_hints

from jsonargparse import Namespace

from sparsefit.errors import ConfigError

_Class = TypeVar("_Class")


def named_class(entry: Any, kind: type[_Class]) -> type[_Class]:
    """The class that a recipe's `class_path` names.

    Raises:
        ConfigError: if it is not a class of the required kind. It was not called.
    """
    path = entry.get("class_path") if isinstance(entry, Mapping) else None
    found = _named(path)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ConfigError(f"the recipe names {path!r}, which is not a {kind.__name__}, so it is not called")
    return found


def check_class_paths(settings: Any, kinds: tuple[type, ...]) -> None:
    """Check that every class path in the settings names a class of an allowed kind.

    Raises:
        ConfigError: if one does not; names the first.
    """
    for path in _class_paths(settings):
        found = _named(path)
        if isinstance(found, FunctionType):  # its return annotation names the class
            found = get_type_hints(found).get("return")
        if not (isinstance(found, type) and issubclass(found, kinds)):
            listed = ", ".join(kind.__name__ for kind in kinds)
            raise ConfigError(f"the recipe names {path!r}, which is not one of the allowed kinds: {listed}")


def _class_paths(settings: Any) -> Iterator[Any]:
    if isinstance(settings, Namespace):
        settings = vars(settings)
    if isinstance(settings, Mapping):
        if "class_path" in settings:
            yield settings["class_path"]
        for value in settings.values():
            yield from _class_paths(value)
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _class_paths(value)


def _named(path: Any) -> Any:
    if not isinstance(path, str) or "." not in path:
        return None
    package, _, name = path.rpartition(".")
    try:
        return getattr(import_module(package), name, None)
    except (ImportError, ValueError):
        return None
