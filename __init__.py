"""Lets a script that stands beside a checkout called `sparsefit` import the package in it.

Python finds the folder of the checkout first, and without this file takes it for a package with nothing in it: one that
is installed in editable mode comes after. The name then leads to the package itself.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if __name__ == "sparsefit":
    root = Path(__file__).parent
    places = [str(root / "src/sparsefit"), str(root)]  # the callbacks stand in the root
    spec = spec_from_file_location(__name__, f"{places[0]}/__init__.py", submodule_search_locations=places)
    sys.modules[__name__] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
