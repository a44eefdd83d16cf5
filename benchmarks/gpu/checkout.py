"""Makes the checkout around this file importable as `onestep`, on a machine where it is not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if "onestep" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "onestep", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["onestep"] = package
    spec.loader.exec_module(package)
