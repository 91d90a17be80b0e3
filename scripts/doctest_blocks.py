"""For mkdocs.yml: shows the `>>>` examples of docstrings as code, where Markdown takes them for quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe

# An example goes on to the next empty line, as doctest has it.
EXAMPLE = re.compile(r"^>>> .*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


class DoctestBlocks(griffe.Extension):
    """Puts fences around the examples of every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Take an object whose docstring has been read."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
