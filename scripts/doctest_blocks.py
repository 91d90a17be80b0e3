"""For mkdocs.yml: shows the `>>>` examples of docstrings as code; Markdown would show them as quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe

# As in doctest, an example ends at the next empty line.
EXAMPLE = re.compile(r"^>>> .*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


class DoctestBlocks(griffe.Extension):
    """Puts the examples of every docstring into code blocks."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of an object."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
