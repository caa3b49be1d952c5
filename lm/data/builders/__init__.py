"""TFDS builders of this project by name. A new one is a file here and a row of the table; TFDS is imported on use."""

from __future__ import annotations

import importlib
from typing import Any

# TFDS name → module and class
BUILDERS = {"python_docs": ("lm.data.builders.python_docs", "PythonDocs")}


def find_builder(name: str) -> Any | None:
    """The builder class of a TFDS name, or None if this project has none of that name."""
    if name not in BUILDERS:
        return None
    module, attribute = BUILDERS[name]
    return getattr(importlib.import_module(module), attribute)
