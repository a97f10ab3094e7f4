"""Whether the steps that every request takes are compiled.

They are where a C compiler was at hand when the package was installed. `RATELIMIT_PURE_PYTHON=1` in the
environment leaves them out: their twins in Python give the same answers.
"""

import os
from importlib import import_module
from typing import Any

PURE = "RATELIMIT_PURE_PYTHON"


def _load() -> Any:
    if os.environ.get(PURE):
        return None
    try:
        return import_module("ratelimit_mw._speedups")
    except ImportError:
        return None


core: Any = _load()
"""The compiled module, or None."""


def is_compiled() -> bool:
    """Whether the steps that every request takes are compiled in this process."""
    return core is not None
