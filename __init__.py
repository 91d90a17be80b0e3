"""Makes `import sparsefit` work for a script next to a checkout named sparsefit.

Python searches the folder of the script before packages in editable mode. Without this file, it would import the folder
of the checkout as an empty package. This file replaces it with the package itself.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if __name__ == "sparsefit":
    root = Path(__file__).parent
    places = [str(root / "src/sparsefit"), str(root)]  # callbacks/ is in the root
    spec = spec_from_file_location(__name__, f"{places[0]}/__init__.py", submodule_search_locations=places)
    sys.modules[__name__] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
