"""Our own TFDS builders by name. A new one is a file here and a line in the table; TFDS is imported when one is used."""

from __future__ import annotations

import importlib
from typing import Any

# TFDS name → module and class
BUILDERS = {"python_docs": ("lm.data.builders.python_docs", "PythonDocs")}


def find_builder(name: str) -> Any | None:
    """The builder class of a TFDS name, or None if the name is not one of ours."""
    if name not in BUILDERS:
        return None
    module, attribute = BUILDERS[name]
    return getattr(importlib.import_module(module), attribute)
