"""Validation of settings: numbers of any kind, and clear errors for unknown names."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import os
from numbers import Integral, Real
from typing import Any, TypeVar

from sparsefit.errors import ConfigError

_Class = TypeVar("_Class", bound=type)


def named_settings(cls: _Class) -> _Class:
    """Class decorator: wrong arguments raise a `ConfigError`, which suggests the nearest name for an unknown one.

    >>> @named_settings
    ... class Settings:
    ...     def __init__(self, sparsity: float = 0.5) -> None: ...
    >>> Settings(sparsty=0.6)
    Traceback (most recent call last):
    sparsefit.errors.ConfigError: Settings has no setting 'sparsty': did you mean 'sparsity'?
    """
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(original)
        names = [name for name in signature.parameters if name != "self"]
        for name in kwargs.keys() - {*names}:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"its settings are {', '.join(names)}"
            raise ConfigError(f"{cls.__name__} has no setting {name!r}: {hint}")
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}; give its settings by name: {', '.join(names)}") from error
        for name, value in given.items():
            if isinstance(signature.parameters[name].default, bool) and not isinstance(value, bool):
                raise ConfigError(f"{cls.__name__}: {name} is {value!r}: it must be True or False")
        original(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


def as_text(name: Any) -> Any:
    """Convert paths to text, also inside lists and tuples; other values are returned unchanged.

    >>> from pathlib import PurePosixPath
    >>> as_text(PurePosixPath("models/llama")), as_text(["a", PurePosixPath("b")]), as_text(3)
    ('models/llama', ['a', 'b'], 3)
    """
    if isinstance(name, list | tuple):
        return type(name)(map(as_text, name)) if not hasattr(name, "_fields") else name
    return os.fspath(name) if isinstance(name, os.PathLike) else name


def as_number(value: object) -> float | int | None:
    """Convert a finite number (of Python or NumPy, or a 0-D tensor) to a Python number; None for anything else.

    A NumPy or tensor float becomes the decimal that it is printed as: numpy.float32(0.57) becomes 0.57.

    >>> as_number(3), as_number(0.57), as_number(True), as_number("0.5"), as_number(float("nan"))
    (3, 0.57, None, None, None)
    """
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "numpy", None)):
        value = value.numpy()  # a tensor
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "__getitem__", None)):
        value = value[()]  # an array of no dimension: its scalar
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return None
    if isinstance(value, Integral):
        return int(value)
    return float(str(value)) if hasattr(value, "dtype") else float(value)


def number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> Any:
    """Check a numeric setting and return it as a Python number; NaN and infinity are refused.

    >>> number("learning_rate", 1e-4, above=0), number("r", 8, least=1, whole=True)
    (0.0001, 8)
    >>> number("dropout", 1.5, least=0, below=1)
    Traceback (most recent call last):
    sparsefit.errors.ConfigError: dropout is 1.5: it must be a number of at least 0 and below 1

    Args:
        name: The name of the setting in the error message.
        value: The value as it was given.
        above: Exclusive lower bound.
        least: Inclusive lower bound.
        most: Inclusive upper bound.
        below: Exclusive upper bound.
        whole: Whether it must be an integer.

    Raises:
        ConfigError: if the value is not such a number.
    """
    found = as_number(value)
    limits = {"above": above, "of at least": least, "at most": most, "below": below}
    fits = found is not None and (isinstance(found, int) or not whole)
    fits = fits and (above is None or found > above) and (least is None or found >= least)
    fits = fits and (most is None or found <= most) and (below is None or found < below)
    if not fits:
        wanted = " and ".join(f"{words} {limit}" for words, limit in limits.items() if limit is not None)
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{name} is {value!r}: it must be {kind} {wanted}".rstrip())
    return found
