"""Python's own documentation as a corpus: a real text that every machine with Python has.

One document for each module of the running Python's standard library (its signatures and docstrings, read
with `ast` if there is source, by import if the module is compiled) and one for each `pydoc` topic.

Modules are assigned to the parts of the corpus by name, so that a module stays in its part in every Python
version. A docstring that occurs in several parts is kept only in the first of `PARTS`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

PARTS = ("test", "calibration", "train")
"""The disjoint parts, in the order in which they claim a docstring that several modules share."""

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "ensurepip"}
_SAME_FAMILY = {"posixpath": "os", "ntpath": "os", "genericpath": "os", "posix": "os", "nt": "os"}
_EXTENSION_SUFFIXES = (".so", ".pyd", ".dylib")

Entry = tuple[str, str]  # (heading, docstring)
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def part_of(module: str) -> str:
    """The part of the corpus that a module (or `pydoc` topic) belongs to, from its name alone.

    One in eight families of modules is for testing, one in eight for calibration. A family is a top-level
    package together with its private twins (`decimal`, `_decimal` and `_pydecimal`), which share text.
    """
    top = module.partition(".")[0]
    family = top.lstrip("_")
    if top.startswith("_py"):
        family = family.removeprefix("py")
    family = _SAME_FAMILY.get(family, family)
    bucket = hashlib.sha256(family.encode()).digest()[0] % 8
    return {0: "test", 1: "calibration"}.get(bucket, "train")


def documents(part: str) -> list[str]:
    """The documents of one part, in the order of their modules' names.

    Args:
        part: "train", "calibration" or "test".

    Raises:
        ValueError: for another part.
    """
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r} of Python's documentation; the parts are {', '.join(PARTS)}")
    return list(_corpus()[part])


@cache
def _corpus() -> dict[str, tuple[str, ...]]:
    seen: set[str] = set()
    corpus: dict[str, tuple[str, ...]] = {}
    modules = sorted(_library())
    for part in PARTS:
        texts = []
        for name, origin in modules:
            if part_of(name) != part:
                continue
            entries = [entry for entry in _entries(name, origin) if entry[1] not in seen]
            seen.update(docstring for _, docstring in entries)
            if entries:
                texts.append("\n\n".join(f"{heading}\n\n{docstring}" for heading, docstring in entries))
        # The topics quote one another at length, so they stay in one part.
        corpus[part] = tuple(texts + _topics()) if part == "train" else tuple(texts)
    return corpus


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return [f"help {name}\n\n{text.strip()}" for name, text in sorted(topics.items())]


def _library() -> Iterator[tuple[str, Path | None]]:
    """(module name, its file or None if it is compiled) of the whole standard library."""
    for name in sorted(sys.stdlib_module_names - {"test"}):
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            continue
        if spec is None:
            continue
        origin = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
        if origin is None and not (spec.origin == "built-in" or str(spec.origin).endswith(_EXTENSION_SUFFIXES)):
            origin = _frozen_source(name)
            if origin is None:
                continue
        yield name, origin
        for folder in spec.submodule_search_locations or ():
            for file in sorted(Path(folder).rglob("*.py")):
                parts = file.relative_to(folder).with_suffix("").parts
                if parts != ("__init__",) and not _SKIPPED_FOLDERS.intersection(parts):
                    yield ".".join((name, *(p for p in parts if p != "__init__"))), file


def _frozen_source(name: str) -> Path | None:
    file = Path(inspect.__file__).with_name(f"{name}.py")
    return file if file.exists() else None


def _entries(name: str, origin: Path | None) -> list[Entry]:
    try:
        if origin is None:
            return list(_entries_of_module(importlib.import_module(name)))
        return list(_entries_of_source(name, ast.parse(origin.read_text(encoding="utf-8"))))
    except (ImportError, SyntaxError, UnicodeDecodeError, OSError):
        return []  # a module that this installation lacks, or a file of deliberately bad source


def _entries_of_source(name: str, node: ast.AST) -> Iterator[Entry]:
    docstring = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | _Function) else None
    if docstring and isinstance(node, ast.Module):
        yield f"module {name}", docstring
    elif docstring and isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        yield f"class {name}({bases})" if bases else f"class {name}", docstring
    elif docstring and isinstance(node, _Function):
        yield f"{name}({ast.unparse(node.args)})", docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | _Function):
            yield from _entries_of_source(f"{name}.{child.name}", child)


def _entries_of_module(module: ModuleType) -> Iterator[Entry]:
    if docstring := inspect.getdoc(module):
        yield f"module {module.__name__}", docstring
    for name, member in sorted(vars(module).items()):
        if name.endswith("hook"):  # a library may have replaced it; the original is `sys.__excepthook__`
            member = vars(module).get(f"__{name}__", member)
        yield from _entries_of_member(f"{module.__name__}.{name}", member)
        if inspect.isclass(member):
            for method, function in sorted(vars(member).items()):
                yield from _entries_of_member(f"{module.__name__}.{name}.{method}", function)


def _entries_of_member(name: str, member: object) -> Iterator[Entry]:
    if not (inspect.isclass(member) or inspect.isroutine(member)):
        return
    docstring = getattr(member, "__doc__", None)
    if isinstance(docstring, str) and docstring.strip():
        kind = "class " if inspect.isclass(member) else ""
        signature = getattr(member, "__text_signature__", None) or ""
        yield f"{kind}{name}{signature}".replace("$", ""), inspect.cleandoc(docstring)
